"""Fuses a trained model for inference."""

from .._autoload import import_timm

import_timm()

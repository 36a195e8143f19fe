"""Fuses a trained model for inference."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py

"""Replaces the activations of a finished model by units."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py

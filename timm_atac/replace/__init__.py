"""Puts units in place of a finished model's activations."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py

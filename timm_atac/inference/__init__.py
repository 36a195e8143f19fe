"""Fuses a trained model for inference."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)

"""Puts units in place of a finished model's activations."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)

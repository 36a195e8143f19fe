"""Replaces the activations of a finished model by units."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)

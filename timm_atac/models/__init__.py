"""The networks that timm lists, a file for each family."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)

"""The networks that timm lists, a file for each family."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py

"""The gates of modules, the gates of a forward pass, and pictures of them."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py

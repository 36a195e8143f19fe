"""The gates of modules, the gates of a forward pass, and pictures of them."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)

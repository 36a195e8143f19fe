"""The gates of modules, the gates of a forward pass, and pictures of them."""

from .._autoload import import_timm

import_timm()

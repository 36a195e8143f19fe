"""How a module runs: forward passes that are observed, autocast, hooks, recomputation."""

from .._autoload import import_timm

import_timm()

"""How a module runs: forward passes that are observed, autocast, hooks, recomputation."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py

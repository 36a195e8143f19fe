"""How a module runs: forward passes that are observed, autocast, hooks, recomputation."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)

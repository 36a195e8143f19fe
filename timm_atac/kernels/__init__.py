"""Operations that PyTorch has in no single public call, each beside its formula in plain PyTorch."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)

"""Operations that PyTorch has in no single public call, each beside its formula in plain PyTorch."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py

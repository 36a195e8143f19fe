"""Operations for which PyTorch has no single public function. Each file also has the formula in plain PyTorch."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py

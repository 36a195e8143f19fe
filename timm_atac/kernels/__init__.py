"""Operations for which PyTorch has no single public function. Each file also has the formula in plain PyTorch."""

from .._autoload import import_timm

import_timm()

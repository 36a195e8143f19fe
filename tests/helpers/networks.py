"""Networks whose every part has something to do."""

from typing import Any

import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from timm_atac import ATAC


def wild(name: str, **kwargs: Any) -> Any:
    """A network in `eval()` whose residual branches do not end with zeros, and whose norms are not the identity."""
    model: Any = timm.create_model(name, zero_init_last=False, **kwargs).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.3, 0.7)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def wild_units(model: nn.Module) -> Any:
    """The last norm of a new unit leaves its gates around 0.5: give them all values."""
    units: list[Any] = [unit for unit in model.modules() if isinstance(unit, ATAC)]
    for unit in units:
        nn.init.normal_(unit.bn2.weight, 2, 1)
        nn.init.normal_(unit.bn2.bias)
    return model


def gmacs(model: nn.Module, size: int) -> float:
    """Multiply-adds of one image of height and width `size`, in billions."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops() / 2e9

"""Networks for tests. Every layer of theirs affects the output."""

from typing import Any

import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from timm_atac import ATAC


def wild(name: str, **kwargs: Any) -> Any:
    """Create a network in `eval()` whose residual branches are not zero and whose norms are not the identity."""
    model: Any = timm.create_model(name, zero_init_last=False, **kwargs).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.3, 0.7)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def wild_units(model: nn.Module) -> Any:
    """Spread the gates of the units from 0 to 1; in a new unit they are around 0.5."""
    units: list[Any] = [unit for unit in model.modules() if isinstance(unit, ATAC)]
    for unit in units:
        nn.init.normal_(unit.bn2.weight, 2, 1)
        nn.init.normal_(unit.bn2.bias)
    return model


def gmacs(model: nn.Module, size: int) -> float:
    """Return the multiply-adds for one image of height and width `size`, in billions."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops() / 2e9

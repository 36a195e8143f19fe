"""The width of the units' bottlenecks, so that the units add no more parameters than wanted."""

from collections import Counter
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch.nn as nn
from timm.layers import LayerType, get_act_layer

from ..units.create import create_activation
from .places import Place

__all__ = ['AUTO_SHARE', 'choose_rd_ratio', 'is_budget']

AUTO_SHARE = 0.1  # the paper's ATAC-ResNet-50 has 9.3 % more parameters than ResNet-50


def is_budget(rd_ratio: Any) -> bool:
    """True for 'auto' and for a whole number greater than 1, False for a ratio and for None."""
    if rd_ratio == 'auto':
        return True
    is_number = isinstance(rd_ratio, (int, float)) and not isinstance(rd_ratio, bool)
    return is_number and rd_ratio > 1 and float(rd_ratio).is_integer()


def choose_rd_ratio(model: nn.Module, places: Sequence[Place], act: LayerType, rd_ratio: Any) -> tuple[float, str]:
    """Return the largest ratio 1 / r, with r = 2 (the paper's), 3, 4, ..., whose units are within a budget.

    Args:
        model: The model, whose parameters 'auto' refers to.
        places: The places that get units.
        act: The unit.
        rd_ratio: 'auto' for at most `AUTO_SHARE` of the parameters of the model, or a number of parameters.

    Returns:
        The ratio, and a sentence for the report.

    Raises:
        ValueError: Bottlenecks of one channel are already too many, or the unit has no bottleneck.
    """
    accepted = signature(get_act_layer(act)).parameters  # type: ignore[arg-type]
    if 'rd_ratio' not in accepted:
        raise ValueError(f'rd_ratio={rd_ratio!r} was given with act={act!r}, which has no bottleneck.')
    total = sum(p.numel() for p in model.parameters())
    budget = int(total * AUTO_SHARE) if rd_ratio == 'auto' else int(rd_ratio)
    limit = f'{AUTO_SHARE:.0%} of {total:,}' if rd_ratio == 'auto' else f'{budget:,}'
    counts = Counter(place.width[0] for place in places)

    def added(r: int) -> int:
        return sum(n * _parameters(act, channels, 1 / r) for channels, n in counts.items())

    last = max(2, max(counts))
    if added(last) > budget:
        raise ValueError(
            f'rd_ratio={rd_ratio!r}: at most {limit} parameters may be added, and {len(places)} units add '
            f'{added(last):,} even with one channel in each bottleneck. Choose fewer activations by '
            f'`where`, or a larger number.'
        )
    first = 2
    while first < last:  # the number of parameters falls with r
        middle = (first + last) // 2
        first, last = (first, middle) if added(middle) <= budget else (middle + 1, last)
    return 1 / first, f'rd_ratio={rd_ratio!r} is 1 / {first}: the units may add at most {limit} parameters'


def _parameters(act: LayerType, channels: int, rd_ratio: float) -> int:
    unit = create_activation(act, channels, rd_ratio, device='meta')
    return sum(p.numel() for p in unit.parameters())

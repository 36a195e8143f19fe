"""Maps between guards for the tests of the kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

__all__ = ['DEVICE', 'LAYOUTS', 'error', 'guarded', 'poisoned']

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
LAYOUTS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
_GUARD = 4096  # values before and after

_empty_like = torch.empty_like
_kept: list[tuple[torch.Tensor, torch.Tensor]] = []


def guarded(values: torch.Tensor) -> torch.Tensor:
    """The same values and strides, on the device, with NaNs before and after: whoever reads those returns NaNs."""
    values = values.to(DEVICE)
    around = torch.full((values.numel() + 2 * _GUARD,), torch.nan, dtype=values.dtype, device=DEVICE)
    inside = around[_GUARD : _GUARD + values.numel()].as_strided(values.shape, values.stride(), _GUARD)
    inside.copy_(values)
    _kept.append((inside, around))
    return inside


@contextmanager
def poisoned() -> Iterator[None]:
    """Results are allocated full of NaNs, between guards, which have to be there at the end."""

    def empty_like(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return guarded(torch.full_like(t, torch.nan, dtype=dtype))

    _kept.clear()
    with mock.patch('torch.empty_like', empty_like):
        yield
    assert _kept, 'nothing was allocated'
    for inside, around in _kept:
        assert around[:_GUARD].isnan().all() and around[_GUARD + inside.numel() :].isnan().all()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all values together, over them; NaN if there is one."""
    difference = found.double().cpu() - expected.double().cpu()
    return (difference.norm() / expected.double().norm().cpu()).item() if found.numel() else 0.0

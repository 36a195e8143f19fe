"""Shared parts of the kernels' tests: the device, guarded maps, tolerances."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from timm_atac.kernels.switch import IS_INTERPRETED, can_run

__all__ = [
    'DEVICE',
    'ERRORS',
    'LAYOUTS',
    'error',
    'exact',
    'guarded',
    'maps',
    'parameters',
    'poisoned',
    'skip_without_kernels',
    'spied',
]

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
LAYOUTS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
# largest relative errors over all values together: the result is rounded once, and hidden values are rounded if the
# products are of half precision; the interpreter truncates bfloat16 and does not round it
ERRORS = {torch.float32: 5e-7, torch.float16: 4e-4, torch.bfloat16: 6e-3 if IS_INTERPRETED else 2.4e-3}
_GUARD = 4096  # values before and after a tensor

_empty_like = torch.empty_like
_kept: list[tuple[torch.Tensor, torch.Tensor]] = []


def guarded(values: torch.Tensor) -> torch.Tensor:
    """Copy to the device with the same strides, with NaNs before and after. Reading those would give NaNs."""
    values = values.to(DEVICE)
    around = torch.full((values.numel() + 2 * _GUARD,), torch.nan, dtype=values.dtype, device=DEVICE)
    inside = around[_GUARD : _GUARD + values.numel()].as_strided(values.shape, values.stride(), _GUARD)
    inside.copy_(values)
    _kept.append((inside, around))
    return inside


@contextmanager
def poisoned() -> Iterator[None]:
    """Allocate results full of NaNs between guards, and check at the end that the guards are unchanged."""

    def empty_like(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return guarded(torch.full_like(t, torch.nan, dtype=dtype))

    _kept.clear()
    with mock.patch('torch.empty_like', empty_like):
        yield
    assert _kept, 'nothing was allocated'
    for inside, around in _kept:
        assert around[:_GUARD].isnan().all() and around[_GUARD + inside.numel() :].isnan().all()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of the expected values, NaN if there is a NaN."""
    difference = found.double().cpu() - expected.double().cpu()
    return (difference.norm() / expected.double().norm().cpu()).item() if found.numel() else 0.0


def parameters(channels: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    return [guarded(torch.randn(shape).mul(3 / shape[-1] ** 0.5).to(dtype)) for shape in shapes]


def maps(count: int, channels: int, place: tuple[int, int, int], layout: str, dtype: torch.dtype) -> list[Any]:
    batch, *size = place
    shape = (batch, channels, *size)
    return [guarded(torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])) for _ in range(count)]


def exact(function, *args: torch.Tensor) -> torch.Tensor:
    return function(*(arg.double().cpu() for arg in args))


def spied(module: Any, *names: str) -> Any:
    """Replace operations by mocks that call them and count the calls."""
    spies = {name: mock.Mock(wraps=getattr(module, name)) for name in names}
    return mock.patch.multiple(module, **spies)


def skip_without_kernels() -> None:
    """Skip the tests of the module that calls this function, if the kernels cannot run."""
    if not can_run(DEVICE):
        reason = 'no GPU: test_kernels_interpreted.py runs these tests in another process'
        pytest.skip(reason, allow_module_level=True)

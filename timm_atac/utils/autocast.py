"""What autocast does to a convolution, for code that calls PyTorch below it."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ['autocast_dtype', 'cast', 'is_autocast_enabled', 'without_autocast']


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether autocast changes what runs on a device, some of which (`meta`) have none."""
    if torch.compiler.is_compiling():  # that of PyTorch 2.11 cannot look into `is_autocast_available`
        return device.type != 'meta' and torch.is_autocast_enabled(device.type)
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast lets a convolution of `x` compute in, None where the arguments tell."""
    autocast = is_autocast_enabled(x.device) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else None


def cast(t: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return t if dtype is None else t.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which every operation computes in the type of its arguments."""
    return torch.autocast(device.type, enabled=False) if is_autocast_enabled(device) else nullcontext()

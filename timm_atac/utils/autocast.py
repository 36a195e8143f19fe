"""The effect of autocast on a convolution, for code that runs with autocast disabled."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ['autocast_dtype', 'cast', 'is_autocast_enabled', 'without_autocast']


def is_autocast_enabled(device: torch.device) -> bool:
    """True if autocast is enabled for the type of a device. Some devices, such as `meta`, have no autocast."""
    if torch.compiler.is_compiling():  # torch.compile of PyTorch 2.11 cannot trace `is_autocast_available`
        return device.type != 'meta' and torch.is_autocast_enabled(device.type)
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast lets a convolution of `x` compute, None if autocast does not apply."""
    autocast = is_autocast_enabled(x.device) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else None


def cast(t: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return `t` in a dtype. None leaves it unchanged."""
    return t if dtype is None else t.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast is disabled for the type of a device."""
    return torch.autocast(device.type, enabled=False) if is_autocast_enabled(device) else nullcontext()

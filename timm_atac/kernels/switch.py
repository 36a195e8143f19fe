"""Whether the Triton kernels run: where they can, and where someone asked or they were measured to win.

They are not measured on any GPU yet, so they run only where asked: `use_kernels(True)`, `TIMM_ATAC_KERNELS=1`, or for
one model `fuse(model, kernel=True)`. Nothing here imports Triton.
"""

import os
from importlib import import_module
from importlib.util import find_spec

import torch

__all__ = [
    'DTYPES',
    'IS_INSTALLED',
    'IS_INTERPRETED',
    'MEASURED_TO_WIN',
    'MOST_HIDDEN',
    'can_run',
    'check_choice',
    'is_wanted',
    'layout',
    'use_kernels',
]

VARIABLE = 'TIMM_ATAC_KERNELS'
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HIDDEN = 512  # above, the kernel computes hidden values again and again: two products do less
# constants, for torch.compile looks into what is called; the Triton of PyTorch 2.6 fails at some of the kernels
IS_INSTALLED = find_spec('triton') is not None and torch.__version__ >= '2.7'
IS_INTERPRETED = os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'on', 'yes', 'y')  # as Triton reads it

# (operation, compute capability of the GPU) -> numbers of channels at which `benchmarks/kernels.py` found the kernel
# faster than everything else in at least half precision; without an entry it runs only where it is asked for
MEASURED_TO_WIN: dict[tuple[str, tuple[int, int]], frozenset[int]] = {}


def _from_environment() -> bool | str | None:
    value = os.environ.get(VARIABLE, '').lower()
    if value in ('1', 'true', 'yes', 'on'):
        return True
    if value in ('0', 'false', 'no', 'off'):
        return False
    return value or None


_asked = _from_environment()  # an unknown word is an error when it is needed: an import has other things to do


def use_kernels(enable: bool | None) -> None:
    """Switch the Triton kernels on or off, in this process, from now on.

    It counts for units in training (`ATACMe`) and for models of `fuse` that were not told otherwise. Also by the
    environment, for programs that do not know us: `TIMM_ATAC_KERNELS=1` or `0`.

    Args:
        enable: True, wherever they can run: tensors on a GPU of compute capability 8.0 or newer, float16, bfloat16 or
            float32. False, nowhere. None, where they were measured to win, which is nowhere so far.

    Raises:
        ValueError: None of the three.
        ImportError: True, and Triton is not installed, does not load, or PyTorch is older than 2.7.
    """
    global _asked
    check_choice('use_kernels', enable)
    _asked = enable


def check_choice(name: str, enable: bool | None) -> None:
    """Check what somebody chose, before it counts.

    Raises:
        ValueError: It is none of True, False, None.
        ImportError: True, and Triton is not installed, does not load, or PyTorch is older than 2.7.
    """
    if enable is not None and not isinstance(enable, bool):
        raise ValueError(
            f'{name}: got {enable!r}, expected True (the kernels run wherever they can), False (nowhere) or None '
            f'(where they were measured to win).'
        )
    if not enable:
        return
    hint = 'It comes with PyTorch for CUDA on Linux; elsewhere leave the kernels off.'
    if not IS_INSTALLED:
        found = 'without' if find_spec('triton') is None else 'with'
        raise ImportError(
            f'The kernels need PyTorch 2.7 or newer with Triton, and this is {torch.__version__} {found} Triton. {hint}'
        )
    try:
        import_module('triton.language')
    except Exception as error:
        raise ImportError(f'Triton is installed, but does not load: {type(error).__name__}: {error}. {hint}') from error


def is_wanted(operation: str, device: torch.device, channels: int | None, own: bool | None = None) -> bool:
    """Whether a kernel is to run, if it can: cheap, for it is asked in every forward pass.

    Args:
        operation: Name of the operation, as in `MEASURED_TO_WIN`.
        device: Of the tensors.
        channels: C.
        own: What was asked of this one model, None for nothing.
    """
    asked = _asked if own is None else own
    if isinstance(asked, str):
        raise ValueError(
            f'{VARIABLE}={asked!r}: expected 1 (the kernels run wherever they can), 0 (nowhere), or nothing (where '
            f'they were measured to win).'
        )
    if asked is not None or not MEASURED_TO_WIN:
        return bool(asked)
    if not isinstance(device, torch.device) or device.type != 'cuda':  # a tracer has a stand-in for a device
        return False
    return channels in MEASURED_TO_WIN.get((operation, torch.cuda.get_device_capability(device)), ())


def can_run(device: torch.device) -> bool:
    """Whether the kernels run on a device.

    That is NVIDIA's GPUs of compute capability 8.0 or newer (on older ones Triton has no product that pays, and for
    AMD's there are no tiles), and the CPU where Triton interprets (TRITON_INTERPRET=1, for tests).
    """
    if not IS_INSTALLED:
        return False
    if device.type == 'cuda':
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == 'cpu' and IS_INTERPRETED


def layout(x: torch.Tensor) -> torch.memory_format | None:
    """How (B, C, H, W) lies in memory if it lies densely, None if it does not."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        if x.is_contiguous(memory_format=memory_format):
            return memory_format
    return None

"""Whether the Triton kernels run: where they can, and where someone asked or they were measured to win.

They are not measured on any GPU yet, so they run only where asked: `use_kernels(True)`, `TIMM_ATAC_KERNELS=1`, or for
one model `fuse(model, kernel=True)`. Nothing here imports Triton.
"""

import os
from importlib.util import find_spec

import torch

__all__ = ['MEASURED_TO_WIN', 'can_run', 'check_installed', 'is_wanted', 'layout', 'use_kernels']

VARIABLE = 'TIMM_ATAC_KERNELS'
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# constants, for torch.compile looks into what is called; PyTorch 2.5 has no way to show it a kernel, and the Triton of
# that time does not compile all of ours
IS_INSTALLED = find_spec('triton') is not None and hasattr(torch.library, 'wrap_triton')
IS_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'

# (operation, compute capability of the GPU) -> numbers of channels at which `benchmarks/kernels.py` found the kernel
# faster than everything else in at least half precision; without an entry it runs only where it is asked for
MEASURED_TO_WIN: dict[tuple[str, tuple[int, int]], frozenset[int]] = {}


def _from_environment() -> bool | None:
    value = os.environ.get(VARIABLE, '')
    if value not in ('', '0', '1'):
        raise ValueError(
            f'{VARIABLE}={value!r}: expected 1 (the kernels run wherever they can), 0 (nowhere), or nothing (where '
            f'they were measured to win).'
        )
    return None if value == '' else value == '1'


_asked = _from_environment()


def use_kernels(enable: bool | None) -> None:
    """Switch the Triton kernels on or off, in this process, from now on.

    It counts for units in training (`ATACMe`) and for models of `fuse` that were not told otherwise. Also by the
    environment, for programs that do not know us: `TIMM_ATAC_KERNELS=1` or `0`.

    Args:
        enable: True, wherever they can run: tensors on a GPU of compute capability 8.0 or newer, float16, bfloat16 or
            float32. False, nowhere. None, where they were measured to win, which is nowhere so far.

    Raises:
        ImportError: True, and Triton is not installed, or PyTorch is older than 2.6.
    """
    global _asked
    if enable:
        check_installed()
    _asked = enable


def check_installed() -> None:
    """Raises:
    ImportError: Triton is not installed, or PyTorch is older than 2.6.
    """
    if not IS_INSTALLED:
        found = 'without' if find_spec('triton') is None else 'with'
        raise ImportError(
            f'The kernels need PyTorch 2.6 or newer with Triton, and this is {torch.__version__} {found} Triton. It '
            f'comes with PyTorch for CUDA on Linux; elsewhere leave the kernels off.'
        )


def is_wanted(operation: str, device: torch.device, channels: int | None, own: bool | None = None) -> bool:
    """Whether a kernel is to run, if it can: cheap, for it is asked in every forward pass.

    Args:
        operation: Name of the operation, as in `MEASURED_TO_WIN`.
        device: Of the tensors.
        channels: C.
        own: What was asked of this one model, None for nothing.
    """
    asked = _asked if own is None else own
    if asked is not None or not MEASURED_TO_WIN or device.type != 'cuda':
        return bool(asked)
    return channels in MEASURED_TO_WIN.get((operation, torch.cuda.get_device_capability(device)), ())


def can_run(device: torch.device) -> bool:
    """Whether Triton runs on a device: CUDA of capability 8.0 (older ones have no product in Triton that pays), or the
    CPU where Triton interprets (TRITON_INTERPRET=1, for tests)."""
    if not IS_INSTALLED:
        return False
    if device.type == 'cuda':
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == 'cpu' and IS_INTERPRETED


def layout(x: torch.Tensor) -> torch.memory_format | None:
    """How (B, C, H, W) lies in memory if it lies densely, None if it does not."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        if x.is_contiguous(memory_format=memory_format):
            return memory_format
    return None

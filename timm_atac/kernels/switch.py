"""The switch for the Triton kernels. They run if they can, and if they are enabled or were measured to be faster.

They run only if enabled: by `use_kernels(True)`, by `TIMM_ATAC_KERNELS=1`, or for one model by
`fuse(model, kernel=True)`. On an H200, units of 64 and 128 channels were faster than all other forms, and no network
was faster by more than the spread of its times (`benchmarks/log.md`). Importing this module does not import Triton.
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
    'current_choice',
    'is_wanted',
    'layout',
    'use_kernels',
]

VARIABLE = 'TIMM_ATAC_KERNELS'
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HIDDEN = 512  # above, the kernel computes hidden values several times, and two products are less work
# constants, because torch.compile would trace into these calls; the Triton of PyTorch 2.6 fails for some of the kernels
IS_INSTALLED = find_spec('triton') is not None and torch.__version__ >= '2.7'
IS_INTERPRETED = os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'on', 'yes', 'y')  # as Triton reads it

# (operation, compute capability of the GPU) -> numbers of channels for which `benchmarks/kernels.py` measured that the
# kernel makes networks faster than all other forms, at least in half precision; other kernels run only if enabled
MEASURED_TO_WIN: dict[tuple[str, tuple[int, int]], frozenset[int]] = {}

_WORDS = {'1': True, 'true': True, 'yes': True, 'on': True, '0': False, 'false': False, 'no': False, 'off': False}


def _from_environment() -> bool | str | None:
    """Return the choice in the environment, None for no choice. An unknown word is returned as it is."""
    value = os.environ.get(VARIABLE, '').lower()
    return _WORDS.get(value, value or None)


_choice = _from_environment()  # an import must not fail, so is_wanted() raises the error for an unknown word


def use_kernels(enable: bool | None) -> None:
    """Switch the Triton kernels on or off in this process.

    The switch applies to units in training (`ATACMe`), and to models of `fuse` that were created with `kernel=None`. In
    other programs, set the environment variable `TIMM_ATAC_KERNELS` to `1` or `0`.

    Args:
        enable: True: the kernels run wherever they can, for tensors on a GPU of compute capability 8.0 or newer in
            float16, bfloat16 or float32. False: they never run. None: they run where they were measured to be faster,
            which is nowhere so far.

    Raises:
        ValueError: `enable` is not True, False or None.
        ImportError: `enable` is True, and Triton is not installed, does not load, or PyTorch is older than 2.7.
    """
    global _choice
    check_choice('use_kernels', enable)
    _choice = enable


def current_choice() -> bool | str | None:
    """Return the choice of this process, as `use_kernels` takes it. An unknown word of the environment is a str."""
    return _choice


def check_choice(name: str, enable: bool | None) -> None:
    """Check an argument that enables the kernels.

    Args:
        name: Start of the message.
        enable: Value of the argument.

    Raises:
        ValueError: `enable` is not True, False or None.
        ImportError: `enable` is True, and Triton is not installed, does not load, or PyTorch is older than 2.7.
    """
    if enable is not None and not isinstance(enable, bool):
        raise ValueError(
            f'{name}: got {enable!r}, expected True (the kernels run wherever they can), False (nowhere) or None '
            f'(where they were measured to be faster).'
        )
    if not enable:
        return
    hint = 'Triton comes with PyTorch for CUDA on Linux. On other systems, do not enable the kernels.'
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
    """True if a kernel is enabled or measured to be faster. `can_run` is a separate question.

    Every forward pass calls this function, so it must be fast.

    Args:
        operation: Name of the operation, as in `MEASURED_TO_WIN`.
        device: Device of the tensors.
        channels: Channels C of the input.
        own: Choice for one model, which overrides that of the process. None for no choice.

    Raises:
        ValueError: The environment variable has an unknown value.
    """
    choice = _choice if own is None else own
    if isinstance(choice, str):
        raise ValueError(
            f'{VARIABLE}={choice!r}: expected 1 (the kernels run wherever they can), 0 (nowhere), or nothing (where '
            f'they were measured to be faster).'
        )
    if choice is not None or not MEASURED_TO_WIN:
        return bool(choice)
    if not isinstance(device, torch.device) or device.type != 'cuda':  # torch.fx passes a proxy
        return False
    return channels in MEASURED_TO_WIN.get((operation, torch.cuda.get_device_capability(device)), ())


def can_run(device: torch.device) -> bool:
    """True if the kernels can run on a device.

    They can run on NVIDIA's GPUs of compute capability 8.0 or newer. (On older ones Triton's products bring no gain,
    and for AMD's GPUs there are no tiles.) For tests they can also run on the CPU, by Triton's interpreter
    (TRITON_INTERPRET=1).
    """
    if not IS_INSTALLED:
        return False
    if device.type == 'cuda':
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == 'cpu' and IS_INTERPRETED


def layout(x: torch.Tensor) -> torch.memory_format | None:
    """Return the memory format of x, (B, C, H, W), None if x is neither channels_last nor contiguous."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        if x.is_contiguous(memory_format=memory_format):
            return memory_format
    return None

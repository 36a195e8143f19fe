"""The code, hardware, memory layout and versions that a run was computed with. Each row of the results has them."""

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import timm
import torch

import timm_atac


class Setup(NamedTuple):
    """What computed an epoch. It changes results only by rounding; the settings in `Run` change them by more.

    Attributes:
        device: Name of the GPU; or the CPU's model, its instruction set that PyTorch uses, and the number of threads.
        memory_format: 'channels_last' or 'contiguous'.
        mode: 'eager', 'compiled' or 'cuda graph'.
        commit: Of this repository, with '-dirty' if tracked files were changed; '' if it is unknown.
        data: The first twelve digits of the SHA-256 of all decoded images and labels.
        python, torch, timm, pillow: Versions. Pillow decodes JPEG.
    """

    device: str = ''
    memory_format: str = ''
    mode: str = ''
    commit: str = ''
    data: str = ''
    python: str = platform.python_version()
    torch: str = torch.__version__
    timm: str = timm.__version__
    pillow: str = ''


def join_setups(setups: Sequence[Setup]) -> Setup:
    """Return the setups of a resumed run as one. Different values are joined by ' + '."""
    parts = ([part for value in values for part in value.split(' + ')] for values in zip(*setups, strict=True))
    return Setup(*(' + '.join(dict.fromkeys(each)) for each in parts))


def device_name(device: torch.device) -> str:
    """Return the name of a GPU; or the CPU's model and instruction set, and the number of threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    model = _processor() if device.type == 'cpu' else device.type
    capability = torch.backends.cpu.get_cpu_capability()
    return f'{model}, {capability}, {torch.get_num_threads()} threads'


@functools.cache
def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def pillow_version() -> str:
    """Return the version of Pillow; '' if it is not installed."""
    try:
        return version('pillow')
    except PackageNotFoundError:
        return ''


def data_hash(tensors: Sequence[torch.Tensor]) -> str:
    """Return the first twelve digits of the SHA-256 of all values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@functools.cache
def commit() -> str:
    """Return the commit of this code in twelve digits.

    It is '' if git does not track this file, or if `timm_atac` is imported from outside this checkout. In a copy
    of a checkout, the environment variable SOURCE_COMMIT gives it.
    """
    if given := os.environ.get('SOURCE_COMMIT'):
        return given[:12]
    package = Path(timm_atac.__file__).resolve().parent
    if package.parent != Path(__file__).resolve().parents[2]:
        return ''
    try:
        _git('ls-files', '--error-unmatch', Path(__file__).name)
        changed = _git('status', '--porcelain', '--untracked-files=no', ':/')
        return _git('rev-parse', '--short=12', 'HEAD') + ('-dirty' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return ''


def _git(*command: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(['git', *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()

"""What a run was computed with: code, hardware, memory layout, versions. Each row of the results names it."""

import functools
import hashlib
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
    """What has computed an epoch. It moves results by rounding alone, where `Run` holds what moves them by more.

    Attributes:
        device: Name of the GPU; or model of the processor, its instructions that PyTorch uses, and threads.
        memory_format: 'channels_last' or 'contiguous'.
        mode: 'eager' or 'compiled'.
        commit: Of this repository, with '-dirty' where tracked files were changed; '' where it is not known.
        data: The first twelve digits of the SHA-256 of all images and labels, as they were decoded.
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


def joined(setups: Sequence[Setup]) -> Setup:
    """The setups of a run that was resumed as one: values that differ stand one after the other, with ' + ' between."""
    parts = ([part for value in values for part in value.split(' + ')] for values in zip(*setups, strict=True))
    return Setup(*(' + '.join(dict.fromkeys(each)) for each in parts))


def device_name(device: torch.device) -> str:
    """The name of a GPU; or the processor's model and instructions, and the number of threads."""
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


def pillow() -> str:
    """The version of Pillow, '' without it."""
    try:
        return version('pillow')
    except PackageNotFoundError:
        return ''


def data_hash(tensors: Sequence[torch.Tensor]) -> str:
    """The first twelve digits of the SHA-256 of all values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@functools.cache
def commit() -> str:
    """The commit of the code that runs, in twelve digits.

    '' where git does not know this file, or where `timm_atac` is imported from another place than this checkout.
    """
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

"""What a run was computed with: hardware, memory layout, compiler, versions. Each row of the results names it."""

import functools
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch


class Setup(NamedTuple):
    """What has computed an epoch. It moves results by rounding alone, where `Run` holds what moves them by more.

    Attributes:
        device: Name of the GPU, or kind of processor and threads.
        memory_format: 'channels_last' or 'contiguous'.
        mode: 'eager' or 'compiled'.
        commit: Of this repository, with '-dirty' where tracked files were changed; '' outside of a checkout.
        torch, timm: Their versions.
    """

    device: str = ''
    memory_format: str = ''
    mode: str = ''
    commit: str = ''
    torch: str = torch.__version__
    timm: str = timm.__version__


def joined(setups: Sequence[Setup]) -> Setup:
    """The setups of a run that was resumed as one: values that differ stand one after the other, with ' + ' between."""
    parts = ([part for value in values for part in value.split(' + ')] for values in zip(*setups, strict=True))
    return Setup(*(' + '.join(dict.fromkeys(each)) for each in parts))


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the kind of processor and the number of threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} {platform.machine()}, {torch.get_num_threads()} threads'


@functools.cache
def commit() -> str:
    """The commit that this file is of, in twelve digits; '' where git does not know it."""
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

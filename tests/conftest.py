"""Fixtures shared by all tests."""

import os
import subprocess
import sys
from typing import Protocol

import pytest
import torch


class Python(Protocol):
    def __call__(self, code: str, *flags: str, **env: str) -> subprocess.CompletedProcess: ...


@pytest.fixture
def python() -> Python:
    """Run code in a fresh interpreter: `python(code, *flags, **environment)`; a failure shows its output."""

    def run(code: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(('TIMM_ATAC', 'TORCH_DEVICE_BACKEND'))}
        result = subprocess.run(
            [sys.executable, *flags, '-c', code],
            env={**inherited, **env},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, f'{code}\n{result.stdout}\n{result.stderr}'
        return result

    return run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

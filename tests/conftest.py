"""Fixtures shared by all tests."""

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import forked
import pytest
import torch
import torch.nn as nn
from file_server import serve
from packaging.version import Version

os.environ.pop('TIMM_ATAC_HUB_ORG', None)  # pretrained weights are then the authors' files
os.environ.pop('TIMM_ATAC_KERNELS', None)  # tests that depend on the kernels switch them themselves
if 'PYTEST_XDIST_WORKER_COUNT' in os.environ:  # with one thread per core each, the processes would slow each other down
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ['PYTEST_XDIST_WORKER_COUNT'])))


def pytest_addoption(parser) -> None:
    parser.addoption(
        '--all-hosts', action='store_true', help="test all of timm's modules, which takes two hours on two cores"
    )
    parser.addoption(
        '--weekly',
        action='store_true',
        help='also run the long tests that the weekly workflow runs',
    )


def pytest_collection_modifyitems(config, items) -> None:
    for marker, reason in (('all_hosts', 'a large model of timm'), ('weekly', 'takes long')):
        option = f'--{marker.replace("_", "-")}'
        if not config.getoption(option):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f'{reason}, only tested with {option}'))


def pytest_terminal_summary(terminalreporter) -> None:
    """Print in the summary why the tests of timm's own scripts were skipped."""
    from stock_scripts import reason_to_skip

    skipped = {report.nodeid for report in terminalreporter.stats.get('skipped', []) if 'scripts' in report.nodeid}
    reason = reason_to_skip()
    if skipped and reason:
        terminalreporter.write_line(f'{len(skipped)} tests skipped: {reason}', yellow=True)


class Python(Protocol):
    def __call__(self, code: str, *flags: str, **env: str) -> subprocess.CompletedProcess: ...


@pytest.fixture
def python() -> Python:
    """Run code as in a new interpreter: `python(code, *flags, **environment)`. A failure shows its output.

    PyTorch is imported already; helpers/forked.py says what that means.
    """
    return partial(_python, forked.run)


@pytest.fixture
def new_python() -> Python:
    """Run code in a new interpreter, where PyTorch is not imported yet. Otherwise as `python`."""
    return partial(_python, forked.run_new)


def _python(run: Callable, code: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(('TIMM_ATAC', 'TORCH_DEVICE_BACKEND'))}
    result = run(code, flags=flags, env={**inherited, **env})
    assert result.returncode == 0, f'{code}\n{result.stdout}\n{result.stderr}'
    return result


@pytest.fixture
def run_onnx(tmp_path) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """Export a module to ONNX and run it with ONNX Runtime: `run_onnx(module, x)`."""
    onnxruntime = pytest.importorskip('onnxruntime')

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        path = str(tmp_path / 'model.onnx')
        # PyTorch 2.5's new exporter fails with BatchNorm
        torch.onnx.export(module, (x,), path, dynamo=Version(torch.__version__) >= Version('2.6'))
        session = onnxruntime.InferenceSession(path)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(y)

    return run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels_as_before(monkeypatch) -> Iterator[None]:
    """Reset `use_kernels` after the test. Convolutions in float32 do not use TF32."""
    from timm_atac import use_kernels

    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    yield
    use_kernels(None)


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A folder and the address that serves it."""
    folder = tmp_path_factory.mktemp('site')
    with serve(folder) as address:
        yield folder, address

"""Runs timm's own scripts with train_scripts/stock.py on scikit-learn's digits as images."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import stock

MODEL = 'atac_resnet14_cifar'
GREY = ('--input-size', '1', '16', '16')
RGB = ('--input-size', '3', '16', '16')  # onnx_export.py, inference.py and benchmark.py only support three channels
PIXELS = ('--mean', '0.3', '--std', '0.3')  # for every channel
DIGITS = ('--num-classes', '10', '--device', 'cpu')
SCHEDULE = ('--epochs', '2', '-b', '50', '--lr', '0.1', '--warmup-epochs', '0', '--no-aug', '-j', '1')

# train.py (timm 1.0.21 to 1.0.29.dev0) gives DistributedDataParallel the CPU as `device_ids`, which raises an error.
# As train.py's --device-modules, this module removes the argument.
CPU_DDP = """
from torch.nn.parallel import DistributedDataParallel

original = DistributedDataParallel.__init__


def without_device_ids(self, module, device_ids=None, **kwargs):
    assert all(device.type == 'cpu' for device in device_ids or ())
    original(self, module, **kwargs)


DistributedDataParallel.__init__ = without_device_ids
"""


def reason_to_skip() -> str | None:
    """Return why timm's scripts cannot run without a download, or None. A wrong TIMM_SCRIPTS fails in the tests."""
    if os.environ.get('TIMM_SCRIPTS'):
        return None
    folder = stock.cache_folder(stock.installed_version())
    if (folder / 'train.py').is_file():
        return None
    return (
        f"timm's own scripts are not in {folder}: run `python train_scripts/stock.py --where`, which downloads them, "
        'or set TIMM_SCRIPTS to a checkout of timm'
    )


def run(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Return the output of `stock.py ARGUMENTS`, including standard error.

    Raises:
        AssertionError: The script failed or printed nothing.
    """
    result = subprocess.run(
        [sys.executable, stock.__file__, *map(str, arguments)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    print('stock.py', *arguments)  # for pytest -s
    assert result.returncode == 0 and result.stdout, f'{arguments}\n{result.stdout}'
    return result.stdout


def results(output: str) -> Any:
    """Return the JSON that a script prints at its end."""
    return json.loads(output.rpartition('--result')[2])


class Run(NamedTuple):
    """The results of train.py."""

    folder: Path
    rows: list[dict[str, float]]  # of summary.csv
    output: str

    @property
    def top1(self) -> float:
        return self.rows[-1]['eval_top1']

    @property
    def last(self) -> Path:
        return self.folder / 'last.pth.tar'


def train(data: Path, folder: Path, *arguments: object, launcher: tuple[str, ...] = (), **env: str) -> Run:
    """Train with train.py on the digits in `data`. The checkpoints are written to `folder`."""
    command = (*launcher, 'train.py', '--data-dir', data, '--output', folder.parent, '--experiment', folder.name)
    output = run(*command, *arguments, cwd=folder.parent, env=env)
    with open(folder / 'summary.csv', newline='') as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    print(*(f'epoch {row["epoch"]:.0f}: top-1 {row["eval_top1"]:.2f}' for row in rows), sep=', ')
    return Run(folder, rows, output)


def validate(data: Path, checkpoint: Path, *arguments: object) -> float:
    """Return the top-1 accuracy of a checkpoint from validate.py, which rounds it to four decimals."""
    command = ('validate.py', '--data-dir', data, '--checkpoint', checkpoint, '-j', '1', *PIXELS, *DIGITS)
    top1 = results(run(*command, *arguments, cwd=checkpoint.parent))['top1']
    print(f'top-1 {top1}')
    return top1

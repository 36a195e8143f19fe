"""What the stages share: their command line, and the file to which they add rows."""

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SKIPPED = 75  # exit status of a stage if a package is missing; a row names the package


class Stage(NamedTuple):
    """The options of a stage, and its output.

    Attributes:
        name: Name of the stage, for its rows.
        device: 'cuda' or 'cpu'.
        small: True for tiny sizes, which only show that the stage runs.
        deadline: Value of `time.monotonic` at which the stage is ended.
        rows: File that rows are added to, one JSON object per line.
        images: Archive of the JPEG copy of CIFAR-10, or None.
        args: Further arguments of this stage.
    """

    name: str
    device: str
    small: bool
    deadline: float
    rows: Path
    images: Path | None
    args: list[str]

    def emit(self, table: str, **values: Any) -> None:
        """Add a row to a table, and flush it to the disk."""
        row = {'stage': self.name, 'table': table, **{key: _json_value(value) for key, value in values.items()}}
        with open(self.rows, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')
            file.flush()
            os.fsync(file.fileno())

    def skip(self, what: str, reason: str) -> None:
        self.emit('skipped', what=what, reason=reason)

    def _exit_if_gpu_failed(self) -> None:
        """Exit if the GPU no longer works in this process, as after an illegal memory access."""
        if self.device == 'cuda':
            import torch

            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                self.emit('errors', what='the rest of this process', error=str(error)[:300])
                sys.exit(1)

    def seconds_left(self) -> float:
        """Seconds until the stage is ended."""
        return self.deadline - time.monotonic()

    def disable_compiler_if_small(self) -> None:
        """In a small run, let compiled modules run eagerly, since compiling takes most of the time."""
        import torch  # not at the top: benchmarks/gpu.py imports this module

        if self.small and hasattr(torch.compiler, 'set_stance'):  # since PyTorch 2.6
            torch.compiler.set_stance('force_eager')
            self.skip('torch.compile', 'a small run only compiles units')

    def attempt(self, what: str, run: Callable[[], object]) -> bool:
        """Run a part of the stage. If it raises an exception, add a row and continue.

        Returns:
            True if the part raised no exception.
        """
        try:
            run()
        except ModuleNotFoundError as error:
            self.skip(what, str(error))
        except Exception as error:
            traceback.print_exc()
            self.emit('errors', what=what, error=f'{type(error).__name__}: {error}'[:300])
            self._exit_if_gpu_failed()
        else:
            return True
        return False


def _json_value(value: Any) -> Any:
    """Return a value that JSON can represent, floats rounded to five digits."""
    if isinstance(value, float):
        return float(f'{value:.5g}') if math.isfinite(value) else str(value)
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, without an incomplete last line."""
    rows = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def main(name: str, run: Callable[[Stage], None]) -> None:
    """Run a stage as a program."""
    parser = argparse.ArgumentParser(prog=f'gpu_stages.{name}')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--seconds', type=float, default=600.0)
    parser.add_argument('--rows', type=Path, required=True)
    parser.add_argument('--images', type=Path)
    parser.add_argument('args', nargs='*')
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    stage = Stage(name, args.device, args.small, deadline, args.rows, args.images, args.args)
    try:
        run(stage)
    except ModuleNotFoundError as error:
        stage.skip(' '.join([name, *args.args]), str(error))
        sys.exit(SKIPPED)

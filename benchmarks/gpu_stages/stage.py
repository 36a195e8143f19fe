"""What the stages share: their command line, and rows that are in a file as soon as they are there."""

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

SKIPPED = 75  # exit status of a stage that lacks a package; its row says which


class Stage(NamedTuple):
    """How a stage is run.

    Attributes:
        name: Of the stage, for its rows.
        device: 'cuda' or 'cpu'.
        small: Whether tiny sizes are to show that everything runs, instead of measuring it.
        deadline: When it is ended, by `time.monotonic`.
        rows: File that rows are added to, one JSON object a line.
        images: Archive of the JPEG copy of CIFAR-10, None for none.
        args: Arguments that are the stage's own.
    """

    name: str
    device: str
    small: bool
    deadline: float
    rows: Path
    images: Path | None
    args: list[str]

    def emit(self, table: str, **values: Any) -> None:
        """Add a row to a table, for good."""
        row = {'stage': self.name, 'table': table, **{key: _plain(value) for key, value in values.items()}}
        with open(self.rows, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')
            file.flush()
            os.fsync(file.fileno())

    def skip(self, what: str, reason: str) -> None:
        self.emit('skipped', what=what, reason=reason)

    def _check_card(self) -> None:
        """After an illegal access a process can do nothing more on its card: end it."""
        if self.device == 'cuda':
            import torch

            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                self.emit('errors', what='the rest of this process', error=str(error)[:300])
                sys.exit(1)

    def left(self) -> float:
        """Seconds until the stage is ended."""
        return self.deadline - time.monotonic()

    def compile_as_far_as_wanted(self) -> None:
        """In a small run, what is to be compiled runs eagerly: a compiler takes longer than all else."""
        import torch  # benchmarks/gpu.py reads rows without it

        if self.small and hasattr(torch.compiler, 'set_stance'):  # since PyTorch 2.6
            torch.compiler.set_stance('force_eager')
            self.skip('torch.compile', 'a small run compiles units alone')

    def attempt(self, what: str, run: Callable[[], object]) -> bool:
        """Run a part of the stage; an exception is a row, and ends this part alone.

        Returns:
            True if there was none.
        """
        try:
            run()
        except ModuleNotFoundError as error:
            self.skip(what, str(error))
        except Exception as error:
            traceback.print_exc()
            self.emit('errors', what=what, error=f'{type(error).__name__}: {error}'[:300])
            self._check_card()
        else:
            return True
        return False


def _plain(value: Any) -> Any:
    """A value that JSON has; numbers in five digits."""
    if isinstance(value, float):
        return float(f'{value:.5g}') if math.isfinite(value) else str(value)
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are there; a last line that a kill cut off is left out."""
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

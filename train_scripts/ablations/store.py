"""A results folder that several processes may share: rows of finished runs, checkpoints, and locks of claimed runs."""

import csv
import io
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

try:
    from filelock import FileLock, Timeout
except ImportError as error:
    raise ImportError(f'The results folder needs filelock ({error}): pip install filelock') from error

from ablations.grid import Run
from ablations.provenance import Setup
from timm_atac._files import replaced_file
from timm_atac.utils.words import counted, shortened


class Result(NamedTuple):
    """The results of a run."""

    params: int
    train_loss: float  # mean of the last epoch
    test_loss: float  # after the last epoch
    accuracy: float  # top-1 on the test set after the last epoch, in per cent
    best_accuracy: float  # highest of all epochs
    seconds: float  # wall-clock time; includes time in which the process was stopped
    cpu_seconds: float  # CPU time of the first process
    finished: str  # date and time in UTC


class Row(NamedTuple):
    """A finished run, which is one row of the CSV file."""

    run: Run
    result: Result
    setup: Setup = Setup()


class StoreError(Exception):
    """The results folder cannot be used."""


_PARTS: tuple[Any, ...] = (Run, Result, Setup)
_TYPES = {name: kind for part in _PARTS for name, kind in part.__annotations__.items()}
COLUMNS = tuple(_TYPES)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file.

    Raises:
        StoreError: The file has other columns, or a value has the wrong type for its column.
        OSError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise StoreError(f'{path} is not a CSV file of ablation.py: {error}') from None
    lines = csv.reader(io.StringIO(text, newline=''))
    header = next(lines, [])
    if tuple(header) != COLUMNS:
        missing = [name for name in COLUMNS if name not in header]
        surplus = [name for name in header if name not in COLUMNS]
        faults = {'missing': missing, 'unknown': surplus}
        problem = '; '.join(f'{what} {", ".join(shortened(names))}' for what, names in faults.items() if names)
        raise StoreError(f'{path} has other columns than a CSV file of ablation.py: {problem or "another order"}.')
    return [_parse(values, f'{path}, line {lines.line_num}') for values in lines]


def _parse(values: list[str], where: str) -> Row:
    if len(values) != len(COLUMNS):
        raise StoreError(f'{where}: {counted(len(values), "value")}, expected {len(COLUMNS)}.')
    parsed: list[Any] = []
    for name, text in zip(COLUMNS, values, strict=True):
        kind = _TYPES[name]
        try:
            parsed.append({'True': True, 'False': False}[text] if kind is bool else kind(text))
        except (KeyError, ValueError):
            raise StoreError(f'{where}: {name} is {text!r}, expected a value like {kind.__name__}.') from None
    rest = iter(parsed)
    parts: Any = (part(*itertools.islice(rest, len(part._fields))) for part in _PARTS)
    return Row(*parts)


class Store:
    """A results folder.

    Args:
        folder: Its path. It is created if it does not exist.

    Raises:
        StoreError: `folder` cannot be created, or its CSV file is not one of ablation.py.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.csv = folder / 'ablation.csv'
        try:
            (folder / '.locks').mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f'{folder} cannot be a results folder: {error}') from None
        self.rows()

    def rows(self) -> list[Row]:
        return read_rows(self.csv) if self.csv.exists() else []

    def has_row(self, run: Run) -> bool:
        return any(row.run == run for row in self.rows())

    def checkpoint(self, run: Run) -> Path:
        return self.folder / 'checkpoints' / f'{run.name}.safetensors'

    def curve(self, run: Run) -> Path:
        """Return the path of the CSV file with the run's curves."""
        return self.folder / 'curves' / f'{run.name}.csv'

    def network_folder(self, run: Run) -> Path:
        """Return the folder that `--export` writes the network to."""
        return self.folder / run.name

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Lock a run for this process until the end of the block.

        Yields True if this process may train it: no other process has locked it, and it has no row yet. The lock of a
        process that is killed is released.
        """
        lock = FileLock(self.folder / '.locks' / f'{run.name}.lock')
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            done = self.has_row(run)
            self._clean_up(run, done)
            yield not done
        finally:
            lock.release()

    def _clean_up(self, run: Run, done: bool) -> None:
        """Remove the unfinished files of a killed process, and the checkpoint of a finished run."""
        checkpoint = self.checkpoint(run)
        unfinished = (file for path in (checkpoint, self.curve(run)) for file in path.parent.glob(f'.{path.name}.*'))
        for leftover in (*unfinished, *[checkpoint] * done):
            leftover.unlink(missing_ok=True)
        for folder in self.folder.glob(f'.{run.name}.*'):  # an unfinished export
            shutil.rmtree(folder)

    def append(self, row: Row) -> None:
        """Add a row to the CSV file in one atomic write, and remove the run's checkpoint."""
        with FileLock(self.folder / '.locks' / 'csv.lock'):
            for leftover in self.folder.glob(f'.{self.csv.name}.*'):
                leftover.unlink()
            text = io.StringIO()
            writer = csv.writer(text, lineterminator='\n')
            writer.writerow(COLUMNS)
            writer.writerows([*run, *result, *setup] for run, result, setup in [*self.rows(), row])
            with replaced_file(self.csv) as file:
                file.write(text.getvalue().encode())
        self.checkpoint(row.run).unlink(missing_ok=True)

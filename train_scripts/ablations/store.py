"""A results folder that several processes may share: rows of finished runs, checkpoints and claims of the others."""

import csv
import io
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ablations.grid import Run
from ablations.provenance import Setup
from timm_atac._files import replaced_file


class Result(NamedTuple):
    """What came out of a run."""

    params: int
    train_loss: float  # mean over the last epoch
    test_loss: float  # after the last epoch
    accuracy: float  # per cent of the test set, after the last epoch
    best_accuracy: float  # of all epochs
    seconds: float  # of the clock; the time in which a process was stopped counts
    cpu_seconds: float  # that processors worked, in the first process
    finished: str  # day and time, UTC


class Row(NamedTuple):
    """A finished run, as it stands in the CSV file."""

    run: Run
    result: Result
    setup: Setup = Setup()


class StoreError(Exception):
    """A results folder that cannot be used."""


_PARTS: tuple[Any, ...] = (Run, Result, Setup)
_TYPES = {name: kind for part in _PARTS for name, kind in part.__annotations__.items()}
COLUMNS = tuple(_TYPES)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        StoreError: It has other columns, or a value that does not fit its column.
        OSError: It cannot be read.
    """
    try:
        text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise StoreError(f'{path} is no CSV file of ablation.py: {error}') from None
    lines = csv.reader(io.StringIO(text, newline=''))
    header = next(lines, [])
    if tuple(header) != COLUMNS:
        raise StoreError(f'{path} has the columns {",".join(header)!r}, expected {",".join(COLUMNS)!r}.')
    return [_parse(values, f'{path}, line {lines.line_num}') for values in lines]


def _parse(values: list[str], where: str) -> Row:
    if len(values) != len(COLUMNS):
        raise StoreError(f'{where}: {len(values)} values, expected {len(COLUMNS)}.')
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
        folder: Made if it is not there.

    Raises:
        StoreError: `folder` cannot be one, or has a CSV file that is not ours.
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

    def has(self, run: Run) -> bool:
        return any(row.run == run for row in self.rows())

    def checkpoint(self, run: Run) -> Path:
        return self.folder / 'checkpoints' / f'{run.name}.safetensors'

    def curve(self, run: Run) -> Path:
        """Where the run's accuracy after each epoch is."""
        return self.folder / 'curves' / f'{run.name}.csv'

    def network(self, run: Run) -> Path:
        """Where `--export` writes the network."""
        return self.folder / run.name

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Whether the run is this process's to do, until the end of the block: no other has it, and it has no row yet.

        The claim of a process that dies dies with it.
        """
        lock = FileLock(self.folder / '.locks' / f'{run.name}.lock')
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            done = self.has(run)
            self._clean_up(run, done)
            yield not done
        finally:
            lock.release()

    def _clean_up(self, run: Run, done: bool) -> None:
        """Remove what a process left that died while it wrote, or between a row and the checkpoint."""
        checkpoint = self.checkpoint(run)
        begun = (file for path in (checkpoint, self.curve(run)) for file in path.parent.glob(f'.{path.name}.*'))
        for leftover in (*begun, *[checkpoint] * done):
            leftover.unlink(missing_ok=True)
        for folder in self.folder.glob(f'.{run.name}.*'):  # of an export
            shutil.rmtree(folder)

    def append(self, row: Row) -> None:
        """Add a row, for good and whole, and remove the run's checkpoint."""
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

"""Runs ablation.py in the test's process. It needs the packages of the extra 'ablation'."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ablation
import matplotlib  # noqa: F401  # every run needs it
import sklearn  # noqa: F401  # the digits need it
from ablations.store import Row, read_rows
from ablations.trainer import Progress, Trainer


def run(*arguments: Any) -> int:
    """Run ablation.py with these arguments, and return its exit status."""
    return ablation.main([str(argument) for argument in arguments])


def rows(folder: Path) -> list[Row]:
    """Return the rows of a results folder."""
    return read_rows(folder / 'ablation.csv')


@contextmanager
def interrupted_after(epoch: int) -> Iterator[None]:
    """Within the block, runs are interrupted when an epoch is logged and its checkpoint is not yet written."""
    fit = Trainer.fit

    def interrupted_fit(trainer: Trainer, checkpoint: Path, after_epoch: Any) -> Progress:
        def interrupt(progress: Progress) -> None:
            after_epoch(progress)
            if progress.epoch == epoch:
                raise KeyboardInterrupt

        return fit(trainer, checkpoint, interrupt)

    with mock.patch.object(Trainer, 'fit', interrupted_fit):
        yield

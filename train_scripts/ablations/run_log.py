"""Curves of a run: always as a CSV file, and for TensorBoard and Weights & Biases where they are asked for."""

import csv
import io
import secrets
from pathlib import Path
from typing import Any, Protocol

from ablations.grid import Run
from ablations.trainer import Progress
from timm_atac._files import replaced_file


class LogError(Exception):
    """Curves that cannot be kept."""


class Log(Protocol):
    def log(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class CsvLog:
    """A line an epoch in a file; the lines of a run that is resumed are kept."""

    def __init__(self, path: Path, first_epoch: int) -> None:
        self._path = path
        self._lines: list[list[Any]] = []
        if first_epoch and self._path.exists():
            with open(self._path, newline='', encoding='utf-8') as file:
                # what a killed run had written of the epochs that come again is left out
                self._lines = [*csv.reader(file)][: first_epoch + 1]

    def log(self, progress: Progress) -> None:
        times = {'seconds': round(progress.seconds, 2), 'cpu_seconds': round(progress.cpu_seconds, 2)}
        scalars = {'epoch': progress.epoch, **_scalars(progress), **times}
        self._lines = [*(self._lines or [[*scalars]]), [*scalars.values()]]
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows(self._lines)
        with replaced_file(self._path) as file:
            file.write(text.getvalue().encode())

    def close(self) -> None:
        pass


class TensorBoardLog:
    """Scalars in a folder of the run.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, run: Run, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run had written of the epochs that come again is taken out
        self._writer = SummaryWriter(str(folder / run.name), purge_step=first_epoch + 1)

    def log(self, progress: Progress) -> None:
        for name, value in _scalars(progress).items():
            self._writer.add_scalar(name, value, progress.epoch)
        self._writer.flush()  # it keeps them for two minutes otherwise

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """A run of Weights & Biases, which goes on there where it goes on here.

    Raises:
        LogError: It cannot be begun.
    """

    def __init__(self, folder: Path, run: Run, project: str | None) -> None:
        import wandb

        identifier = folder / 'wandb' / f'{run.name}.id'
        identifier.parent.mkdir(parents=True, exist_ok=True)
        if not identifier.exists():
            identifier.write_text(secrets.token_hex(8))
        try:
            self._run: Any = wandb.init(
                project=project or 'timm_atac',
                name=run.name,
                id=identifier.read_text(),
                resume='allow',
                config=run._asdict(),
                dir=str(folder),
            )
        except Exception as error:  # of login, network or settings
            raise LogError(f'Weights & Biases: {error}') from None

    def log(self, progress: Progress) -> None:
        self._run.log(_scalars(progress), step=progress.epoch)

    def close(self) -> None:
        self._run.finish()


def _scalars(progress: Progress) -> dict[str, float]:
    return {
        'train/loss': progress.train_loss,
        'eval/loss': progress.test_loss,
        'eval/top1': progress.accuracy,
        'lr': progress.lr,
    }

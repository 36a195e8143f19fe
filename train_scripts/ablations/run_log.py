"""Write the curves of a run to a CSV file, and on request to TensorBoard and Weights & Biases."""

import csv
import io
import secrets
from pathlib import Path
from typing import Any, Protocol

from ablations.grid import Run
from ablations.trainer import Progress
from timm_atac._files import replaced_file


class LogError(Exception):
    """The curves cannot be written."""


class Log(Protocol):
    def log(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class CsvLog:
    """Writes one line per epoch to a CSV file. A resumed run keeps its lines."""

    def __init__(self, path: Path, first_epoch: int) -> None:
        self._path = path
        self._lines: list[list[Any]] = []
        if first_epoch and self._path.exists():
            with open(self._path, newline='', encoding='utf-8') as file:
                # the epochs that a killed run trains again are left out
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
    """Writes scalars to a TensorBoard folder of the run.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, run: Run, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # the epochs that a killed run trains again are removed
        self._writer = SummaryWriter(str(folder / run.name), purge_step=first_epoch + 1)

    def log(self, progress: Progress) -> None:
        for name, value in _scalars(progress).items():
            self._writer.add_scalar(name, value, progress.epoch)
        self._writer.flush()  # else it writes only every two minutes

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """Sends scalars to a run of Weights & Biases, which is resumed together with our run.

    Raises:
        LogError: The run cannot be started.
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
        except Exception as error:  # login, network or settings
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

"""Curves of a run for TensorBoard and Weights & Biases, where they are asked for."""

import secrets
from pathlib import Path
from typing import Any, Protocol

from grid import Run
from training import Progress


class LogError(Exception):
    """Curves that cannot be kept."""


class Log(Protocol):
    def log(self, progress: Progress, lr: float) -> None: ...

    def close(self) -> None: ...


class TensorBoardLog:
    """Scalars in a folder of the run.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, run: Run, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run had written of the epochs that come again is taken out
        self._writer = SummaryWriter(str(folder / run.name), purge_step=first_epoch + 1)

    def log(self, progress: Progress, lr: float) -> None:
        for name, value in _scalars(progress, lr).items():
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

    def log(self, progress: Progress, lr: float) -> None:
        self._run.log(_scalars(progress, lr), step=progress.epoch)

    def close(self) -> None:
        self._run.finish()


def _scalars(progress: Progress, lr: float) -> dict[str, float]:
    return {'train/loss': progress.train_loss, 'eval/top1': progress.accuracy, 'lr': lr}

#!/usr/bin/env python
"""Reproduce the paper's ablations: train CIFAR networks of b = 1 to 5 blocks per stage with different activations.

The networks are those of Tables 2 and 3 of `Attention as Activation` (https://arxiv.org/abs/2007.07729) and of its
figures. They train on CIFAR by the authors' recipe, or as a small version on scikit-learn's digits: 1,797 real scans of
8x8, 1,000 of them for training. Each finished run adds a row to a CSV file. Tables and plots are written at the end. If
the program was killed, the same command resumes it.

    python train_scripts/ablation.py --blocks 1 2 --seeds 5
    python train_scripts/ablation.py --datasets cifar10-jpeg --recipe short --acts relu atac --seeds 3
    python train_scripts/ablation.py --datasets cifar10 cifar100 --blocks 1 2 3 4 --amp --channels-last --download
    torchrun --nproc-per-node 4 train_scripts/ablation.py --datasets cifar100
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from ablations.grid import Run, create_model
from ablations.image_data import DataError, ImageData, hold_out, load
from ablations.network_folder import write_folder
from ablations.options import parse_args, selected_runs
from ablations.provenance import commit
from ablations.run_log import CsvLog, Log, LogError, TensorBoardLog, WandbLog
from ablations.store import Result, Row, Store, StoreError
from ablations.tables import all_tables, write_tables
from ablations.trainer import CheckpointError, Machine, Progress, Trainer
from timm.utils import init_distributed_device
from tqdm import tqdm

from timm_atac.utils.words import counted


def set_up(args: argparse.Namespace) -> Machine:
    """Initialize torchrun's process group if there is one, and return the device and rank of this process."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:  # set by torchrun; SLURM alone starts independent processes
        init_distributed_device(args)  # sets device, rank, local_rank and world_size of args
    else:
        args.rank, args.local_rank, args.world_size = 0, 0, 1
    torch.backends.cudnn.benchmark = True  # all batches have the same size
    if not commit() and args.rank == 0:  # `commit` keeps its first result, also if another commit is checked out later
        print(
            'The rows will have no commit: this is not a git checkout, or timm_atac is imported from elsewhere.',
            file=sys.stderr,
        )
    device = torch.device(args.device)
    # on a GPU, neither memory layout nor compiler has been measured yet
    channels_last = device.type == 'cpu' if args.channels_last is None else args.channels_last
    return Machine(device, args.rank, args.world_size, channels_last, args.compile, args.cuda_graph)


def load_all(todo: list[Run], args: argparse.Namespace, machine: Machine) -> dict[str, ImageData]:
    """Load the data sets of the runs onto the device. Only the first process of each machine downloads."""
    sizes = {run.dataset: run.size for run in todo}
    others_wait = args.download and machine.processes > 1
    if others_wait and args.local_rank > 0:
        dist.barrier()
    data = {
        name: hold_out(load(name, size, args.data_dir, args.download and args.local_rank == 0), args.hold_out)
        for name, size in sizes.items()
    }
    if others_wait and args.local_rank == 0:
        dist.barrier()
    return {name: images.to(machine.device) for name, images in data.items()}


def check_runs(todo: list[Run], data: dict[str, ImageData], store: Store, export: bool) -> None:
    """Raise an error if one of the runs cannot be trained or exported."""
    for run in todo:
        images = data[run.dataset]
        count = len(images.train[0])
        if not 2 * run.processes <= run.batch_size <= count or run.batch_size % run.processes:
            raise DataError(
                f'--batch-size {run.batch_size} with {count} training images in {run.processes} process(es): expected '
                f'a multiple of {run.processes} between {2 * run.processes} and {count}.'
            )
        # the row is looked up last: another process may finish the run in the meantime
        folder = store.network_folder(run)
        if export and folder.exists() and not store.checkpoint(run).exists() and not store.has_row(run):
            raise StoreError(f'{folder} exists, but its run has no row: remove the folder.')
    for run in {r._replace(seed=0): r for r in todo}.values():
        images = data[run.dataset]
        try:
            with torch.device('meta'):
                create_model(run, len(images.classes), images.in_chans, images.mean, images.std)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f'{run.activation}: timm cannot build the network with it: {error}') from None


@contextmanager
def claim(run: Run, store: Store, machine: Machine) -> Iterator[bool]:
    """Call `Store.claim` in the first process, and yield its result in every process."""
    with store.claim(run) if machine.rank == 0 else nullcontext(False) as is_claimed:
        yield broadcast_flags([is_claimed], machine)[0]


def broadcast_flags(flags: list[bool], machine: Machine) -> list[bool]:
    """Return the first process's flags in every process."""
    if machine.processes == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.uint8, device=machine.device)
    dist.broadcast(tensor, 0)
    return tensor.bool().tolist()


def train(run: Run, data: ImageData, store: Store, machine: Machine, args: argparse.Namespace) -> Row:
    """Train one network, export it if --export is given, and add its row."""
    trainer = Trainer(run, data, machine)
    checkpoint = store.checkpoint(run)
    if checkpoint.exists():
        trainer.load(checkpoint)
    trainer.check_same_epoch(checkpoint)
    first = trainer.progress.epoch
    label = f'{run.activation} b={run.blocks} seed={run.seed}'
    progress = tqdm(
        total=run.epochs, initial=first, desc=label, leave=False, unit='epoch', disable=_hide_progress(machine)
    )
    with progress, ExitStack() as stack:
        logs = _logs(run, store, first, args) if machine.rank == 0 else []
        for log in logs:
            stack.callback(log.close)

        def after_epoch(now: Progress) -> None:
            progress.update()
            progress.set_postfix(loss=f'{now.train_loss:.3f}', top1=f'{now.accuracy:.2f}')
            for log in logs:
                log.log(now)

        end = trainer.fit(checkpoint, after_epoch)
    result = Result(
        params=sum(p.numel() for p in trainer.model.parameters()),
        train_loss=round(end.train_loss, 4),
        test_loss=round(end.test_loss, 4),
        accuracy=round(end.accuracy, 3),
        best_accuracy=round(end.best_accuracy, 3),
        seconds=round(end.seconds, 2),
        cpu_seconds=round(end.cpu_seconds, 2),
        finished=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )
    row = Row(run, result, trainer.setup)
    if machine.rank == 0:
        if args.export and not store.network_folder(run).exists():  # a killed process may have written it
            write_folder(trainer.model.cpu(), store.network_folder(run), row, data)
        store.append(row)
    return row


def _logs(run: Run, store: Store, first_epoch: int, args: argparse.Namespace) -> list[Log]:
    logs: list[Log] = [CsvLog(store.curve(run), first_epoch)]
    if args.log_tensorboard:
        logs.append(TensorBoardLog(store.folder / 'tensorboard', run, first_epoch))
    if args.log_wandb:
        logs.append(WandbLog(store.folder, run, args.wandb_project))
    return logs


def _hide_progress(machine: Machine) -> bool | None:
    """Return `disable` for tqdm. None hides the progress bar if the output is not a terminal."""
    return True if machine.rank > 0 else None


def report(selected: list[Run], trained: list[Run], store: Store, interrupted: bool, export: bool) -> None:
    """Print which runs are finished, and write tables and plots of all rows."""
    rows = store.rows()
    missing = {*selected} - {row.run for row in rows}
    of = f'of {counted(len(selected), "run")}'
    if interrupted:
        print(f'\nInterrupted; unfinished: {len(missing)} {of}; the same command resumes them.', file=sys.stderr)
    else:
        if len(trained) + len(missing) < len(selected):
            print(f'Finished already: {len(selected) - len(trained) - len(missing)} {of}.', file=sys.stderr)
        if missing:
            print(f'Still trained by other processes: {len(missing)} {of}.', file=sys.stderr)
    if not rows:
        return
    text = all_tables(rows)
    print(f'\n{text}\n\nRows: {store.csv}')
    for path in write_tables(rows, text, store.folder):
        print(f'{"Plot" if path.suffix == ".png" else "Tables"}: {path}')
    if export:
        _report_networks([run for run in selected if run not in missing], store)


def _report_networks(finished: list[Run], store: Store) -> None:
    folders = [folder for run in finished if (folder := store.network_folder(run)).exists()]
    for folder in folders:
        print(f'Network: {folder}')
    if len(folders) < len(finished):
        print(
            f'Finished without --export, so without a network: {counted(len(finished) - len(folders), "run")}. To '
            f'train again, remove the rows from {store.csv}.',
            file=sys.stderr,
        )


def train_all(
    todo: list[Run], data: dict[str, ImageData], store: Store, machine: Machine, args: argparse.Namespace
) -> tuple[list[Run], bool]:
    """Train all runs that no other process trains.

    Returns:
        The runs that were trained, and True if the user interrupted.
    """
    trained: list[Run] = []
    # twice: a process that trained a run in the first pass may have been killed
    with tqdm(total=len(todo), unit='run', disable=_hide_progress(machine)) as progress:
        try:
            for run in [*todo, *todo]:
                if run in trained:
                    continue
                with claim(run, store, machine) as is_claimed:
                    if is_claimed:
                        row = train(run, data[run.dataset], store, machine, args)
                        progress.set_postfix_str(f'{run.activation} b={run.blocks}: {row.result.accuracy:.2f}')
                        progress.update()
                        trained.append(run)
                        if machine.rank == 0 and progress.disable:
                            print(f'{run.name}: {row.result.accuracy:.2f} %', file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            return trained, True
    return trained, False


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(__doc__, argv)
    interrupted = False
    try:
        machine = set_up(args)
        selected = selected_runs(args, machine.processes)
        store = Store(args.output)
        finished = {row.run for row in store.rows()}
        # broadcast, since other programs may add rows in the meantime
        unfinished = broadcast_flags([run not in finished for run in selected], machine)
        todo = [run for run, is_unfinished in zip(selected, unfinished, strict=True) if is_unfinished]
        data = load_all(todo, args, machine)
        check_runs(todo, data, store, args.export)
        trained, interrupted = train_all(todo, data, store, machine, args)
        if machine.rank == 0:
            report(selected, trained, store, interrupted, args.export)
    except (CheckpointError, DataError, LogError, OSError, StoreError) as error:
        sys.exit(f'{Path(__file__).name}: error: {error}')
    if machine.processes > 1 and not interrupted:
        dist.destroy_process_group()
    return 130 if interrupted else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

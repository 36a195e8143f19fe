#!/usr/bin/env python
"""The paper's ablations: CIFAR networks of b = 1 to 4 blocks a stage, one activation after the other.

Trains the networks of Tables 2 and 3 of `Attention as Activation` (https://arxiv.org/abs/2007.07729) and of its
figures on CIFAR by the authors' recipe, or in miniature on scikit-learn's digits: 1,797 real scans of 8x8, 1,000 to
train. A row a run goes to a CSV file when the run is done; then come tables and plots. The same command goes on where
it was killed.

    python train_scripts/ablation.py --blocks 1 2 --seeds 5
    python train_scripts/ablation.py --datasets cifar10-jpeg --recipe short --acts relu atac --seeds 3
    python train_scripts/ablation.py --datasets cifar10 cifar100 --blocks 1 2 3 4 --amp --channels-last --download
    torchrun --nproc-per-node 4 train_scripts/ablation.py --datasets cifar100
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from ablations.grid import Run, create_model
from ablations.image_data import DataError, ImageData, hold_out, load
from ablations.network_folder import write_folder
from ablations.options import parse_args, runs
from ablations.provenance import commit
from ablations.run_log import CsvLog, Log, LogError, TensorBoardLog, WandbLog
from ablations.store import Result, Row, Store, StoreError
from ablations.tables import tables, write
from ablations.trainer import CheckpointError, Machine, Progress, Trainer
from timm.utils import init_distributed_device
from tqdm import tqdm


def set_up(args: argparse.Namespace) -> Machine:
    """This process's device, and its place among those of torchrun."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:  # torchrun's; a job of SLURM alone is no reason to wait for others
        init_distributed_device(args)  # puts device, rank, local_rank and world_size into args
    else:
        args.rank, args.local_rank, args.world_size = 0, 0, 1
    torch.backends.cudnn.benchmark = True  # all batches are of one size
    if not commit() and args.rank == 0:  # that of the code that runs, whatever is checked out later
        print('The rows will name no commit: this is no checkout, or timm_atac is not of it.', file=sys.stderr)
    device = torch.device(args.device)
    # on a GPU neither layout nor compiler has been measured yet
    channels_last = device.type == 'cpu' if args.channels_last is None else args.channels_last
    return Machine(device, args.rank, args.world_size, channels_last, args.compile)


def load_all(todo: list[Run], args: argparse.Namespace, machine: Machine) -> dict[str, ImageData]:
    """The data sets of the runs, on the device; the first process of each machine downloads."""
    sizes = {run.dataset: run.size for run in todo}
    waits = args.download and machine.processes > 1
    if waits and args.local_rank > 0:
        dist.barrier()
    data = {
        name: hold_out(load(name, size, args.data_dir, args.download and args.local_rank == 0), args.hold_out)
        for name, size in sizes.items()
    }
    if waits and args.local_rank == 0:
        dist.barrier()
    return {name: images.to(machine.device) for name, images in data.items()}


def check(todo: list[Run], data: dict[str, ImageData], store: Store, export: bool) -> None:
    """Whatever cannot be trained fails before anything is."""
    for run in todo:
        images = data[run.dataset]
        count = len(images.train[0])
        if not 2 * run.processes <= run.batch_size <= count or run.batch_size % run.processes:
            raise DataError(
                f'--batch-size {run.batch_size} with {count} training images in {run.processes} process(es): expected '
                f'a multiple of {run.processes} from {2 * run.processes} to {count}.'
            )
        # asked in this order, a process that finishes the run meanwhile is no error
        if export and store.network(run).exists() and not store.checkpoint(run).exists() and not store.has(run):
            raise StoreError(f'{store.network(run)} is there already, without a row: remove it.')
    for run in {r._replace(seed=0): r for r in todo}.values():
        images = data[run.dataset]
        try:
            with torch.device('meta'):
                create_model(run, len(images.classes), images.in_chans, images.mean, images.std)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f'{run.activation}: timm cannot build the network with it: {error}') from None


@contextmanager
def claimed(run: Run, store: Store, machine: Machine) -> Iterator[bool]:
    """`Store.claim` of the first process, told to all."""
    if machine.rank == 0:
        with store.claim(run) as mine:
            yield agreed([mine], machine)[0]
    else:
        yield agreed([False], machine)[0]


def agreed(flags: list[bool], machine: Machine) -> list[bool]:
    """What the first process says, in every process."""
    if machine.processes == 1:
        return flags
    said = torch.tensor(flags, dtype=torch.uint8, device=machine.device)
    dist.broadcast(said, 0)
    return said.bool().tolist()


def train(run: Run, data: ImageData, store: Store, machine: Machine, args: argparse.Namespace) -> Row:
    """Train one network, write it if that is asked for, and add its row."""
    trainer = Trainer(run, data, machine)
    checkpoint = store.checkpoint(run)
    if checkpoint.exists():
        trainer.load(checkpoint)
    trainer.agree(checkpoint)
    first = trainer.progress.epoch
    label = f'{run.activation} b={run.blocks} seed={run.seed}'
    progress = tqdm(total=run.epochs, initial=first, desc=label, leave=False, unit='epoch', disable=_no_bars(machine))
    with progress, ExitStack() as closed:
        logs = _logs(run, store, first, args) if machine.rank == 0 else []
        for log in logs:
            closed.callback(log.close)

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
        if args.export and not store.network(run).exists():  # a killed process may have come this far
            write_folder(trainer.model.cpu(), store.network(run), row, data)
        store.append(row)
    return row


def _logs(run: Run, store: Store, first_epoch: int, args: argparse.Namespace) -> list[Log]:
    logs: list[Log] = [CsvLog(store.curve(run), first_epoch)]
    if args.log_tensorboard:
        logs.append(TensorBoardLog(store.folder / 'tensorboard', run, first_epoch))
    if args.log_wandb:
        logs.append(WandbLog(store.folder, run, args.wandb_project))
    return logs


def _no_bars(machine: Machine) -> bool | None:
    """For tqdm: None is no bars in a log file, which gets a line a run instead."""
    return True if machine.rank > 0 else None


def report(asked: list[Run], trained: list[Run], store: Store, interrupted: bool, export: bool) -> None:
    """Say what was done and what was not, and write tables and plots of all rows."""
    rows = store.rows()
    missing = {*asked} - {row.run for row in rows}
    if interrupted:
        print(
            f'\nInterrupted: {len(missing)} of {len(asked)} runs are left; the same command goes on.', file=sys.stderr
        )
    else:
        if len(trained) + len(missing) < len(asked):
            count = len(asked) - len(trained) - len(missing)
            print(f'{count} of {len(asked)} runs had been done already.', file=sys.stderr)
        if missing:
            print(f'{len(missing)} of {len(asked)} runs are left to the processes that are at them.', file=sys.stderr)
    if not rows:
        return
    text = tables(rows)
    print(f'\n{text}\n\nRows: {store.csv}')
    for path in write(rows, text, store.folder):
        print(f'{"Plot" if path.suffix == ".png" else "Tables"}: {path}')
    if export:
        _report_networks([run for run in asked if run not in missing], store)


def _report_networks(done: list[Run], store: Store) -> None:
    networks = [store.network(run) for run in done if store.network(run).exists()]
    for path in networks:
        print(f'Network: {path}')
    if len(networks) < len(done):
        print(
            f'{len(done) - len(networks)} finished runs have no network, since none was asked for: remove their rows '
            f'from {store.csv}, and they are trained again.',
            file=sys.stderr,
        )


def train_all(
    todo: list[Run], data: dict[str, ImageData], store: Store, machine: Machine, args: argparse.Namespace
) -> tuple[list[Run], bool]:
    """Train what no other process has done or is at: those runs, and whether the user broke it off."""
    trained: list[Run] = []
    # twice, since a process that was at a run in the first pass may have died
    with tqdm(total=len(todo), unit='run', disable=_no_bars(machine)) as progress:
        try:
            for run in [*todo, *todo]:
                if run in trained:
                    continue
                with claimed(run, store, machine) as mine:
                    if mine:
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
        asked = runs(args, machine.processes)
        store = Store(args.output)
        done = {row.run for row in store.rows()}
        open_ = agreed([run not in done for run in asked], machine)  # others may be adding rows
        todo = [run for run, is_open in zip(asked, open_, strict=True) if is_open]
        data = load_all(todo, args, machine)
        check(todo, data, store, args.export)
        trained, interrupted = train_all(todo, data, store, machine, args)
        if machine.rank == 0:
            report(asked, trained, store, interrupted, args.export)
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

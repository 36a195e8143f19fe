#!/usr/bin/env python
"""The paper's ablation in miniature: one CIFAR network, one activation after the other, on handwritten digits.

Trains the networks of Tables 2 and 3 of `Attention as Activation` (https://arxiv.org/abs/2007.07729) at the depths
asked for, on scikit-learn's digits: 1,797 real scans of 8x8, here scaled to 16x16, 1,000 to train and 797 to test.
Writes a row a run to a CSV file as soon as the run is done, and at the end a table and a plot.

    python train_scripts/ablation.py --blocks 1 2 --seeds 5
"""

import argparse
import csv
import importlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from digits import NUM_TRAIN, load_digits, write_folder
from timm.layers import get_act_layer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, get_outdir, random_seed
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

# The five of the paper: name in the table, arguments of the model. Any other activation of timm goes by its own name.
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    'relu': ('ReLU', dict(act_layer='relu')),
    'se_act': ('SEActivation', dict(act_layer='se_act')),
    'nin': ('NiN', dict(act_layer='nin')),
    'local_se': ('LocalSENet', dict(act_layer='relu', attn_layer='local_se')),
    'atac': ('ATAC', dict(act_layer='atac')),
}


class Row(NamedTuple):
    """One finished run, as it stands in the CSV file."""

    activation: str
    blocks: int
    seed: int
    params: int
    epochs: int
    train_loss: float
    accuracy: float  # per cent of the test set
    seconds: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--acts',
        nargs='+',
        type=activation_name,
        default=list(ACTIVATIONS),
        metavar='NAME',
        help=f'{", ".join(ACTIVATIONS)} (all of these by default), or any activation of timm',
    )
    parser.add_argument(
        '--blocks',
        nargs='+',
        type=int,
        choices=(1, 2, 3, 4),
        default=[1],
        metavar='B',
        help='blocks a stage, b = 1..4 (default: 1)',
    )
    parser.add_argument('--seeds', type=positive_int, default=2, metavar='N', help='runs of each network (default: 2)')
    parser.add_argument('--epochs', type=positive_int, default=8, metavar='N', help='default: 8')
    parser.add_argument('--batch-size', type=batch_size, default=50, metavar='N', help='default: 50')
    parser.add_argument('--lr', type=positive_float, default=0.1, help='peak learning rate (default: 0.1)')
    parser.add_argument('--weight-decay', type=decay, default=1e-4, metavar='WD', help='default: 1e-4')
    parser.add_argument(
        '--size',
        type=image_size,
        default=16,
        metavar='PX',
        help='width and height that the digits are scaled to (default: 16)',
    )
    parser.add_argument(
        '--device',
        type=device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: cuda where there is one, else cpu',
    )
    parser.add_argument(
        '--output',
        type=Path,
        default=Path('results/ablation'),
        metavar='DIR',
        help='folder to write to; a number is appended where it exists (default: results/ablation)',
    )
    parser.add_argument(
        '--export',
        action='store_true',
        help='also write each network, with a model card, as a folder that `timm-atac push` uploads',
    )
    args = parser.parse_args(argv)
    try:
        importlib.import_module('matplotlib')
        importlib.import_module('sklearn')
    except ImportError as error:
        parser.error(f"{error}; what this script needs comes with `pip install 'timm_atac[ablation]'`")
    return args


def activation_name(text: str) -> str:
    if text not in ACTIVATIONS:
        try:
            get_act_layer(text)
        except KeyError:
            raise argparse.ArgumentTypeError(
                f'{text!r} is neither one of {", ".join(ACTIVATIONS)} nor an activation of timm'
            ) from None
    return text


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def batch_size(text: str) -> int:
    size = positive_int(text)
    if not 2 <= size <= NUM_TRAIN:
        raise argparse.ArgumentTypeError(f'{text!r} is not in 2..{NUM_TRAIN}, the number of training images')
    return size


def image_size(text: str) -> int:
    size = positive_int(text)
    if size < 8:
        raise argparse.ArgumentTypeError(f'{text!r} is less than 8, the size of the scans')
    return size


def decay(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of at least 0')
    return value


def positive_float(text: str) -> float:
    value = decay(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not above 0')
    return value


def device(text: str) -> torch.device:
    try:
        torch.empty(0, device=text)
        return torch.device(text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f'{text!r} cannot be used: {str(error).splitlines()[0]}') from None


def model_args(activation: str) -> dict[str, Any]:
    _, kwargs = ACTIVATIONS.get(activation, (activation, dict(act_layer=activation)))
    return kwargs


def create_model(activation: str, blocks: int, size: int = 16) -> nn.Module:
    # as the images of `load_digits` are: grey, in 0..1, whole
    cfg = dict(tag='digits', input_size=(1, size, size), mean=(0.0,), std=(1.0,), pool_size=None)
    return timm.create_model(f'resnet{6 * blocks + 2}_cifar', pretrained_cfg_overlay=cfg, **model_args(activation))


def train(
    activation: str,
    blocks: int,
    seed: int,
    data: tuple[TensorDataset, TensorDataset],
    args,
    folder: Path | None = None,
) -> Row:
    """Train one network and test it; with `folder`, write it there."""
    start = time.perf_counter()
    random_seed(seed)
    train_set, test_set = data
    model = create_model(activation, blocks, args.size).to(args.device)
    loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=args.epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
        warmup_epochs=min(1, args.epochs - 1),
        warmup_lr=args.lr / 10,
    )
    updates = 0
    losses = AverageMeter()
    progress = tqdm(
        total=args.epochs * len(loader), desc=f'{activation} b={blocks} seed={seed}', leave=False, unit='batch'
    )
    with progress:
        for epoch in range(args.epochs):
            model.train()
            losses.reset()
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                updates += 1
                scheduler.step_update(updates)
                losses.update(loss.item(), len(labels))
                progress.update()
            progress.set_postfix(epoch=epoch + 1, loss=f'{losses.avg:.3f}')
    row = Row(
        activation,
        blocks,
        seed,
        params=sum(p.numel() for p in model.parameters()),
        epochs=args.epochs,
        train_loss=round(losses.avg, 4),
        accuracy=round(evaluate(model, test_set), 3),
        seconds=round(time.perf_counter() - start, 1),
    )
    if folder is not None:
        write_folder(
            model.cpu(),
            folder,
            network=f'with b = {blocks} and {label(activation)}',
            model_args=model_args(activation),
            accuracy=row.accuracy,
            source=f'train_scripts/ablation.py of timm_atac, seed {seed}',
            hyperparameters={
                'optimizer': 'SGD with momentum 0.9',
                'learning rate': f'{args.lr:g}, a warm-up epoch, then cosine',
                'weight decay': f'{args.weight_decay:g}',
                'epochs': args.epochs,
                'batch size': args.batch_size,
            },
            test_images=test_set.tensors[0],
        )
    return row


@torch.inference_mode()
def evaluate(model: nn.Module, data: TensorDataset) -> float:
    """Top-1 accuracy in per cent."""
    model.eval()
    top1 = AverageMeter()
    for images, labels in DataLoader(data, batch_size=200):
        top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    return top1.avg


def append(file: TextIO, row: Row) -> None:
    csv.writer(file).writerow(row)
    file.flush()


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table: accuracy for each activation and b, mean and spread over the seeds."""
    depths = sorted({row.blocks for row in rows})
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        found[row.activation, row.blocks].append(row.accuracy)
    lines = [
        ['Activation', *(f'b = {b}' for b in depths), f'Parameters (b = {depths[0]})'],
        *(
            [
                label(activation),
                *(cell(found[activation, b]) for b in depths),
                next(
                    (f'{row.params:,}' for row in rows if (row.activation, row.blocks) == (activation, depths[0])), ''
                ),
            ]
            for activation in dict.fromkeys(row.activation for row in rows)
        ),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ['-' * width for width in widths])
    body = '\n'.join(
        '| ' + ' | '.join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + ' |' for line in lines
    )
    seeds = sorted({len(values) for values in found.values() if values})
    count = f'{seeds[0]} to {seeds[-1]}' if len(seeds) > 1 else f'{seeds[0]}'
    spread = f'mean ± standard deviation over {count} seeds' if seeds[-1] > 1 else 'one seed'
    return f'Test accuracy in per cent, {spread}:\n\n{body}'


def cell(values: list[float]) -> str:
    if not values:
        return ''
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def label(activation: str) -> str:
    return ACTIVATIONS.get(activation, (activation, {}))[0]


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy over parameters, one line an activation, one point a depth, in the manner of the paper's figures."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
    for activation, marker in zip(
        dict.fromkeys(row.activation for row in rows), 'osD^vP*X<>' * len(rows), strict=False
    ):
        points = []
        for blocks in sorted({row.blocks for row in rows if row.activation == activation}):
            runs = [row for row in rows if (row.activation, row.blocks) == (activation, blocks)]
            values = [row.accuracy for row in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append((runs[0].params / 1e3, statistics.mean(values), spread))
        x, y, error = zip(*points, strict=True)
        axes.errorbar(x, y, error, marker=marker, capsize=3, label=label(activation))
    axes.set_xlabel('parameters (thousands)')
    axes.set_ylabel('test accuracy (%)')
    axes.set_title(f'Digits, {rows[0].epochs} epochs')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    data = load_digits(args.size, args.device)
    runs = [(a, b, s) for b in sorted({*args.blocks}) for a in dict.fromkeys(args.acts) for s in range(args.seeds)]
    for activation, blocks in {(a, b) for a, b, _ in runs}:
        create_model(activation, blocks)  # whatever cannot be built fails before anything is trained
    if args.output.is_file():
        sys.exit(f'ablation.py: error: argument --output: {args.output} is a file; expected a folder')
    try:
        output = Path(get_outdir(str(args.output), inc=True))
    except OSError as error:
        sys.exit(f'ablation.py: error: argument --output: {error}')

    rows: list[Row] = []
    interrupted = False
    with open(output / 'ablation.csv', 'w', newline='') as file, tqdm(total=len(runs), unit='run') as progress:
        csv.writer(file).writerow(Row._fields)
        try:
            for activation, blocks, seed in runs:
                folder = output / f'{activation}_b{blocks}_seed{seed}' if args.export else None
                row = train(activation, blocks, seed, data, args, folder)
                append(file, row)
                rows.append(row)
                progress.update()
                progress.set_postfix_str(f'{label(activation)} b={blocks}: {row.accuracy:.2f}')
        except KeyboardInterrupt:
            interrupted = True

    if interrupted:
        print(f'\nInterrupted after {len(rows)} of {len(runs)} runs.', file=sys.stderr)
    if rows:
        print(f'\n{table(rows)}\n\nRows: {output / "ablation.csv"}')
        plot(rows, output / 'ablation.png')
        print(f'Plot: {output / "ablation.png"}')
        if args.export:
            print(f'Networks: {output}/*_b*_seed*')
    return 130 if interrupted else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

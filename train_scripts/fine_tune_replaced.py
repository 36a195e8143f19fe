#!/usr/bin/env python
"""Does a trained network survive `replace_activations`? Replace the ReLUs of one, test it, fine-tune it, test it again.

The network is a CIFAR network of this package, trained on the JPEG copy of CIFAR-10 (see ablation.py). It is fine-tuned
as it was, and with ATAC in the places of `where='paper'` and `where='all'`, with different starts of the new units:

    random      random weights, as in an untrained network; the gates are around 0.5
    near_one    the same, with gates around 0.95, by the bias of the last norm
    imitate     close to the ReLUs that they replace, the default of replace_activations for trained networks

Each finished row is added to a CSV file. The same command goes on with the missing rows, and prints the table at the
end. SGD with Nesterov's momentum, batches of 128, weight decay 1e-4, a cosine schedule without warm-up.

    python train_scripts/fine_tune_replaced.py resnet8_cifar
    python train_scripts/fine_tune_replaced.py resnet20_cifar --weights results/ablation/NETWORK/model.safetensors
    python train_scripts/fine_tune_replaced.py resnet8_cifar --variants as_it_was paper:imitate:1 --epochs 1
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from ablations.image_data import DataError, ImageData, batches, load
from ablations.markdown import markdown_table
from ablations.provenance import commit, device_name
from ablations.trainer import EVAL_BATCH_SIZE, Machine
from timm.optim import create_optimizer_v2
from timm.utils import random_seed

from timm_atac import ATAC, replace_activations
from timm_atac.cli.parser import Parser
from timm_atac.utils.words import counted

STARTS = ('random', 'near_one', 'imitate')
VARIANTS = (
    'as_it_was',
    'paper:random:0.5',
    'paper:near_one:0.5',
    'paper:imitate:0.5',
    'paper:imitate:1',
    'all:random:0.5',
    'all:imitate:0.5',
    'all:imitate:1',
)
COLUMNS = ('model', 'variant', 'lr', 'epochs', 'seed', 'params', 'before', 'accuracies', 'device', 'commit')
BATCH_SIZE = 128


def create(name: str, variant: str, weights: Path | None, seed: int) -> nn.Module:
    """Create the trained network and replace its activations as the variant says.

    Raises:
        ValueError: The variant is not one of the form WHERE:START:RD_RATIO.
    """
    random_seed(seed)
    overlay: dict[str, Any] = {} if weights is None else dict(pretrained_cfg_overlay=dict(file=str(weights)))
    model = timm.create_model(name, pretrained=True, num_classes=10, **overlay)
    if variant == 'as_it_was':
        return model
    where, start, rd_ratio = (*variant.split(':'), '', '')[:3]
    if start not in STARTS or not rd_ratio:
        raise ValueError(f'--variants {variant}: expected as_it_was or WHERE:START:RD_RATIO, START of {STARTS}.')
    replace_activations(model, where=where, rd_ratio=float(rd_ratio), imitate=start == 'imitate')
    if start == 'near_one':
        units: Any = [module for module in model.modules() if isinstance(module, ATAC)]
        for unit in units:
            nn.init.constant_(unit.bn2.bias, 3.0)
    return model


@torch.inference_mode()
def accuracy(model: nn.Module, data: ImageData) -> float:
    """Return top-1 on the test set in per cent."""
    model.eval()
    images, labels = data.test
    correct = 0
    for start in range(0, len(images), EVAL_BATCH_SIZE):
        part = slice(start, start + EVAL_BATCH_SIZE)
        correct += int((model(data.normalize(images[part])).argmax(1) == labels[part]).sum())
    return 100 * correct / len(images)


def fine_tune(model: nn.Module, data: ImageData, epochs: int, lr: float, seed: int, compiles: bool) -> list[float]:
    """Train the network, and return the accuracy after each epoch."""
    model.to(memory_format=torch.channels_last)
    network: Any = torch.compile(model) if compiles else model
    optimizer = create_optimizer_v2(model, 'sgd', lr, 1e-4, momentum=0.9, filter_bias_and_bn=False)
    updates = epochs * (len(data.train[0]) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    accuracies = []
    for epoch in range(epochs):
        model.train()
        for images, labels in batches(data, BATCH_SIZE, augment=True, seed=(seed << 20) + epoch):
            loss = F.cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        accuracies.append(round(accuracy(model, data), 2))
    return accuracies


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return the rows in Markdown, by network and in the order of `VARIANTS`.

    The first epoch and the last are columns. Rows of networks that were only tested are left out, if the same network
    was also fine-tuned.
    """
    trained = {(row['model'], row['variant']) for row in rows if row['accuracies']}
    rows = [row for row in rows if row['accuracies'] or (row['model'], row['variant']) not in trained]
    models = [row['model'] for row in rows]
    order = {variant: i for i, variant in enumerate(VARIANTS)}
    rows = sorted(rows, key=lambda row: (models.index(row['model']), order.get(row['variant'], len(order))))
    lines = [
        ['network', 'activations', 'start', 'rd_ratio', 'parameters', 'right after', 'after 1 epoch', 'at the end']
    ]
    for row in rows:
        where, start, rd_ratio = row['variant'].split(':') if ':' in row['variant'] else ['as it was', '', '']
        accuracies = row['accuracies'].split()
        first, last = (
            (accuracies[0], f'{accuracies[-1]} ({counted(len(accuracies), "epoch")})') if accuracies else ('', '')
        )
        lines.append([row['model'], where, start, rd_ratio, row['params'], row['before'], first, last])
    return markdown_table(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='MODEL', help='resnet8_cifar, or another network with ReLU')
    parser.add_argument('--weights', type=Path, metavar='FILE', help='default: the weights in the package')
    parser.add_argument('--variants', nargs='+', default=VARIANTS, metavar='VARIANT', help=f'of: {" ".join(VARIANTS)}')
    parser.add_argument('--epochs', type=int, default=3, help='default: 3; 0 only tests')
    parser.add_argument('--lr', type=float, default=0.05, help='default: 0.05, an eighth of that of the training')
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    parser.add_argument('--data-dir', type=Path, default=Path('data'), help='folder of cifar10-jpeg (default: data)')
    parser.add_argument('--output', type=Path, default=Path('results/fine-tune.csv'), metavar='CSV')
    args = parser.parse_args(argv)
    if args.weights is not None and not args.weights.is_file():
        parser.error(f'--weights {args.weights}: the file does not exist')
    try:
        data = load('cifar10-jpeg', 32, args.data_dir, False)
    except DataError as error:
        sys.exit(f'{parser.prog}: error: {error}')
    compiles = Machine(torch.device('cpu'), compile=None).should_compile(args.epochs * len(data.train[0]) // BATCH_SIZE)
    for variant in args.variants:
        key = [args.model, variant, str(args.lr), str(args.epochs), str(args.seed)]
        if any([row[name] for name in COLUMNS[:5]] == key for row in read(args.output)):
            continue
        try:
            model = create(args.model, variant, args.weights, args.seed)
        except ValueError as error:
            sys.exit(f'{parser.prog}: error: {error}')
        params = sum(p.numel() for p in model.parameters())
        before = round(accuracy(model, data), 2)
        accuracies = fine_tune(model, data, args.epochs, args.lr, args.seed, compiles)
        torch.compiler.reset()
        append(
            args.output,
            [*key, params, before, ' '.join(map(str, accuracies)), device_name(torch.device('cpu')), commit()],
        )
        print(f'{args.model} {variant}: {before} right after, then {accuracies}', file=sys.stderr, flush=True)
    print(table(read(args.output)))


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Sequence[Any]) -> None:
    """Add a row in one write, so that two programs may add rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO()
    csv.writer(lines, lineterminator='\n').writerows([row] if path.exists() else [COLUMNS, row])
    with open(path, 'a', encoding='utf-8') as file:
        file.write(lines.getvalue())


if __name__ == '__main__':
    main()

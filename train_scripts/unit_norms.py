#!/usr/bin/env python
"""Which norm should a unit have in a model without BatchNorm? Train such models on scikit-learn's digits with each.

The models are small ones of timm with GroupNorm or LayerNorm, with their own activation and with ATAC in all places.
A table in Markdown with the mean and the standard deviation of the accuracy over the seeds is printed at the end.

    python train_scripts/unit_norms.py
    python train_scripts/unit_norms.py --models convnext_atto --seeds 1 --epochs 4
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from ablations.digits import load_digits
from ablations.image_data import ImageData, batches
from ablations.markdown import markdown_table
from timm.utils import random_seed

from timm_atac import replace_activations
from timm_atac.cli.parser import Parser

MODELS = ('test_efficientnet_gn', 'test_efficientnet_ln', 'test_convnext', 'test_vit')
ACTS = {
    'own activation': None,
    'atac (BatchNorm)': 'atac',
    'atac_layernorm2d': 'atac_layernorm2d',
    'atac_groupnorm1': 'atac_groupnorm1',
}
SIZE, BATCH_SIZE = 32, 50


def train(name: str, act: str | None, data: ImageData, epochs: int, lr: float, seed: int) -> float:
    """Train a model by AdamW with a cosine schedule, and return its accuracy on the test set in per cent."""
    random_seed(seed)
    args: dict[str, Any] = dict(img_size=SIZE) if 'vit' in name else {}
    model = timm.create_model(name, in_chans=1, num_classes=10, **args)
    if act is not None:
        replace_activations(model, act, example_input=torch.zeros(2, 1, SIZE, SIZE))
    updates = epochs * (len(data.train[0]) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    model.train()
    for epoch in range(epochs):
        for images, labels in batches(data, BATCH_SIZE, augment=False, seed=(seed << 20) + epoch):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    images, labels = data.test
    with torch.inference_mode():
        return 100 * (model(data.normalize(images)).argmax(1) == labels).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='MODEL', help=f'default: {" ".join(MODELS)}')
    parser.add_argument('--epochs', type=int, default=12, help='default: 12')
    parser.add_argument('--lr', type=float, default=2e-3, help='default: 2e-3')
    parser.add_argument('--seeds', type=int, default=3, help='number of seeds (default: 3)')
    args = parser.parse_args(argv)
    train_set, test_set = load_digits(SIZE)
    data = ImageData(train_set, test_set, [str(digit) for digit in range(10)], (0.0,), (1.0,))
    lines = [['model', *ACTS]]
    for name in args.models:
        cells = []
        for label, act in ACTS.items():
            found = [train(name, act, data, args.epochs, args.lr, seed) for seed in range(args.seeds)]
            spread = f' ± {statistics.stdev(found):.1f}' if len(found) > 1 else ''
            cells.append(f'{statistics.mean(found):.1f}{spread}')
            print(f'{name}, {label}: {cells[-1]}', file=sys.stderr)
        lines.append([name, *cells])
    print(markdown_table(lines))


if __name__ == '__main__':
    main()

"""Write the table "Should I use it?" of README.md from the files that have its figures.

python tools/readme_table.py
"""

import argparse
import csv
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / 'train_scripts'))

from ablations import store, tables  # noqa: E402

PAGE = ROOT / 'README.md'
START, END = '<!-- written by tools/readme_table.py -->\n', '<!-- end -->\n'
MODELS = ('resnet50', 'seresnet50', 'atac_resnet50')
CIFAR = ('cifar10-jpeg.csv', 'cifar10-jpeg-h200.csv')


def table() -> str:
    """Return the table, and the sentences about CIFAR-10 and about other recipes."""
    with open(ROOT / 'results' / 'reported-imagenet.csv', newline='') as file:
        reported = {row['model']: 100 - float(row['top1_err']) for row in csv.DictReader(file)}
    sizes = [size(name) for name in MODELS]
    networks = sections(ROOT / 'results' / 'gpu' / 'h200.md')
    training, inference = networks['networks: training'], networks['networks: inference']
    cpu = sections(ROOT / 'docs' / 'speed.md')['On a CPU']
    accuracies, sentences = cifar()
    lines = [
        ['', *(f'`{name}`' for name in MODELS)],
        ['---'] * 4,
        ["ImageNet top-1, the authors' figures", *(f'{reported[name]:.2f}' for name in MODELS)],
        ['parameters (M)', *change([params / 1e6 for params, _ in sizes])],
        ['multiply-adds (G)', *change([macs / 1e9 for _, macs in sizes])],
        ['time of a training step, H200, bfloat16', *(ratio(training, name, 'over_resnet50') for name in MODELS)],
        [
            'time of inference, H200, bfloat16, by `fuse`',
            *(ratio(inference, f'{name}, fused', 'over_fused') for name in MODELS),
        ],
        ['time of inference, two CPU cores, float32', *(ratio(cpu, name, 'time over `resnet50`') for name in MODELS)],
        ['CIFAR-10, ours: ResNet-8 with ReLU, SE, ATAC, JPEG copy, 30 epochs', *accuracies],
    ]
    text = '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)
    return f'{text}\n\n{sentences}\n\n{recipes()}\n'


def size(name: str) -> tuple[int, int]:
    """Return parameters and multiply-adds."""
    model = timm.create_model(name, device='meta').eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def change(values: list[float]) -> list[str]:
    first, *others = values
    return [f'{first:.2f}', *(f'{value:.2f} ({value / first - 1:+.1%})' for value in others)]


def sections(path: Path) -> dict[str, list[dict[str, str]]]:
    """Return heading -> rows of the tables below it."""
    found: dict[str, list[dict[str, str]]] = {}
    heading = ''
    names: list[str] = []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('## '):
            heading = line.removeprefix('## ')
        if not line.startswith('|'):
            names = []
        elif not names:
            names = cells
        elif not set(line) <= set('|- '):
            found.setdefault(heading, []).append(dict(zip(names, cells, strict=True)))
    return found


def ratio(rows: list[dict[str, str]], model: str, column: str) -> str:
    """Return a cell of the first row of a model, without its range."""
    key = next(iter(rows[0].keys() & {'model', 'inference'}))
    found = next(row[column] for row in rows if row.get(key) == model)
    return str(Decimal(found.partition(' ')[0]).quantize(Decimal('0.01'), ROUND_HALF_UP))


def cifar() -> tuple[list[str], str]:
    """Return what our trainings of ResNet-8 on CIFAR-10 show: the row of the table, and two sentences."""
    rows = [row for name in CIFAR for row in store.read_rows(ROOT / 'results' / name)]
    (group,) = tables.group_rows(tables.first_rows(rows))
    found: dict[str, dict[int, float]] = {}
    for row in group.rows:
        if row.run.blocks == 1:
            found.setdefault(row.run.activation, {})[row.run.seed] = row.result.accuracy

    def mean(name: str) -> str:
        return tables.mean_and_spread([*found[name].values()]) if name in found else 'not run'

    def ahead(name: str) -> str:
        seeds = sorted(found['atac'].keys() & found[name].keys())
        return tables.difference_with_interval([found['atac'][s] - found[name][s] for s in seeds])

    return [mean(name) for name in ('relu', 'se', 'atac')], (
        f'In the last row, ATAC less ReLU is {ahead("relu")} points, with the 95 % interval in brackets.\n'
        f'LocalSENet has {mean("local_se")} there: ATAC less LocalSENet is {ahead("local_se")}.\n'
        f'A global gate in place of the activations has {mean("se_act")}. [All results](docs/results.md).'
    )


def recipes() -> str:
    """Return how good the same network is with other recipes."""
    card = ROOT / 'hub_configs' / 'atac_resnet50.open_atac_in1k' / 'card.yaml'
    rows: Any = yaml.safe_load(card.read_text())['comparison']['rows']
    (best,) = (row for row in rows if row['model'] == 'resnet50.a1_in1k')
    return (
        f"**A better recipe gains more than ATAC does.** timm's `resnet50.a1_in1k` has {best['top1']:.2f} top-1 at "
        '224 px\n'
        'with plain ReLUs (timm, results-imagenet.csv). We have not trained ATAC by such a recipe. '
        '[One is ready](docs/train.md#recipes).'
    )


def with_table(text: str, new: str) -> str:
    before, _, rest = text.partition(START)
    return f'{before}{START}{new}{END}{rest.partition(END)[2]}'


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(with_table(PAGE.read_text(), table()))
    print(f'Wrote {PAGE}')

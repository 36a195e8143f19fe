"""Write the table of docs/any_model.md: what `where='paper'` takes in networks of many families, and what that costs.

    python tools/any_model.py                    # writes the table
    python tools/any_model.py resnet50 vgg16    # only prints the rows of these models

All models are on the meta device. It needs torchvision and transformers for two of the rows.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from timm_atac import replace_activations

PAGE = Path(__file__).parent.parent / 'docs' / 'any_model.md'
HEAD = """| model | units, of all places | stages | activations | parameters (M) | GMACs | `rd_ratio='auto'` |
| --- | --- | --- | --- | --- | --- | --- |
"""


def _torchvision() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(weights=None)


def _transformers() -> nn.Module:
    import transformers

    config = transformers.DeiTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768
    )
    return transformers.DeiTForImageClassification(config)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's `resnet50`": _torchvision,
    "transformers' DeiT-Ti": _transformers,
}
MODELS = [
    'resnet50',
    'resnetv2_50',
    'resnext50_32x4d',
    'regnety_008',
    'efficientnet_b0',
    'mobilenetv3_large_100',
    'convnext_tiny',
    'densenet121',
    'vgg16',
    'vit_small_patch16_224',
    'swin_tiny_patch4_window7_224',
    'dm_nfnet_f0',
    'resnet20_cifar',
    *OTHERS,
]


def row(name: str) -> str:
    """Return the row of a model."""
    with torch.device('meta'):
        model = OTHERS[name]() if name in OTHERS else timm.create_model(name)
    report: Any = replace_activations(model, where='paper', dry_run=True)
    places = len(replace_activations(model, where='all', dry_run=True).replaced)
    auto: Any = replace_activations(model, where='paper', rd_ratio='auto', dry_run=True)
    stages = [re.sub(r'^\d+ \((.*)\)$', r'\1', stage) for stage in report.stages[-2:]]
    names = dict.fromkeys(_pattern(r.name, stages) for r in report.replaced)
    cells = (
        name if name in OTHERS else f'`{name}`',
        f'{len(report.replaced)} of {places}',
        '; '.join(f'`{stage}`' for stage in stages),
        ', '.join(f'`{pattern}`' for pattern in names),
        f'{_change(report.parameters, 1e6)} ({report.parameters[1] / report.parameters[0] - 1:+.1%})',
        _change(report.gmacs, 1),
        f'1/{round(1 / auto.rd_ratio)}: {auto.parameters[1] / 1e6:.2f} M, {auto.gmacs[1]:.2f} GMACs',
    )
    return '| ' + ' | '.join(cells) + ' |\n'


def _pattern(name: str, stages: list[str]) -> str:
    """Return a name without the module of its stage, and with `*` for numbers except those at the end."""
    for module in (module for stage in stages for module in stage.split(', ')):
        if name.startswith(f'{module}.'):
            name = name.removeprefix(f'{module}.')
            break
    *parents, own = name.split('.')
    return '.'.join([*(re.sub(r'\d+', '*', parent) for parent in parents), '*' if own.isdigit() else own])


def _change(values: tuple[float, float], unit: float) -> str:
    return f'{values[0] / unit:.2f} to {values[1] / unit:.2f}'


def table(names: list[str]) -> str:
    return HEAD + ''.join(map(row, names))


def with_table(text: str, new: str) -> str:
    """Return the text of the page with another table."""
    before, _, after = text.partition(HEAD)
    rows = re.match(r'(\| .*\n)*', after)
    return before + new + after[rows.end() if rows else 0 :]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', help='models of timm (default: all of the table, which is written)')
    args = parser.parse_args()
    if args.models:
        print(table(args.models), end='')
    else:
        PAGE.write_text(with_table(PAGE.read_text(), table(MODELS)))
        print(f'Wrote {PAGE}')

"""Results of the authors' MXNet code for nine networks, and the same networks in timm.

`data/open_atac.npz` holds, for nine networks with parameters drawn by the rule in `draw`, logits, loss, gradient
norms and running statistics, computed by https://github.com/YimianDai/open-atac at commit 49d42f7 with MXNet 1.9.1 in
float32.
"""

import json
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn

from timm_atac import ATAC, SEActivation

REFERENCE = np.load(Path(__file__).parents[1] / 'data' / 'open_atac.npz')


@dataclass(frozen=True)
class Case:
    number: int
    net: str
    options: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return REFERENCE[f'{self.number}/{key}']

    def __str__(self) -> str:
        return '-'.join([str(self.number), self.net, *(f'{k}={v}' for k, v in self.options.items())])


def read_case(number: int) -> Case:
    options = json.loads(str(REFERENCE[f'{number}/case']))
    options = {k: v for k, v in options.items() if k not in ('params', 'half')}
    return Case(number, options.pop('net'), options)


CASES = [read_case(number) for number in range(9)]


def build(case: Case) -> nn.Module:
    """Create the network of a case with `timm.create_model`."""
    options = case.options
    unit = SEActivation if options.get('global') else ATAC
    act_layer: Any = unit if options.get('relu', True) else partial(unit, act_layer=None)
    act_layer = 'relu' if options.get('act') == 'relu' else act_layer
    if case.net == 'cifar':
        name = f'resnet{6 * options.get("b", 1) + 2}_cifar'
        stages = options.get('act_layers', 4)
    else:
        name = 'atac_resnet50'
        stages = options.get('act_layers', 2)
    num_classes = options.get('classes', 10 if case.net == 'cifar' else 1000)
    return timm.create_model(
        name, act_layer=act_layer, atac_stages=tuple(range(5 - stages, 5)), num_classes=num_classes
    )


def draw(name: str, shape, seed: int) -> torch.Tensor:
    """Return a parameter or running statistic by the rule that the reference was computed with. Never change it."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    kind = name.rsplit('.', 1)[1]
    if kind in ('gamma', 'running_var'):
        array = rng.uniform(0.5, 1.5, shape)
    elif kind == 'weight':
        array = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    else:
        array = 0.1 * rng.standard_normal(shape)
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())

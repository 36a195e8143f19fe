#!/usr/bin/env python
"""The cost of ATAC in timm's models: parameters, multiply-adds, and the time to build the models.

    python benchmarks/act_layer.py              # parameters and multiply-adds
    python benchmarks/act_layer.py --build      # also the time to build, without us, with us, and with act_layer='atac'

Times are measured in new processes that take turns. "without us" is TIMM_ATAC_DISABLE=1.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

MODELS = [
    'resnet18',
    'resnet50',
    'resnetv2_50',
    'resnext50_32x4d',
    'efficientnet_b0',
    'mobilenetv3_large_100',
    'regnety_008',
    'convnext_tiny',
    'vit_small_patch16_224',
    'densenet121',
]


def size(model: Any) -> tuple[float, float]:
    """Return parameters in M, and multiply-adds in G of convolutions and matrix products for one image."""
    channels, *size = model.pretrained_cfg['input_size']
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, channels, *size, device='meta'))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def make(name: str, way: str, **kwargs) -> Any:
    """Create a model with ATAC.

    Args:
        name: Name of the model.
        way: 'name' or 'class' for ATAC as `act_layer`; 'stages' to replace the activations of the last two stages; ''
            for the unchanged model.
        **kwargs: For `timm.create_model`.
    """
    import timm

    import timm_atac

    if way in ('name', 'class'):
        return timm.create_model(name, act_layer='atac' if way == 'name' else timm_atac.ATAC, **kwargs)
    model = timm.create_model(name, **kwargs)
    return timm_atac.replace_activations(model, where=(-2, -1)) if way else model


def way_of(name: str) -> str:
    """Return 'name' if the model accepts the name of an activation, else 'class'."""
    try:
        make(name, 'name', device='meta')
    except TypeError:
        return 'class'
    return 'name'


def sizes(names: list[str]) -> None:
    print('| model | parameters (M) | all activations | last two stages | GMACs | all activations | last two stages |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for name in names:
        host, full, part = (size(make(name, way, device='meta')) for way in ('', way_of(name), 'stages'))
        cells = [f'{host[i]:.2f} | {full[i]:.2f} | {part[i]:.2f}' for i in (0, 1)]
        print(f'| `{name}` | {" | ".join(cells)} |')


def build(names: list[str], ways: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return the seconds to build each model unchanged and, with `ways`, with ATAC.

    `hook` is the part of the latter that our hook and the units take.
    """
    import timm

    torch.set_num_threads(1)
    spent = [0.0]
    if ways:
        from timm_atac.units import deferred

        on_registration = deferred._on_registration

        def timed(*args) -> None:
            start = time.perf_counter()
            on_registration(*args)
            spent[0] += time.perf_counter() - start

        setattr(deferred, '_on_registration', timed)  # noqa: B010

    timm.create_model(names[0])  # loads modules that are imported on first use
    gc.collect()
    gc.disable()  # a collection takes as long as a model, and where it falls differs with us
    seconds: dict[str, dict[str, float]] = {}
    for name in names:
        start = time.perf_counter()
        timm.create_model(name)
        seconds[name] = {'plain': time.perf_counter() - start}
        if ways:
            spent[0] = 0.0
            start = time.perf_counter()
            make(name, ways[name])
            seconds[name] |= {'atac': time.perf_counter() - start, 'hook': spent[0]}
    return seconds


def times(names: list[str], rounds: int) -> None:
    runs: dict[str, list[dict[str, dict[str, float]]]] = {'without': [], 'with': []}
    ways = {name: way_of(name) for name in names}
    for _ in range(rounds):
        for kind, off, child_ways in (('without', '1', {}), ('with', '', ways)):
            command = [sys.executable, '-W', 'ignore', __file__, '--child', json.dumps([names, child_ways])]
            output = subprocess.check_output(command, env={**os.environ, 'TIMM_ATAC_DISABLE': off}, text=True)
            runs[kind].append(json.loads(output))

    def median(kind: str, name: str, key: str) -> float:
        return 1e3 * statistics.median(run[name][key] for run in runs[kind])

    print(f'\nMilliseconds to build a model, medians of {rounds}, one thread:\n')
    print(
        "| model | without us | with us | ratio | with `act_layer='atac'` | of that our hook and the units it makes |"
    )
    print('| --- | --- | --- | --- | --- | --- |')
    total = [0.0, 0.0]
    for name in names:
        plain = [median(kind, name, 'plain') for kind in ('without', 'with')]
        total = [a + b for a, b in zip(total, plain, strict=True)]
        atac, hook = (median('with', name, key) for key in ('atac', 'hook'))
        print(f'| `{name}` | {plain[0]:.0f} | {plain[1]:.0f} | {plain[1] / plain[0]:.3f} | {atac:.0f} | {hook:.0f} |')
    print(f'| all | {total[0]:.0f} | {total[1]:.0f} | {total[1] / total[0]:.3f} | | |')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=MODELS, help='models of timm (default: ten well-known ones)')
    parser.add_argument('--build', action='store_true', help='also measure the time to build')
    parser.add_argument('--rounds', type=int, default=5, help='processes of each kind (default: 5)')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(build(*json.loads(args.child))))
        return
    sizes(args.models)
    if args.build:
        times(args.models, args.rounds)


if __name__ == '__main__':
    main()

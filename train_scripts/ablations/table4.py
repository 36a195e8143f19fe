"""Table 4 of the paper, the networks on ImageNet: what they cost here, by the registry, beside what is reported."""

import csv
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from timm_atac.hub.profile import profile

sys.path.append(str(Path(__file__).resolve().parents[2] / 'benchmarks'))
from measuring.timing import device_name, interleaved, ratio

REPORTED = Path(__file__).resolve().parents[2] / 'results' / 'reported-imagenet.csv'
BASE = 'resnet50'
HEAD = ('Network', 'Model', 'Params (M)', 'GMACs', 'Activations (M)', f'Latency over {BASE}')
HEAD_REPORTED = ('Params (M), reported', 'GFlops, reported', 'top-1 err.', 'top-5 err.', 'Paper')

__all__ = ['table']


def table(device: torch.device, batch_size: int = 1, rounds: int = 5) -> tuple[str, list[list[str]]]:
    """What there is to say, and the lines of the table, its head first.

    Args:
        device: Where the latency is measured.
        batch_size: Images a forward pass.
        rounds: Forward passes of each network, all in turns; 0 for no latency.
    """
    with open(REPORTED, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    latencies = _latencies([row['model'] for row in rows], device, batch_size, rounds) if rounds else {}
    lines = [[*HEAD, *HEAD_REPORTED]]
    for row in rows:
        with torch.device('meta'):
            found = profile(timm.create_model(row['model']))
        cost = [f'{found.params:.2f}', f'{found.gmacs:.2f}', f'{found.activations:.1f}']
        reported = [row['params'], row['gflops'], row['top1_err'], row['top5_err'], row['paper']]
        lines.append([row['network'], f'`{row["model"]}`', *cost, latencies.get(row['model'], '-'), *reported])
    measured = f' Latency: {device_name(device)}, batch {batch_size}, {rounds} rounds.' if rounds else ''
    note = (
        'Table 4, ImageNet at 224 px. Ours are what PyTorch computes: GMACs of convolutions and matrix products, '
        "activations put out by convolutions and classifier. The reported ones are from the authors' README; its "
        f'GFlops mix two ways of counting.{measured}'
    )
    return note, lines


def _latencies(names: list[str], device: torch.device, batch_size: int, rounds: int) -> dict[str, str]:
    """Median (range) of the time of an inference over that of `BASE`, within each round."""
    x = torch.randn(batch_size, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    models: dict[str, Any] = {name: timm.create_model(name, device=device).eval() for name in names}
    models = {name: model.to(memory_format=torch.channels_last) for name, model in models.items()}
    times = interleaved({name: partial(_infer, model, x) for name, model in models.items()}, rounds, device)
    return {name: str(ratio(times, name, BASE)) for name in names}


@torch.no_grad()
def _infer(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x)

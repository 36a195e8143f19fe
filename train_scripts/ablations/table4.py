"""Table 4 of the paper, the networks on ImageNet: costs of the registered networks, and the reported figures."""

import csv
import statistics
from pathlib import Path

import timm
import torch
from torch.utils.benchmark import Timer

from ablations.markdown import markdown_table
from ablations.provenance import device_name
from timm_atac.hub.profile import profile
from timm_atac.utils.words import counted

REPORTED = Path(__file__).resolve().parents[2] / 'results' / 'reported-imagenet.csv'
BASE = 'resnet50'
HEAD = ('Network', 'Model', 'Params (M)', 'GMACs', 'Activations (M)', f'Latency over {BASE}')
HEAD_REPORTED = ('Params (M), reported', 'GFlops, reported', 'top-1 err.', 'top-5 err.', 'Paper')


def imagenet_table(device: str = 'cpu', batch_size: int = 1, rounds: int = 5) -> str:
    """Return the table in Markdown, with a sentence about its columns.

    Args:
        device: Device on which the latency is measured.
        batch_size: Images per forward pass.
        rounds: Timed forward passes of each network; 0 leaves the latency out.
    """
    with open(REPORTED, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    latencies = _relative_latencies([row['model'] for row in rows], torch.device(device), batch_size, rounds)
    lines = [[*HEAD, *HEAD_REPORTED]]
    for row in rows:
        with torch.device('meta'):
            found = profile(timm.create_model(row['model']))
        cost = [f'{found.params:.2f}', f'{found.gmacs:.2f}', f'{found.activations:.1f}']
        reported = [row['params'], row['gflops'], row['top1_err'], row['top5_err'], row['paper']]
        lines.append([row['network'], f'`{row["model"]}`', *cost, latencies.get(row['model'], '-'), *reported])
    measured = ''
    if rounds:
        place = device_name(torch.device(device))
        measured = f' Latency: {place}, batch {batch_size}, {counted(rounds, "round")}.'
    note = (
        'Table 4, ImageNet at 224 px. Our figures are counted by PyTorch: GMACs of convolutions and matrix products; '
        "activations are the outputs of convolutions and classifier. The reported figures are from the authors' "
        f'README, whose GFlops mix two ways of counting.{measured}'
    )
    return f'{note}\n\n{markdown_table(lines)}'


@torch.no_grad()
def _relative_latencies(names: list[str], device: torch.device, batch_size: int, rounds: int) -> dict[str, str]:
    """Return median (range) of each network's latency over that of `BASE` in the same round."""
    if not rounds:
        return {}
    x = torch.randn(batch_size, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    models = {name: timm.create_model(name, device=device).eval() for name in names}
    timers = {
        name: Timer(
            'model(x)',
            globals={'model': model.to(memory_format=torch.channels_last), 'x': x},
            num_threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }
    times = [{name: timer.timeit(1).median for name, timer in timers.items()} for _ in range(rounds)]
    ratios = {name: [seconds[name] / seconds[BASE] for seconds in times] for name in names}
    return {name: f'{statistics.median(r):.3f} ({min(r):.3f}..{max(r):.3f})' for name, r in ratios.items()}

"""Stage for the machine: its versions, and its peak rates of copied bytes and of matrix products in bfloat16."""

import platform
import shutil
import subprocess
from functools import partial

import torch
from measuring.timing import Spread, as_cuda_graph, interleaved

from gpu_stages.stage import Stage, main


def run(stage: Stage) -> None:
    device = torch.device(stage.device)
    properties = {'python': platform.python_version(), 'torch': torch.__version__, 'processor': platform.machine()}
    for package in ('triton', 'timm', 'pytest', 'torchvision'):
        try:
            properties[package] = __import__(package).__version__
        except ImportError as error:
            properties[package] = str(error)
    properties['CPU threads'] = str(torch.get_num_threads())
    if device.type == 'cuda':
        card = torch.cuda.get_device_properties(device)
        properties |= {
            'card': card.name,
            'compute capability': f'{card.major}.{card.minor}',
            'multiprocessors': str(card.multi_processor_count),
            'memory (GB)': f'{card.total_memory / 1e9:.1f}',
            'L2 cache (MB)': f'{card.L2_cache_size / 1e6:.0f}',
            'CUDA': str(torch.version.cuda),
            'cuDNN': str(torch.backends.cudnn.version()),
            'driver': _driver(),
        }
    for name, value in properties.items():
        stage.emit('machine', what=name, value=value)

    count = 2**20 if stage.small else 2**29
    x = torch.empty(count, dtype=torch.bfloat16, device=device).normal_()
    seconds = _seconds(partial(torch.empty_like(x).copy_, x), device)
    stage.emit('ceilings', what='copy, bytes read and written', value=4 * count / seconds / 1e9, unit='GB/s')

    size = 256 if stage.small else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = _seconds(partial(torch.mm, a, b), device)
    stage.emit(
        'ceilings', what=f'product of {size} x {size}, bfloat16', value=2 * size**3 / seconds / 1e12, unit='TFLOP/s'
    )


def _seconds(run, device: torch.device) -> float:
    return Spread.of(interleaved({'': as_cuda_graph(run, device)}, 11, device, at_least=0.05)['']).median


def _driver() -> str:
    if shutil.which('nvidia-smi') is None:
        return 'unknown: nvidia-smi is not installed'
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return 'unknown: nvidia-smi did not answer'
    return done.stdout.strip() or f'unknown: {done.stderr.strip()[:80]}'


if __name__ == '__main__':
    main('machine', run)

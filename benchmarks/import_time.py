#!/usr/bin/env python
"""What the entry point adds to `import torch` and `import timm`, with and without it, in fresh interleaved processes.

python benchmarks/import_time.py --runs 15
"""

import argparse
import os
import statistics
import subprocess
import sys

CODE = 'import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)'


def seconds(module: str, disable: bool) -> float:
    """Time of one import in a fresh process; torch loads no entry point at all where we are switched off."""
    env = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0' if disable else '1'}
    return float(subprocess.check_output([sys.executable, '-c', CODE.format(module)], env=env, text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=15, help='imports of each kind (default: 15)')
    runs = parser.parse_args().runs
    print('| import | without (s) | with (s) | ratio |\n| --- | --- | --- | --- |')
    for module in ('torch', 'timm'):
        seconds(module, disable=False)  # warms the file cache
        pairs = [(seconds(module, disable=True), seconds(module, disable=False)) for _ in range(runs)]
        without, with_us = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = [f'{min(column):.2f}..{max(column):.2f}' for column in zip(*pairs, strict=True)]
        print(f'| `{module}` | {without:.3f} ({spread[0]}) | {with_us:.3f} ({spread[1]}) | {with_us / without:.3f} |')


if __name__ == '__main__':
    main()

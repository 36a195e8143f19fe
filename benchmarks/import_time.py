#!/usr/bin/env python
"""What the entry point adds to `import torch` and `import timm`: off and on, in fresh interleaved processes.

Off is `TORCH_DEVICE_BACKEND_AUTOLOAD=0`, so that the difference holds PyTorch's own search for entry points as well.

python benchmarks/import_time.py --runs 15
"""

import argparse
import os
import statistics
import subprocess
import sys

CODE = 'import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)'


def seconds(module: str, disable: bool) -> float:
    """Time of one import in a fresh process."""
    env = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0' if disable else '1'}
    return float(subprocess.check_output([sys.executable, '-c', CODE.format(module)], env=env, text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=15, help='imports of each kind (default: 15)')
    runs = parser.parse_args().runs
    print('| import | off (s) | on (s) | ratio |\n| --- | --- | --- | --- |')
    for module in ('torch', 'timm'):
        seconds(module, disable=False)  # warms the file cache
        pairs = [(seconds(module, disable=True), seconds(module, disable=False)) for _ in range(runs)]
        off, on = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = [f'{min(column):.2f}..{max(column):.2f}' for column in zip(*pairs, strict=True)]
        print(f'| `{module}` | {off:.3f} ({spread[0]}) | {on:.3f} ({spread[1]}) | {on / off:.3f} |')


if __name__ == '__main__':
    main()

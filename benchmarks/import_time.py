#!/usr/bin/env python
"""The time of `import torch` and `import timm`, without and with this package, in new processes that take turns.

"without" is the same environment, where our entry point is hidden from PyTorch.

    python benchmarks/import_time.py --runs 15
"""

import argparse
import statistics
import subprocess
import sys

CODE = """
import importlib.metadata, time
entry_points = importlib.metadata.entry_points
def visible(**kwargs):
    found = entry_points(**kwargs)
    return [e for e in found if e.name not in {hidden}] if kwargs.get('group') == 'torch.backends' else found
importlib.metadata.entry_points = visible
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


MODULES = ('torch', 'timm')


def seconds(module: str, hidden: tuple[str, ...] = ()) -> float:
    """Return the seconds of one import in a new process."""
    code = CODE.format(module=module, hidden=hidden)
    return float(subprocess.check_output([sys.executable, '-c', code], text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=15, help='imports of each kind (default: 15)')
    runs = parser.parse_args().runs
    print('| import | without (s) | with (s) | ratio |\n| --- | --- | --- | --- |')
    for module in MODULES:
        seconds(module)  # fills the file cache
        pairs = [(seconds(module, hidden=('timm_atac',)), seconds(module)) for _ in range(runs)]
        without, with_us = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = [f'{min(column):.2f}..{max(column):.2f}' for column in zip(*pairs, strict=True)]
        print(f'| `{module}` | {without:.3f} ({spread[0]}) | {with_us:.3f} ({spread[1]}) | {with_us / without:.3f} |')


if __name__ == '__main__':
    main()

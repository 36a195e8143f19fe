#!/usr/bin/env python
"""Time and memory to read a `.params` file of `atac_resnet50` in float16, beside safetensors with the same arrays.

    python benchmarks/read_params.py

Reading returns views of the mapped file. The second row of each also sums every array, which reads the whole file.
Times are medians of rounds in one process, in which both take turns; the file is in the page cache. Memory is the
growth of a new process. It includes the mapped pages of the file that were read.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def write(folder: Path) -> None:
    """Write the same random arrays as `net.params` and `net.safetensors`: in float16, norms' statistics in float32."""
    import timm
    from safetensors.numpy import save_file

    from timm_atac import write_params
    from timm_atac.weights.convert import to_arrays

    arrays = {
        name: array.astype(np.float16 if name.endswith(('.weight', '.bias')) else np.float32)
        for name, array in to_arrays(timm.create_model('atac_resnet50')).items()
    }
    write_params(folder / 'net.params', arrays)
    save_file(arrays, folder / 'net.safetensors')


def ways(folder: Path) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    from safetensors.numpy import load_file

    from timm_atac import read_params

    return {
        'read_params': lambda: read_params(folder / 'net.params'),
        'safetensors.numpy.load_file': lambda: load_file(folder / 'net.safetensors'),
    }


def use(arrays: dict[str, np.ndarray]) -> float:
    return sum(float(array.sum(dtype=np.float64)) for array in arrays.values())


def megabytes() -> tuple[float, float]:
    """Return the peak resident size, and the current resident size without mapped files. Linux only."""
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return tuple(int(status[key].split()[0]) * 1024 / 1e6 for key in ('VmHWM', 'RssAnon'))  # type: ignore[return-value]


def memory(folder: Path, way: str, touch: bool) -> None:
    """Print the growth of both sizes when this process reads the file, as JSON."""
    read = ways(folder)[way]
    before = megabytes()
    arrays = read()
    if touch:
        use(arrays)
    after = megabytes()
    print(json.dumps([b - a for a, b in zip(before, after, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=21, metavar='N', help='default: 21')
    parser.add_argument('--memory', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        folder, way, touch = args.memory
        return memory(Path(folder), way, touch == 'True')

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write(folder)
        size = (folder / 'net.params').stat().st_size / 1e6
        print(f'{size:.1f} MB\n')
        print('| | time (ms) | over safetensors | peak memory (MB) | over the file | without the file (MB) |')
        print('| --- | --- | --- | --- | --- | --- |')
        for touch in (False, True):
            times: dict[str, list[float]] = {way: [] for way in ways(folder)}
            for _ in range(args.rounds):
                for way, read in ways(folder).items():
                    start = time.perf_counter()
                    arrays = read()
                    if touch:
                        use(arrays)
                    times[way].append(time.perf_counter() - start)
            peer = statistics.median(times['safetensors.numpy.load_file'])
            for way in times:
                command = [sys.executable, __file__, '--memory', made, way, str(touch)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                peak, own = json.loads(output)
                median = statistics.median(times[way])
                cells = f'{1e3 * median:.2f} | {median / peer:.3f} | {peak:.1f} | {peak / size:.2f} | {own:.1f}'
                print(f'| `{way}`{", and a sum" if touch else ""} | {cells} |')


if __name__ == '__main__':
    main()

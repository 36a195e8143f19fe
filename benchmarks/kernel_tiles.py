#!/usr/bin/env python
"""Find the fastest tiles of the unit's Triton kernel, for the table in timm_atac/kernels/atac.py. Needs a GPU.

    python benchmarks/kernel_tiles.py --shapes 64x56x56 128x28x28 256x14x14 512x7x7
    python benchmarks/kernel_tiles.py --shapes 512x7x7 --dtype float16 --layout contiguous --best 20

It compiles and times every tile that fits on the GPU. All tiles and a copy take turns. A shape takes several minutes.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from kernels import Setting, Shape, clone, parse_setting
from measuring.timing import Spread, ratio

from timm_atac.kernels import atac
from timm_atac.kernels.atac import Tile

SIZES = {
    'positions': (16, 32, 64, 128, 256),
    'inputs': (32, 64, 128),
    'hidden': (16, 32, 64, 128, 256, 512),
    'outputs': (32, 64, 128),
    'warps': (4, 8, 16),
    'stages': (1, 2, 3, 4),
}


def tiles(channels: int, hidden: int) -> Iterator[Tile]:
    """Yield the tiles to measure. No side is longer than necessary; they have all hidden channels at once, or 256."""
    whole = max(16, 1 << (hidden - 1).bit_length())
    for tile in itertools.starmap(Tile, itertools.product(*SIZES.values())):
        values = tile.positions * (tile.hidden + tile.outputs) / (32 * tile.warps)  # per thread, in registers
        is_long = max(tile.inputs, tile.outputs) > max(channels, 32)
        if tile.hidden in {whole, min(whole, 256)} and not is_long and 8 <= values <= (80 if tile.warps == 16 else 160):
            yield tile


def measure(setting: Setting, shape: Shape, candidates: Iterable[Tile]) -> dict[Any, list[float]]:
    """Return the seconds of each round, by tile and for 'copy'. Tiles that do not run on the GPU are left out."""
    channels, hidden = shape[0], max(shape[0] // 2, 1)
    sizes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    parameters = [torch.randn(size, device=setting.device, dtype=setting.dtype) for size in sizes]
    x = setting.feature_map(shape)
    runs: dict[Any, Callable[[torch.Tensor], object]] = {'copy': clone}
    for tile in candidates:
        run = partial(_launch, parameters, tile)
        try:
            run(x)
        except Exception as error:  # OutOfResources, CompilationError, or an error of the compiler's programs
            print(f'{tuple(tile)}: {type(error).__name__}', file=sys.stderr)
            continue
        runs[tile] = run
    return setting.measure(runs, x)


def in_use(setting: Setting, shape: Shape) -> Tile:
    """Return the tile that the kernel uses for a shape."""
    weight = torch.empty(max(shape[0] // 2, 1), shape[0], device=setting.device, dtype=setting.dtype)
    return atac.tile_for(setting.feature_map(shape), weight)


def tune(setting: Setting, shape: Shape) -> dict[str, list[float]]:
    """Return the seconds of each round, by the tile's text and for 'copy'."""
    used = in_use(setting, shape)
    times = measure(setting, shape, dict.fromkeys((used, *tiles(shape[0], max(shape[0] // 2, 1)))))
    return {
        'copy' if tile == 'copy' else f'{", ".join(map(str, tile))}{" (in use)" if tile == used else ""}': seconds
        for tile, seconds in times.items()
    }


def _launch(parameters: list[torch.Tensor], tile: Tile, x: torch.Tensor) -> torch.Tensor:
    weight1, bias1, weight2, bias2 = parameters
    return atac.launch(x, weight1, bias1, weight2, bias2, tile=tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--best', type=int, default=8, help='number of tiles to print, besides the one in use')
    setting, args = parse_setting(parser)
    print(setting)
    for shape in setting.shapes:
        times = tune(setting, shape)
        ranked = sorted(times.keys() - {'copy'}, key=lambda name: Spread.of(times[name]).median)
        print(f'\n{" x ".join(map(str, shape))}: {len(ranked)} tiles\n')
        print(f'| {", ".join(Tile._fields)} | us | share of the copy |')
        print('| --- | --- | --- |')
        for rank, name in enumerate(ranked):
            if rank < args.best or name.endswith('(in use)'):
                median = Spread.of(times[name]).median
                print(f'| {name} | {median * 1e6:.1f} | {1 / ratio(times, name, "copy").median:.0%} |', flush=True)


if __name__ == '__main__':
    main()

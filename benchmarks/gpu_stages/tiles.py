"""Stage that looks for faster tiles for the shapes at which the unit's kernel is slow."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import kernel_tiles
import torch
from kernels import Shape
from measuring.timing import Spread, can_run_kernels, ratio

from gpu_stages.stage import Stage, main, read_rows
from gpu_stages.units import SHAPES, SMALL, setting
from timm_atac.kernels.atac import Tile

GOOD = 0.7  # share of a copy's speed that needs no better tile
CHUNK = 8  # tiles that are measured and reported together


def slow_shapes(rows: list[dict[str, Any]]) -> list[Shape]:
    """Return the shapes at which the kernel in bfloat16 is not the fastest form or is slow, the slowest first."""
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        if row['stage'] == 'units' and row['table'] == 'inference' and row['dtype'] == 'bfloat16':
            shares.setdefault(row['shape'], {})[row['form']] = row['share_of_copy']
    found = {}
    for shape, share in shares.items():
        others = [value for form, value in share.items() if form not in ('copy', 'ReLU', 'kernel')]
        if 'kernel' in share and (share['kernel'] < GOOD or share['kernel'] < max(others, default=0)):
            channels, height, width = map(int, shape.split('x'))
            found[channels, height, width] = share['kernel']
    return sorted(found, key=lambda shape: found[shape])


def by_distance(used: Tile, tiles: list[Tile]) -> list[Tile]:
    """Return the tiles, those first that differ from the one in use in the fewest fields."""
    return sorted(tiles, key=lambda tile: sum(a != b for a, b in zip(tile, used, strict=True)))


def chunks(tiles: list[Tile], size: int) -> Iterator[list[Tile]]:
    rest = iter(tiles)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def _search(stage: Stage, shape: Shape, share: float) -> None:
    """Measure tiles and the one in use until the share of the time for this shape is over."""
    seconds_left_at_end = stage.seconds_left() * (1 - share)
    tile_setting = setting(stage, 'bfloat16', rounds=7)
    used = kernel_tiles.in_use(tile_setting, shape)
    tiles = [tile for tile in kernel_tiles.tiles(shape[0], max(shape[0] // 2, 1)) if tile != used]
    for chunk in chunks(by_distance(used, tiles), 2 if stage.small else CHUNK):
        times = kernel_tiles.measure(tile_setting, shape, [used, *chunk])
        for tile in (used, *chunk):
            if tile not in times:
                stage.emit('refused', shape='x'.join(map(str, shape)), tile=list(tile))
                continue
            stage.emit(
                'tiles',
                shape='x'.join(map(str, shape)),
                tile=list(tile),
                in_use=tile == used,
                us=Spread.of(times[tile]).median * 1e6,
                share_of_copy=1 / ratio(times, tile, 'copy').median,
                over_used=ratio(times, tile, used).median,
            )
        if stage.small or stage.seconds_left() < seconds_left_at_end:
            return


def run(stage: Stage) -> None:
    device = torch.device(stage.device)
    if not can_run_kernels(device):
        stage.skip('tiles', f'no kernel runs on {device}')
        return
    rows = read_rows(stage.rows)
    shapes = SMALL if stage.small else slow_shapes(rows)
    if not any(row['stage'] == 'units' and row.get('form') == 'kernel' for row in rows) and not stage.small:
        shapes = SHAPES  # the stage 'units' has not measured the kernel
    if not shapes:
        stage.skip('tiles', f'the kernel is the fastest form at every shape, with {GOOD:.0%} of a copy or more')
    for index, shape in enumerate(shapes):
        share = 1 / (len(shapes) - index)
        stage.attempt(str(shape), partial(_search, stage, shape, share))


if __name__ == '__main__':
    main('tiles', run)

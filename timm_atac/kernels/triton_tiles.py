"""Tiles of a (B, C, H, W) map: some positions by some channels, for channels_last and contiguous maps.

Positions are numbered from 0 to B * H * W - 1, in the order of channels_last. So a tile may contain positions of two
images. In a contiguous map, a tile is loaded and stored as (channels, positions), so that its last axis is dense.
"""

import triton
import triton.language as tl

__all__ = ['load_tile', 'start_of', 'store_tile', 'tile_at', 'value_at']


@triton.jit
def tile_at(first, positions, area, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, POSITIONS_TILE: tl.constexpr):
    """Return `start` and `inside` of a tile for `load_tile`, both (POSITIONS_TILE,).

    Args:
        first: First position of the tile, int64.
        positions: B * H * W.
        area: H * W.
    """
    position = first + tl.arange(0, POSITIONS_TILE)
    inside = position < positions
    return start_of(position, area, CHANNELS, CHANNELS_LAST), inside


@triton.jit
def start_of(position, area, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the 64-bit offset of the first channel of each position. `area` is H * W."""
    if CHANNELS_LAST:
        return position * CHANNELS
    else:  # without the else, Triton compiles both branches
        return position // area * area * CHANNELS + position % area


@triton.jit
def value_at(start, channel, area, CHANNELS_LAST: tl.constexpr):
    """Return the offsets of the values of a tile, in the order in which the tile is loaded."""
    if CHANNELS_LAST:
        return start[:, None] + channel[None, :]
    else:
        return start[None, :] + channel.to(tl.int64)[:, None] * area


@triton.jit
def _mask(inside, channel, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return inside[:, None] & (channel < CHANNELS)[None, :]
    else:
        return inside[None, :] & (channel < CHANNELS)[:, None]


@triton.jit
def load_tile(pointer, start, inside, channel, area, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Load a tile (positions, channels). Values outside of the map are zero.

    Args:
        pointer: The map.
        start: (positions,), the result of `start_of`.
        inside: (positions,), True for positions of the map.
        channel: (channels,), numbers of the channels.
        area: H * W.
    """
    mask = _mask(inside, channel, CHANNELS, CHANNELS_LAST)
    tile = tl.load(pointer + value_at(start, channel, area, CHANNELS_LAST), mask=mask, other=0)
    return tile if CHANNELS_LAST else tl.trans(tile)


@triton.jit
def store_tile(pointer, tile, start, inside, channel, area, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Store a tile where `load_tile` loads it from, rounded to the type of the map."""
    tile = tile.to(pointer.dtype.element_ty)
    mask = _mask(inside, channel, CHANNELS, CHANNELS_LAST)
    tl.store(
        pointer + value_at(start, channel, area, CHANNELS_LAST), tile if CHANNELS_LAST else tl.trans(tile), mask=mask
    )

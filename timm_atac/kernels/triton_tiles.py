"""Tiles of a (B, C, H, W) map, some positions by some channels, whichever of both lies densely in memory.

A position is one of all B * H * W, counted as channels_last stores them, so that a tile may reach over the end of an
image. Of a map in the default order, a tile is read and written as (channels, positions), whose last axis is dense.
"""

import triton
import triton.language as tl

__all__ = ['load_tile', 'start_of', 'store_tile', 'value_at']


@triton.jit
def start_of(position, area, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where the first channel of positions is: 64-bit offsets, one for each; `area` is H * W."""
    if CHANNELS_LAST:
        return position * CHANNELS
    else:  # Triton compiles both if there is none
        return position // area * area * CHANNELS + position % area


@triton.jit
def value_at(start, channel, area, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile of values, as it is read."""
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
    """A tile (positions, channels), zero outside of the map.

    Args:
        pointer: The map.
        start: (positions,) of `start_of`.
        inside: (positions,), whether there is such a position.
        channel: (channels,) numbers of channels.
        area: H * W.
    """
    mask = _mask(inside, channel, CHANNELS, CHANNELS_LAST)
    tile = tl.load(pointer + value_at(start, channel, area, CHANNELS_LAST), mask=mask, other=0)
    return tile if CHANNELS_LAST else tl.trans(tile)


@triton.jit
def store_tile(pointer, tile, start, inside, channel, area, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Write what `load_tile` reads there, rounded to the type of the map."""
    tile = tile.to(pointer.dtype.element_ty)
    mask = _mask(inside, channel, CHANNELS, CHANNELS_LAST)
    tl.store(
        pointer + value_at(start, channel, area, CHANNELS_LAST), tile if CHANNELS_LAST else tl.trans(tile), mask=mask
    )

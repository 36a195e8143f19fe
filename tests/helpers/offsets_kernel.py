"""A kernel that writes the offset of a value, for a test. Importing this file imports Triton."""

import triton
import triton.language as tl

from timm_atac.kernels.triton_tiles import start_of, value_at

__all__ = ['write']


@triton.jit
def write(out, position, area, channel, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Write the offset of a position's first channel, and the offset from there to another channel."""
    positions = position.to(tl.int64) + tl.arange(0, 1)
    start = start_of(positions, area, CHANNELS, CHANNELS_LAST)
    offset = tl.sum(value_at(start, channel + tl.arange(0, 1), area, CHANNELS_LAST))
    tl.store(out, tl.sum(start))
    tl.store(out + 1, offset - tl.sum(start))

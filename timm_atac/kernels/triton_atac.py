"""The kernel for inference: the whole unit, with both products. The map between them is never written to memory."""

import triton
import triton.language as tl

from .triton_tiles import load_tile, store_tile, tile_at

__all__ = ['atac_kernel']


@triton.jit
def atac_kernel(
    x_ptr,
    y_ptr,
    weight1_ptr,  # (HIDDEN, CHANNELS)
    bias1_ptr,
    weight2_ptr,  # (CHANNELS, HIDDEN)
    bias2_ptr,
    positions,
    area,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32, because products of bfloat16 are wrong in Triton's interpreter
    POSITIONS_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
):
    """Compute `x * sigmoid(W2 relu(W1 x + b1) + b2)` for a tile of positions and all channels.

    The hidden values of the tile stay in registers or shared memory. If there are too many (HIDDEN > HIDDEN_TILE), they
    are computed again for each tile of output channels. The input is loaded a second time for the gate, from the cache.
    """
    first_position = tl.program_id(0).to(tl.int64) * POSITIONS_TILE
    start, inside = tile_at(first_position, positions, area, CHANNELS, CHANNELS_LAST, POSITIONS_TILE)
    if HIDDEN_TILE >= HIDDEN:
        hidden = _hidden(
            x_ptr, start, inside, weight1_ptr, bias1_ptr, 0, area, CHANNELS, HIDDEN, CHANNELS_LAST, PRECISION,
            UPCAST, POSITIONS_TILE, IN_TILE, HIDDEN_TILE,
        )  # fmt: skip
    for first_out in tl.range(0, CHANNELS, OUT_TILE):
        out = first_out + tl.arange(0, OUT_TILE)
        x = load_tile(x_ptr, start, inside, out, area, CHANNELS, CHANNELS_LAST)  # it loads during the product
        z = tl.zeros([POSITIONS_TILE, OUT_TILE], tl.float32)
        if HIDDEN_TILE >= HIDDEN:
            w = _weight2(weight2_ptr, 0, out, CHANNELS, HIDDEN, HIDDEN_TILE)
            z = _product(hidden, w, z, PRECISION, UPCAST)
        else:
            for first in tl.range(0, HIDDEN, HIDDEN_TILE):
                part = _hidden(
                    x_ptr, start, inside, weight1_ptr, bias1_ptr, first, area, CHANNELS, HIDDEN, CHANNELS_LAST,
                    PRECISION, UPCAST, POSITIONS_TILE, IN_TILE, HIDDEN_TILE,
                )  # fmt: skip
                w = _weight2(weight2_ptr, first, out, CHANNELS, HIDDEN, HIDDEN_TILE)
                z = _product(part, w, z, PRECISION, UPCAST)
        z += tl.load(bias2_ptr + out, mask=out < CHANNELS, other=0).to(tl.float32)[None, :]
        y = x.to(tl.float32) * tl.sigmoid(z)
        store_tile(y_ptr, y, start, inside, out, area, CHANNELS, CHANNELS_LAST)


@triton.jit
def _hidden(
    x_ptr,
    start,
    inside,
    weight_ptr,
    bias_ptr,
    first,
    area,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    POSITIONS_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    """Return relu(W1 x + b1) of a tile, for HIDDEN_TILE hidden channels from `first` on.

    It is zero for channels after the last one, also if x is not finite.
    """
    k = first + tl.arange(0, HIDDEN_TILE)
    h = tl.zeros([POSITIONS_TILE, HIDDEN_TILE], tl.float32)
    for first_in in tl.range(0, CHANNELS, IN_TILE):
        c = first_in + tl.arange(0, IN_TILE)
        x = load_tile(x_ptr, start, inside, c, area, CHANNELS, CHANNELS_LAST)
        mask = (c < CHANNELS)[:, None] & (k < HIDDEN)[None, :]
        w = tl.load(weight_ptr + c[:, None] + k[None, :] * CHANNELS, mask=mask, other=0)
        h = _product(x.to(w.dtype), w, h, PRECISION, UPCAST)
    h += tl.load(bias_ptr + k, mask=k < HIDDEN, other=0).to(tl.float32)[None, :]
    h = tl.where((h < 0) | (k >= HIDDEN)[None, :], 0, h)  # a NaN stays one, as in PyTorch
    return h.to(weight_ptr.dtype.element_ty)


@triton.jit
def _weight2(weight_ptr, first, out, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_TILE: tl.constexpr):
    k = first + tl.arange(0, HIDDEN_TILE)
    mask = (k < HIDDEN)[:, None] & (out < CHANNELS)[None, :]
    return tl.load(weight_ptr + out[None, :] * HIDDEN + k[:, None], mask=mask, other=0)


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision=PRECISION)
    else:
        return tl.dot(a, b, c, input_precision=PRECISION)

"""Kernels for training: norm, sigmoid and product in the forward pass, sums and gradients in the backward pass."""

import triton
import triton.language as tl

from .triton_tiles import load_tile, store_tile, tile_at

__all__ = ['backward_kernel', 'forward_kernel', 'sums_kernel']


@triton.jit
def forward_kernel(
    x_ptr,
    z_ptr,
    y_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    positions,
    area,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS_TILE: tl.constexpr,
    CHANNELS_TILE: tl.constexpr,
):
    """Compute y = x * sigmoid((z - mean) * invstd * weight + bias) for a tile."""
    channel = tl.program_id(1) * CHANNELS_TILE + tl.arange(0, CHANNELS_TILE)
    mean, invstd, weight, bias = _load_rows(channel, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, CHANNELS)
    first = tl.program_id(0).to(tl.int64) * POSITIONS_TILE
    start, inside = tile_at(first, positions, area, CHANNELS, CHANNELS_LAST, POSITIONS_TILE)
    x = load_tile(x_ptr, start, inside, channel, area, CHANNELS, CHANNELS_LAST).to(tl.float32)
    z = load_tile(z_ptr, start, inside, channel, area, CHANNELS, CHANNELS_LAST).to(tl.float32)
    y = x * tl.sigmoid((z - mean) * invstd * weight + bias)
    store_tile(y_ptr, y, start, inside, channel, area, CHANNELS, CHANNELS_LAST)


@triton.jit
def sums_kernel(
    grad_ptr,
    x_ptr,
    z_ptr,
    sums_ptr,  # (programs along positions, 2, CHANNELS), float32
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    positions,
    area,
    share,  # positions of one program, a multiple of POSITIONS_TILE
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS_TILE: tl.constexpr,
    CHANNELS_TILE: tl.constexpr,
):
    """Sum the gradient of the norm's output over positions, and this gradient times the normalised input."""
    channel = tl.program_id(1) * CHANNELS_TILE + tl.arange(0, CHANNELS_TILE)
    mean, invstd, weight, bias = _load_rows(channel, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, CHANNELS)
    by_one = tl.zeros([POSITIONS_TILE, CHANNELS_TILE], tl.float32)
    by_input = tl.zeros([POSITIONS_TILE, CHANNELS_TILE], tl.float32)
    first = tl.program_id(0).to(tl.int64) * share
    for offset in tl.range(0, share, POSITIONS_TILE):
        start, inside = tile_at(first + offset, positions, area, CHANNELS, CHANNELS_LAST, POSITIONS_TILE)
        _, grad, normed = _gradients(
            grad_ptr, x_ptr, z_ptr, start, inside, channel, mean, invstd, weight, bias, area, CHANNELS, CHANNELS_LAST
        )
        by_one += grad  # zero outside of the map
        by_input += grad * normed
    to = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * CHANNELS + channel
    tl.store(to, tl.sum(by_one, 0), mask=channel < CHANNELS)
    tl.store(to + CHANNELS, tl.sum(by_input, 0), mask=channel < CHANNELS)


@triton.jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    z_ptr,
    grad_x_ptr,
    grad_z_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    means_ptr,  # (2, CHANNELS): the sums of `sums_kernel` divided by the number of values
    positions,
    area,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS_TILE: tl.constexpr,
    CHANNELS_TILE: tl.constexpr,
):
    """Compute the gradients of x and z for a tile."""
    channel = tl.program_id(1) * CHANNELS_TILE + tl.arange(0, CHANNELS_TILE)
    mean, invstd, weight, bias = _load_rows(channel, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, CHANNELS)
    by_one = tl.load(means_ptr + channel, mask=channel < CHANNELS, other=0)[None, :]
    by_input = tl.load(means_ptr + CHANNELS + channel, mask=channel < CHANNELS, other=0)[None, :]
    first = tl.program_id(0).to(tl.int64) * POSITIONS_TILE
    start, inside = tile_at(first, positions, area, CHANNELS, CHANNELS_LAST, POSITIONS_TILE)
    grad_x, grad, normed = _gradients(
        grad_ptr, x_ptr, z_ptr, start, inside, channel, mean, invstd, weight, bias, area, CHANNELS, CHANNELS_LAST
    )
    store_tile(grad_x_ptr, grad_x, start, inside, channel, area, CHANNELS, CHANNELS_LAST)
    grad_z = weight * invstd * (grad - by_one - normed * by_input)
    store_tile(grad_z_ptr, grad_z, start, inside, channel, area, CHANNELS, CHANNELS_LAST)


@triton.jit
def _gradients(
    grad_ptr,
    x_ptr,
    z_ptr,
    start,
    inside,
    channel,
    mean,
    invstd,
    weight,
    bias,
    area,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Return the gradients of x and of the norm's output for a tile, and the normalised input."""
    grad = load_tile(grad_ptr, start, inside, channel, area, CHANNELS, CHANNELS_LAST).to(tl.float32)
    x = load_tile(x_ptr, start, inside, channel, area, CHANNELS, CHANNELS_LAST).to(tl.float32)
    z = load_tile(z_ptr, start, inside, channel, area, CHANNELS, CHANNELS_LAST).to(tl.float32)
    normed = (z - mean) * invstd
    gate = tl.sigmoid(normed * weight + bias)
    return grad * gate, grad * x * gate * (1 - gate), normed


@triton.jit
def _load_rows(channel, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, CHANNELS: tl.constexpr):
    """Load mean, invstd, weight and bias of some channels as float32, (1, channels) each."""
    mask = channel < CHANNELS
    mean = tl.load(mean_ptr + channel, mask=mask, other=0).to(tl.float32)[None, :]
    invstd = tl.load(invstd_ptr + channel, mask=mask, other=0).to(tl.float32)[None, :]
    weight = tl.load(weight_ptr + channel, mask=mask, other=0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + channel, mask=mask, other=0).to(tl.float32)[None, :]
    return mean, invstd, weight, bias

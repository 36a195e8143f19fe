"""`x * sigmoid(W2 relu(W1 x + b1) + b2)` in one kernel, where x is read once and the result written once."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..utils.autocast import without_autocast
from .op import operation, run_kernel, wrap_triton
from .pointwise import pointwise_backward
from .switch import DTYPES, IS_INTERPRETED, can_run, layout

try:
    from .triton_atac import atac_kernel
except ImportError:  # no Triton: the formula remains
    atac_kernel = None

__all__ = ['Tile', 'atac', 'formula', 'launch', 'tile_for']


class Tile(NamedTuple):
    """What one program works on at a time, and how it is compiled."""

    positions: int
    inputs: int  # channels of x in a step of the first product
    hidden: int  # less than there are: they are computed again for each tile of output channels
    outputs: int  # channels of y in a step of the second product
    warps: int
    stages: int = 2


# by hidden channels up to a number, the last for more; with hardly a spilled register, and within the shared memory of
# every GPU of capability 8.0 or newer, by `benchmarks/kernel_resources.py`; which is the fastest was not measured yet
_HALF = {
    32: Tile(128, 64, 32, 64, 4),
    64: Tile(128, 64, 64, 128, 8, 3),
    128: Tile(256, 32, 128, 32, 16, 3),
    256: Tile(128, 64, 256, 32, 16),
    512: Tile(32, 64, 512, 32, 8),
    0: Tile(64, 64, 256, 32, 8),
}
_HALF_OF_FLOAT32 = _HALF | {128: Tile(128, 64, 128, 64, 8, 3), 256: Tile(64, 32, 256, 32, 8)}  # under autocast
_HALF_CONTIGUOUS = {
    32: Tile(64, 32, 32, 32, 4),
    64: Tile(64, 64, 64, 64, 8, 3),
    128: Tile(64, 64, 128, 32, 8, 3),
    256: Tile(32, 32, 256, 64, 8),
    512: Tile(16, 32, 512, 32, 8),
    0: Tile(32, 64, 256, 32, 8),
}
_FLOAT32 = {
    32: Tile(64, 32, 32, 32, 4),
    64: Tile(64, 32, 64, 32, 8, 3),
    128: Tile(32, 32, 128, 64, 8),
    256: Tile(32, 32, 256, 32, 8),
    512: Tile(16, 32, 512, 32, 8),
    0: Tile(32, 32, 256, 32, 8),
}


def tile_for(x: torch.Tensor, weight1: torch.Tensor) -> Tile:
    """The tile for an input (B, C, H, W) and a weight (K, C), which may be on the meta device."""
    hidden, channels = weight1.shape
    if weight1.dtype == torch.float32:
        tiles = _FLOAT32
    elif layout(x) != torch.channels_last:
        tiles = _HALF_CONTIGUOUS
    else:
        tiles = _HALF if x.dtype == weight1.dtype else _HALF_OF_FLOAT32
    tile = next((tile for most, tile in tiles.items() if hidden <= most), tiles[0])
    return tile._replace(
        inputs=max(min(tile.inputs, _power_of_2(channels)), 16),  # a side of a product has 16 at least
        hidden=max(min(tile.hidden, _power_of_2(hidden)), 16),
        outputs=max(min(tile.outputs, _power_of_2(channels)), 16),
    )


def _fake(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    hidden = weight1.shape[0]
    found = [tuple(t.shape) for t in (x, weight1, bias1, weight2, bias2)]
    if x.ndim != 4 or found[1:] != [(hidden, x.shape[1]), (hidden,), (x.shape[1], hidden), (x.shape[1],)]:
        raise ValueError(
            f'atac: got shapes {found}, expected an input (B, C, H, W), weights (K, C) and (C, K), and their biases '
            f'(K,) and (C,), in the order x, weight1, bias1, weight2, bias2.'
        )
    types = {t.dtype for t in (weight1, bias1, weight2, bias2)}
    if len(types) != 1 or x.dtype not in (torch.float32, weight1.dtype) or not types <= {*DTYPES, torch.float64}:
        raise ValueError(
            f'atac: got an input of {x.dtype} and parameters of {types}, expected parameters of one floating-point '
            f'type and an input of the same, or of float32.'
        )
    return torch.empty_like(x)


def launch(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    *,
    tile: Tile,
) -> torch.Tensor:
    """Run the kernel with a tile of one's own; the arguments, as of `atac`, are not checked."""
    y = torch.empty_like(x)
    channels, hidden = x.shape[1], weight1.shape[0]
    area = x.shape[2] * x.shape[3]
    positions = x.shape[0] * area
    grid = ((positions + tile.positions - 1) // tile.positions,)
    parameters = [t.contiguous() for t in (weight1, bias1, weight2, bias2)]
    run_kernel(
        wrap_triton(atac_kernel),
        grid,
        x,
        y,
        *parameters,
        positions,
        area,
        CHANNELS=channels,
        HIDDEN=hidden,
        CHANNELS_LAST=layout(x) == torch.channels_last,
        PRECISION=_precision(),
        UPCAST=IS_INTERPRETED and weight1.dtype == torch.bfloat16,
        POSITIONS_TILE=tile.positions,
        IN_TILE=tile.inputs,
        HIDDEN_TILE=tile.hidden,
        OUT_TILE=tile.outputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def _precision() -> str:
    """How float32 is multiplied: as in the convolutions that the products are, by default in TF32."""
    cudnn: Any = torch.backends.cudnn
    try:
        return 'tf32' if cudnn.conv.fp32_precision == 'tf32' else 'ieee'
    except AttributeError:  # before PyTorch 2.9
        return 'tf32' if cudnn.allow_tf32 else 'ieee'


@operation('atac', _fake)
def atac(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """A folded ATAC unit: `x * sigmoid(weight2 @ relu(weight1 @ x + bias1) + bias2)` at each position.

    On a GPU one kernel, which computes products of the parameters' type and everything else in float32, and rounds
    once; elsewhere, in float64, and for an input with gaps, the formula in this module. Any C, K and number of
    positions; float32 is multiplied as in convolutions (`torch.backends.cudnn.conv.fp32_precision`, TF32 by default).

    Args:
        x: (B, C, H, W), of the parameters' type or float32; channels_last or contiguous, if the kernel is to run.
        weight1: (K, C).
        bias1: (K,).
        weight2: (C, K).
        bias2: (C,).

    Returns:
        A tensor like x, which no other one shares memory with.

    Raises:
        ValueError: Other shapes or types.
    """
    _fake(x, weight1, bias1, weight2, bias2)
    if atac_kernel is None or not can_run(x.device) or weight1.dtype not in DTYPES or layout(x) is None:
        return torch.empty_like(x).copy_(formula(x, weight1, bias1, weight2, bias2))
    return launch(x, weight1, bias1, weight2, bias2, tile=tile_for(x, weight1))


def formula(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """What `atac` computes, in plain PyTorch: the reference, and a way for devices without Triton."""
    with without_autocast(x.device):
        hidden = F.conv2d(x.to(weight1.dtype), weight1[:, :, None, None], bias1).relu()
        return x * F.conv2d(hidden, weight2[:, :, None, None], bias2).sigmoid()


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _keep(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """By the formula, whose values are computed again."""
    x, weight1, bias1, weight2, bias2 = ctx.saved_tensors
    needs_x, *needs_first, needs_weight2, needs_bias2 = ctx.needs_input_grad
    needs_hidden = needs_x or any(needs_first)
    w1, w2 = weight1[:, :, None, None], weight2[:, :, None, None]
    with without_autocast(x.device):
        narrow = x.to(weight1.dtype)
        hidden = F.conv2d(narrow, w1, bias1).relu()
        gate = F.conv2d(hidden, w2, bias2).sigmoid()
        grad_z = (grad * x * gate * (1 - gate)).to(weight1.dtype)
        needed = (needs_hidden, needs_weight2, needs_bias2)
        grad_hidden, grad_weight2, grad_bias2 = pointwise_backward(grad_z, hidden, w2, needed)
        through: Any = None
        grad_weight1 = grad_bias1 = None
        if needs_hidden:
            grad_hidden = torch.ops.aten.threshold_backward.default(grad_hidden, hidden, 0)
            through, grad_weight1, grad_bias1 = pointwise_backward(grad_hidden, narrow, w1, (needs_x, *needs_first))
        grad_x = (grad * gate + through).to(x.dtype) if needs_x else None
    weights = [None if g is None else g[..., 0, 0] for g in (grad_weight1, grad_weight2)]
    return grad_x, weights[0], grad_bias1, weights[1], grad_bias2


atac.register_autograd(_backward, setup_context=_keep)

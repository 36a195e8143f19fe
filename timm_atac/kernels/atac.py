"""`x * sigmoid(W2 relu(W1 x + b1) + b2)` in one kernel, which reads x once and writes the result once."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..utils.autocast import without_autocast
from .op import next_power_of_2, operation, run_kernel, wrap_triton
from .switch import DTYPES, IS_INTERPRETED, can_run, layout

try:
    from .triton_atac import atac_kernel
except ImportError:  # without Triton, the operation computes the formula
    atac_kernel = None

__all__ = ['Tile', 'atac', 'formula', 'launch', 'tile_for']


class Tile(NamedTuple):
    """Sizes that one program of the kernel processes at a time, and its compiler options."""

    positions: int
    inputs: int  # channels of x in one step of the first product
    hidden: int  # hidden channels; if there are more, they are computed again for each tile of output channels
    outputs: int  # channels of y in one step of the second product
    warps: int
    stages: int = 2


# Each key is the largest number of hidden channels for its tile, 0 is for more. `benchmarks/kernel_resources.py` shows
# few spilled registers, and enough shared memory on every GPU of capability 8.0 or newer. No speed is measured yet.
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
    """Return the tile for an input (B, C, H, W) and a weight (K, C), which may be on the meta device."""
    hidden, channels = weight1.shape
    if weight1.dtype == torch.float32:
        tiles = _FLOAT32
    elif layout(x) != torch.channels_last:
        tiles = _HALF_CONTIGUOUS
    else:
        tiles = _HALF if x.dtype == weight1.dtype else _HALF_OF_FLOAT32
    tile = next((tile for most, tile in tiles.items() if hidden <= most), tiles[0])
    return tile._replace(
        inputs=max(min(tile.inputs, next_power_of_2(channels)), 16),  # Triton's products need sizes of at least 16
        hidden=max(min(tile.hidden, next_power_of_2(hidden)), 16),
        outputs=max(min(tile.outputs, next_power_of_2(channels)), 16),
    )


def _fake(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    hidden = weight1.shape[0]
    found = [tuple(t.shape) for t in (x, weight1, bias1, weight2, bias2)]
    if x.ndim != 4 or found[1:] != [(hidden, x.shape[1]), (hidden,), (x.shape[1], hidden), (x.shape[1],)]:
        raise ValueError(
            f'atac: got shapes {found} for x, weight1, bias1, weight2, bias2. Expected an input (B, C, H, W), weights '
            f'(K, C) and (C, K), and biases (K,) and (C,).'
        )
    types = {t.dtype for t in (weight1, bias1, weight2, bias2)}
    if len(types) != 1 or x.dtype not in (torch.float32, weight1.dtype) or not types <= {*DTYPES, torch.float64}:
        raise ValueError(
            f'atac: got an input of {x.dtype} and parameters of {types}. Expected parameters of one floating-point '
            f'type, and an input of the same type or of float32.'
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
    """Run the kernel with a given tile. The other arguments are those of `atac` and are not checked."""
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
    """Return how the kernel multiplies float32: as PyTorch's convolutions do, by default in TF32."""
    cudnn: Any = torch.backends.cudnn
    try:
        return 'tf32' if cudnn.conv.fp32_precision == 'tf32' else 'ieee'
    except AttributeError:  # before PyTorch 2.9
        return 'tf32' if cudnn.allow_tf32 else 'ieee'


@operation('atac', _fake)
def atac(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """An ATAC unit with folded norms: `x * sigmoid(weight2 @ relu(weight1 @ x + bias1) + bias2)` at each position.

    On a GPU this is one kernel for any C, K and number of positions. It multiplies in the type of the parameters,
    computes everything else in float32, and rounds once. It multiplies float32 as convolutions do
    (`torch.backends.cudnn.conv.fp32_precision`, by default in TF32). On other devices, in float64, and for an input
    that is not dense in memory, the operation computes `formula`.

    Args:
        x: (B, C, H, W), of the type of the parameters or float32. The kernel needs channels_last or contiguous.
        weight1: (K, C).
        bias1: (K,).
        weight2: (C, K).
        bias2: (C,).

    Returns:
        A new tensor of the shape, type and strides of x.

    Raises:
        ValueError: The shapes or types are not those above.
    """
    _fake(x, weight1, bias1, weight2, bias2)
    if atac_kernel is None or not can_run(x.device) or weight1.dtype not in DTYPES or layout(x) is None:
        return torch.empty_like(x).copy_(formula(x, weight1, bias1, weight2, bias2))
    return launch(x, weight1, bias1, weight2, bias2, tile=tile_for(x, weight1))


def formula(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """Compute `atac` in plain PyTorch: the reference, also used on devices without Triton."""
    with without_autocast(x.device):
        hidden = F.conv2d(x.to(weight1.dtype), weight1[:, :, None, None], bias1).relu()
        return x * F.conv2d(hidden, weight2[:, :, None, None], bias2).sigmoid()


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Differentiate the formula. It is computed again, so only the arguments are stored."""
    arguments = list(ctx.saved_tensors)
    needed = [i for i, is_needed in enumerate(ctx.needs_input_grad) if is_needed]

    def of_needed(*values: torch.Tensor) -> torch.Tensor:
        for i, value in zip(needed, values, strict=True):
            arguments[i] = value
        return formula(*arguments)

    with without_autocast(grad.device):
        vjp: Any = torch.func.vjp(of_needed, *(arguments[i] for i in needed))[1]
        grads = dict(zip(needed, vjp(grad), strict=True))
    return tuple(grads.get(i) for i in range(len(arguments)))


atac.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

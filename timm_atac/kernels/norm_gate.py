"""`x * sigmoid(norm(z))` in training, and its gradients. Each pass reads each map once.

For maps of T bytes, PyTorch's own operations move 6 T in the forward pass (with the statistics) and 18 T in the
backward pass. These operations move 4 T and 8 T.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .op import next_power_of_2, operation, run_kernel, wrap_triton
from .switch import DTYPES, can_run, layout

try:
    from .triton_norm_gate import backward_kernel, forward_kernel, sums_kernel
except ImportError:  # without Triton, the operations compute the formulas
    forward_kernel = sums_kernel = backward_kernel = None

__all__ = ['norm_gate', 'norm_gate_backward', 'norm_gate_sums', 'suits']

_PROGRAMS = 512  # programs along the positions for sums: a few per processor of a large GPU
_TILE = 2048  # values of a tile: with two bytes each, 16 bytes of each map per thread


def suits(*maps: torch.Tensor) -> bool:
    """True if one of the operations accepts these maps together, and a kernel can run for them."""
    first = maps[0]
    return (
        not any(torch._C._functorch.is_legacy_batchedtensor(t) for t in maps)  # a vectorised Jacobian uses them
        and _runs(*maps)
        and layout(first) is not None
        and all(t.shape == first.shape and layout(t) == layout(first) for t in maps)
    )


def _runs(*maps: torch.Tensor) -> bool:
    return forward_kernel is not None and can_run(maps[0].device) and all(t.dtype in DTYPES for t in maps)


def _fake(x: torch.Tensor, z: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    _check([x, z], rows)
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, z.dtype))


@operation('norm_gate', _fake)
def norm_gate(
    x: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Compute `x * sigmoid((z - mean) * invstd * weight + bias)`. The kernel computes in float32.

    Args:
        x, z: (B, C, H, W), both channels_last or both contiguous.
        mean, invstd, weight, bias: (C,).

    Returns:
        A tensor of the shape and strides of x, of the wider type of x and z.

    Raises:
        ValueError: The shapes or strides are not those above.
    """
    y = _fake(x, z, mean, invstd, weight, bias)
    if not _runs(x, z):
        gate = _normed_and_gate(z, mean, invstd, weight, bias)[1]
        return y.copy_(x * gate)
    _launch(wrap_triton(forward_kernel), [x, z, y], [mean, invstd, weight, bias])
    return y


def _fake_sums(grad: torch.Tensor, x: torch.Tensor, z: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    _check([grad, x, z], rows)
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


@operation('norm_gate_sums', _fake_sums)
def norm_gate_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Return the gradients of bias and weight in `norm_gate`, in this order: (2, C), float32.

    Args:
        grad: (B, C, H, W), the gradient of the result of `norm_gate`, with the strides of x and z.
        x, z, mean, invstd, weight, bias: As in `norm_gate`.

    Raises:
        ValueError: The shapes or strides are not those above.
    """
    _check([grad, x, z], [mean, invstd, weight, bias])
    if not _runs(grad, x, z):
        normed, gate = _normed_and_gate(z, mean, invstd, weight, bias)
        grad_normed = grad * x * gate * (1 - gate)
        return torch.stack((grad_normed.sum((0, 2, 3)), (grad_normed * normed).sum((0, 2, 3)))).float()
    positions_tile, _ = _tile(x)
    positions = x.shape[0] * x.shape[2] * x.shape[3]
    tiles = (positions + positions_tile - 1) // positions_tile
    share = max(1, (tiles + _PROGRAMS - 1) // _PROGRAMS) * positions_tile
    sums = x.new_empty(((positions + share - 1) // share, 2, x.shape[1]), dtype=torch.float32)
    _launch(wrap_triton(sums_kernel), [grad, x, z, sums], [mean, invstd, weight, bias], share)
    return sums.sum(0)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, z: torch.Tensor, *rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    *rows_of_norm, means = rows
    _check([grad, x, z], [*rows_of_norm, *means])
    return torch.empty_like(x), torch.empty_like(z)


@operation('norm_gate_backward', _fake_backward)
def norm_gate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    means: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and z in `norm_gate`.

    Args:
        grad, x, z, mean, invstd, weight, bias: As in `norm_gate_sums`.
        means: (2, C), float32: the result of `norm_gate_sums` divided by the number of values per channel. Zeros if
            mean and invstd do not depend on z.

    Raises:
        ValueError: The shapes or strides are not those above.
    """
    grad_x, grad_z = _fake_backward(grad, x, z, mean, invstd, weight, bias, means)
    if not _runs(grad, x, z):
        normed, gate = _normed_and_gate(z, mean, invstd, weight, bias)
        by_one, by_input = (_row(v) for v in means)
        grad_normed = grad * x * gate * (1 - gate) - by_one - normed * by_input
        return grad_x.copy_(grad * gate), grad_z.copy_(_row(weight * invstd) * grad_normed)
    maps = [grad, x, z, grad_x, grad_z]
    _launch(wrap_triton(backward_kernel), maps, [mean, invstd, weight, bias, means])
    return grad_x, grad_z


def _check(maps: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
    first = maps[0]
    known = first.ndim == 4 and all(t.shape == first.shape for t in maps)
    if not known or any(row.shape != (first.shape[1],) for row in rows):
        raise ValueError(
            f'norm_gate: got maps of shapes {[tuple(t.shape) for t in maps]} and values per channel of shapes '
            f'{[tuple(row.shape) for row in rows]}. Expected (B, C, H, W) and (C,).'
        )
    if layout(first) is None or any(layout(t) != layout(first) for t in maps):
        raise ValueError(
            f'norm_gate: got maps of strides {[t.stride() for t in maps]}. Expected all channels_last, or all '
            f'contiguous.'
        )


def _normed_and_gate(
    z: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = (z - _row(mean)) * _row(invstd)
    return normed, (normed * _row(weight) + _row(bias)).sigmoid()


def _row(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1)


def _tile(x: torch.Tensor) -> tuple[int, int]:
    """Return the positions and channels of a tile. The one that is dense in memory is the longer one."""
    channels = min(128 if layout(x) == torch.channels_last else 16, next_power_of_2(x.shape[1]))
    return _TILE // channels, channels


def _launch(wrapped: Any, maps: list[torch.Tensor], rows: list[torch.Tensor], share: int | None = None) -> None:
    """Run a kernel, in which each program processes one tile of positions, or `share` positions for sums."""
    x = maps[0]
    positions_tile, channels_tile = _tile(x)
    area = x.shape[2] * x.shape[3]
    positions = x.shape[0] * area
    per_program = positions_tile if share is None else share
    grid = ((positions + per_program - 1) // per_program, (x.shape[1] + channels_tile - 1) // channels_tile)
    run_kernel(
        wrapped,
        grid,
        *maps,
        *(row.contiguous() for row in rows),
        positions,
        area,
        *([] if share is None else [share]),
        CHANNELS=x.shape[1],
        CHANNELS_LAST=layout(x) == torch.channels_last,
        POSITIONS_TILE=positions_tile,
        CHANNELS_TILE=channels_tile,
        num_warps=8,
    )

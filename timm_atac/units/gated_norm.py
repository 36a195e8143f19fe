"""The last part of a unit in training, `x * sigmoid(norm(z))`, as forward and backward functions.

Both run as operations of PyTorch, or as our Triton kernels where these are enabled and can run
(`timm_atac.use_kernels`). Arguments and results are the same, so forward and backward pass may run differently.
"""

from typing import Any

import torch

from ..kernels.gate import gate_
from ..kernels.switch import can_run, is_wanted
from .batch_norm import BatchNorm, Statistics

__all__ = ['backward', 'forward']

_aten = torch.ops.aten


def forward(
    x: torch.Tensor, maps: list[torch.Tensor], norm: BatchNorm, weight: Any, bias: Any
) -> tuple[torch.Tensor, Statistics]:
    """Compute `x * sigmoid(norm(z))`, and update the running statistics of the norm.

    Args:
        x: (B, C, H, W).
        maps: A list with z, of the shape of x. The function removes z from the list, so that it can be freed before the
            end. z may be overwritten.
        norm: Norm of z.
        weight, bias: Parameters of the norm, (C,) or None.

    Returns:
        The result, of the wider type of x and z, and the statistics of z.
    """
    z = maps.pop()
    if _by_kernel(x, z, weight=weight):
        from ..kernels.norm_gate import norm_gate

        statistics = norm.statistics(z)
        return norm_gate(x, z, *norm.rows(statistics, weight, bias)), statistics
    y, statistics = norm.forward(z, weight, bias)
    del z
    return gate_(x, y) if y.dtype == x.dtype else x * y.sigmoid_(), statistics


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    norm: BatchNorm,
    weight: Any,
    bias: Any,
    statistics: Statistics,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, z, weight and bias, None for those that are not needed.

    Args:
        grad_y: Gradient of the result of `forward`.
        x, norm, weight, bias: As in `forward`.
        z: As in the `maps` of `forward`.
        statistics: The statistics that `forward` returned.
        needed: For x, z, weight and bias, True if its gradient is needed.
    """
    if not _by_kernel(x, z, grad_y, weight=weight):
        gate = norm.normalize(z, weight, bias, statistics).sigmoid_()
        grad = _aten.sigmoid_backward.default((grad_y * x).to(gate.dtype), gate)
        grad_x = (gate * grad_y).to(x.dtype) if needed[0] else None
        del gate
        return grad_x, *norm.backward(grad, z, weight, statistics, list(needed[1:]))

    from ..kernels.norm_gate import norm_gate_backward, norm_gate_sums

    rows = norm.rows(statistics, weight, bias)
    needs_means = needed[1] and norm.use_batch_stats
    sums: Any = norm_gate_sums(grad_y, x, z, *rows) if needs_means or any(needed[2:]) else None
    grad_x = grad_z = None
    if needed[0] or needed[1]:
        means = norm.mean_gradients(sums, z, statistics) if needs_means else z.new_zeros(2, z.shape[1])
        grad_x, grad_z = norm_gate_backward(grad_y, x, z, *rows, means.float())
    grad_bias, grad_weight = (None, None) if sums is None else (row.clone() for row in sums)  # in storages of their own
    grads = (grad_x, grad_z, grad_weight, grad_bias)
    return tuple(grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True))


def _by_kernel(*maps: torch.Tensor, weight: Any) -> bool:
    """True if the kernels are enabled and can run for these maps and this weight of a norm."""
    if not is_wanted('norm_gate', maps[0].device, maps[0].shape[1]) or not can_run(maps[0].device):
        return False
    from ..kernels.norm_gate import suits

    return (weight is None or weight.dtype == torch.float32) and suits(*maps)

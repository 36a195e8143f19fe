"""The end of a unit in training, `x * sigmoid(norm(z))`, as forward and backward functions.

Each has two forms with the same arguments and results: operations of PyTorch, and our Triton kernels where those are
wanted and can run (`timm_atac.use_kernels`). A pass may take the one and the next the other.
"""

from typing import Any, NamedTuple

import torch

from ..kernels.gate import gate_
from ..kernels.switch import can_run, is_wanted
from .batch_norm import BatchNorm, Statistics

__all__ = ['Gradients', 'backward', 'forward']

_aten = torch.ops.aten


class Gradients(NamedTuple):
    """Of the arguments, where they are needed."""

    x: torch.Tensor | None
    z: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def forward(
    x: torch.Tensor, maps: list[torch.Tensor], norm: BatchNorm, weight: Any, bias: Any
) -> tuple[torch.Tensor, Statistics]:
    """Normalise, update the running statistics, and gate.

    Args:
        x: (B, C, H, W).
        maps: z alone, of the same shape, which is taken out so that it can be freed on the way, and may be overwritten.
        norm: Of z.
        weight, bias: The norm's, (C,) or None.

    Returns:
        The result, of the wider type of x and z, and what z was normalised by.
    """
    z = maps.pop()
    if _by_kernel(x, z, weight=weight):
        from ..kernels.norm_gate import norm_gate

        statistics = norm.statistics(z)
        return norm_gate(x, z, *norm.scales(statistics, weight, bias)), statistics
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
) -> Gradients:
    """Gradients of x, z, weight and bias, those that are needed.

    Args:
        grad_y: Of the result of `forward`.
        x, norm, weight, bias: Its arguments.
        z: What was in its `maps`.
        statistics: What it returned.
        needed: Which, in the order of `Gradients`.
    """
    if not _by_kernel(x, z, grad_y, weight=weight):
        gate = norm.again(z, weight, bias, statistics).sigmoid_()
        grad = _aten.sigmoid_backward.default((grad_y * x).to(gate.dtype), gate)
        grad_x = (gate * grad_y).to(x.dtype) if needed[0] else None
        del gate
        return Gradients(grad_x, *norm.backward(grad, z, weight, statistics, list(needed[1:])))

    from ..kernels.norm_gate import norm_gate_backward, norm_gate_sums

    scales = norm.scales(statistics, weight, bias)
    needs_means = needed[1] and norm.by_batch
    sums = norm_gate_sums(grad_y, x, z, *scales) if needs_means or any(needed[2:]) else None
    grad_x = grad_z = None
    if needed[0] or needed[1]:
        means = norm.means(sums, z, statistics) if needs_means and sums is not None else z.new_zeros(2, z.shape[1])
        grad_x, grad_z = norm_gate_backward(grad_y, x, z, *scales, means.float())
    grad_bias, grad_weight = (None, None) if sums is None else (row.clone() for row in sums)  # of their own storages
    found = (grad_x, grad_z, grad_weight, grad_bias)
    return Gradients(*(grad if wanted else None for grad, wanted in zip(found, needed, strict=True)))


def _by_kernel(*maps: torch.Tensor, weight: Any) -> bool:
    if not is_wanted('norm_gate', maps[0].device, maps[0].shape[1]) or not can_run(maps[0].device):
        return False
    from ..kernels.norm_gate import suits

    return (weight is None or weight.dtype == torch.float32) and suits(*maps)

"""ATAC for training in less memory. The backward pass recomputes values that autograd would store.

Tensors stored for the backward pass, for an input x of T bytes. The next layer stores the output y.

| form               | stored                                              | bytes |
| ------------------ | --------------------------------------------------- | ----- |
| `ATAC` by autograd | x, conv1's output, ReLU, conv2's output, sigmoid, y | 5 T   |
| `ATACMe`           | x, conv1's output, y                                | 2.5 T |

The backward pass recomputes conv2, a sixth of a unit's multiply-adds in a training step. The statistics of the batch
are stored, so that they are computed once.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.activations import Sigmoid

from ..utils.autocast import autocast_dtype, cast, without_autocast
from ..utils.op_by_op import has_hooks, must_run_op_by_op
from . import gated_norm
from .atac import ATAC
from .batch_norm import BatchNorm, Statistics

__all__ = ['ATACMe']

_aten = torch.ops.aten


class ATACMe(ATAC):
    """`ATAC` that stores its input and conv1's output for the backward pass, and recomputes the rest.

    Parameters, results, state dict and arguments are those of `ATAC`. timm calls such a layer memory-efficient ("Me").
    For the name 'atac', timm creates this class, and `ATAC` only in models that are to be exported or scripted.

    It runs like `ATAC` in these cases:

    - under `no_grad`, `torch.compile`, export, tracing, scripting, torch.func and forward-mode differentiation;
    - with hooks or parametrizations on its parts, with global module hooks, and for tensor subclasses;
    - if the activation is not a ReLU, the gate is not a sigmoid, or a norm is not a BatchNorm (also synchronized or
      frozen) of float32 or float64.

    Raises:
        ValueError: As `ATAC`.
        RuntimeError: `create_graph=True` with statistics that processes share.

    Source:
        Section III of the paper describes the unit.
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if _can_recompute(self, x):
                norms = BatchNorm.from_module(self.bn1), BatchNorm.from_module(self.bn2)
                weights = self.conv1.weight, self.conv2.weight
                affine = self.bn1.weight, self.bn1.bias, self.bn2.weight, self.bn2.bias
                return _RecomputedATAC.apply(x, *weights, *affine, *norms, autocast_dtype(x))
        return x * self.gate(self.bottleneck(x))


def _can_recompute(unit: ATACMe, x: torch.Tensor) -> bool:
    """True if `_RecomputedATAC` computes what the unit's parts compute for x, and gradients are enabled."""
    if not torch.is_grad_enabled() or must_run_op_by_op(x):
        return False
    parts = (unit.conv1, unit.bn1, unit.act, unit.conv2, unit.bn2, unit.gate)
    dtype = autocast_dtype(x) or x.dtype
    return (
        type(unit).bottleneck is ATAC.bottleneck
        and 'bottleneck' not in vars(unit)
        and type(unit.act) is nn.ReLU
        and type(unit.gate) in (nn.Sigmoid, Sigmoid)
        and _is_pointwise(unit.conv1)
        and _is_pointwise(unit.conv2)
        and BatchNorm.supports(unit.bn1, dtype)
        and BatchNorm.supports(unit.bn2, dtype)
        and not any(has_hooks(part) or _has_subclasses(part) for part in parts)
        # without at least two values per channel, BatchNorm has no batch statistics: let PyTorch raise
        and (x.numel() > x.shape[1] or None not in (BatchNorm.sync_group(unit.bn1), BatchNorm.sync_group(unit.bn2)))
    )


def _has_subclasses(part: nn.Module) -> bool:
    """True if a parameter is of a tensor subclass."""
    return any(type(p) not in (nn.Parameter, torch.Tensor) for p in part._parameters.values() if p is not None)


def _is_pointwise(conv: nn.Module) -> bool:
    """True if a layer is a 1x1 convolution without bias or parametrization, as `ATAC` creates it."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
        and conv.groups == 1
        and conv.bias is None
    )


class _RecomputedATAC(torch.autograd.Function):
    """`ATAC` as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, x, weight1, weight2, scale1, shift1, scale2, shift2, norm1, norm2, dtype):
        with without_autocast(x.device):
            hidden = F.conv2d(cast(x, dtype), cast(weight1, dtype))
            y, statistics1 = norm1.forward(hidden, scale1, shift1)
            maps = [F.conv2d(y.relu_(), cast(weight2, dtype))]
            del y
            y, statistics2 = gated_norm.forward(x, maps, norm2, scale2, shift2)
        ctx.norms, ctx.dtype = (norm1, norm2), dtype
        ctx.save_for_backward(x, weight1, weight2, scale1, shift1, scale2, shift2, hidden, *statistics1, *statistics2)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        backward = _differentiable_backward if torch.is_grad_enabled() else _backward
        with without_autocast(grads[0].device):
            return (*backward(ctx, *grads), None, None, None)


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the first seven arguments of `_RecomputedATAC`."""
    x, weight1, weight2, scale1, shift1, scale2, shift2, hidden, *statistics = ctx.saved_tensors
    norm1, norm2 = ctx.norms
    statistics1, statistics2 = Statistics(*statistics[:4]), Statistics(*statistics[4:])
    needs_x, needs_weight1, needs_weight2, *needs_affine = ctx.needs_input_grad[:7]
    needs_hidden = needs_x or needs_weight1
    needs_relu = needs_hidden or any(needs_affine[:2])
    w1, w2 = cast(weight1, ctx.dtype), cast(weight2, ctx.dtype)
    grad_scale1 = grad_shift1 = grad_weight1 = None

    relu = norm1.normalize(hidden, scale1, shift1, statistics1).relu_()
    out = F.conv2d(relu, w2)
    needed = (needs_x, needs_relu or needs_weight2, *needs_affine[2:])
    grads = gated_norm.backward(grad_y, x, out, norm2, scale2, shift2, statistics2, needed)
    grad_x, grad, grad_scale2, grad_shift2 = grads
    del out, grads
    grad, grad_weight2 = _pointwise_backward(grad, relu, w2, needs_relu, needs_weight2)
    if needs_relu:
        grad = _aten.threshold_backward.default(grad, relu, 0)
        del relu
        needed1 = [needs_hidden, *needs_affine[:2]]
        grad, grad_scale1, grad_shift1 = norm1.backward(grad, hidden, scale1, statistics1, needed1)
        grad, grad_weight1 = _pointwise_backward(grad, cast(x, ctx.dtype), w1, needs_x, needs_weight1)
    if grad_x is not None:
        grad_x.add_(grad)
    weights = [None if grad is None else grad.to(weight1.dtype) for grad in (grad_weight1, grad_weight2)]
    return (grad_x, *weights, grad_scale1, grad_shift1, grad_scale2, grad_shift2)


def _pointwise_backward(grad: Any, x: torch.Tensor, weight: torch.Tensor, needs_x: bool, needs_weight: bool) -> Any:
    """Return the gradients of x and weight in a 1x1 convolution without bias, None for those that are not needed."""
    if not needs_x and not needs_weight:
        return None, None
    convolution = (None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    return _aten.convolution_backward.default(grad, x, weight, *convolution, [needs_x, needs_weight, False])[:2]


def _differentiable_backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """As `_backward`, but autograd can differentiate the gradients."""
    norm1, norm2 = ctx.norms
    # views, because one argument may depend on another: gradients here must not include that dependence
    saved = ctx.saved_tensors
    args: list[Any] = [t if t is None else t.view_as(t) for t in saved[:7]]
    x, weight1, weight2, *affine = args
    with torch.enable_grad():
        y = F.conv2d(cast(x, ctx.dtype), cast(weight1, ctx.dtype))
        y = norm1.differentiable(y, *affine[:2], Statistics(*saved[8:12])).relu()
        y = norm2.differentiable(F.conv2d(y, cast(weight2, ctx.dtype)), *affine[2:], Statistics(*saved[12:]))
        y = x * y.sigmoid()
    needed_args = [arg for arg, needed in zip(args, ctx.needs_input_grad, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, needed_args, grad_y, create_graph=True))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad[:7])

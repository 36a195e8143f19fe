"""ATAC for training in little memory: the same unit, whose backward pass computes again what autograd would keep.

What a unit keeps of a map of T bytes for the backward pass, its output included, which the next layer keeps:

| form               | kept                                               | of T |
| ------------------ | -------------------------------------------------- | ---- |
| `ATAC` by autograd | x, conv1's output, ReLU, conv2's output, sigmoid, y | 5    |
| `ATACMe`           | x, conv1's output, y                               | 2.5  |

Computed again is conv2, a sixth of a unit's multiply-adds in a training step. What has one value a channel is kept, so
that the statistics of a batch are taken once.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.activations import Sigmoid

from ..kernels.pointwise import pointwise_backward
from ..utils.autocast import autocast_dtype, cast, without_autocast
from ..utils.op_by_op import has_hooks, must_run_op_by_op
from . import gated_norm
from .atac import ATAC
from .batch_norm import BatchNorm, Statistics

__all__ = ['ACTIVATIONS_ME', 'ATACMe']

_aten = torch.ops.aten


class ATACMe(ATAC):
    """`ATAC` that keeps its input and conv1's output for the backward pass, and computes the rest again.

    Parameters, results, state dict and arguments are those of `ATAC`. timm calls such a layer memory-efficient ("Me"),
    and prefers it by name, here 'atac', unless a model is created to be exported or scripted.

    It runs as `ATAC` does under `no_grad`; where its parts have to be run one by one (under `torch.compile`, exporting,
    tracing, scripting, torch.func and forward-mode differentiation; with hooks or parametrizations on them, or hooks on
    all modules, which counters of FLOPs and memory use; in tensor subclasses); and with other parts than a ReLU, a
    sigmoid and BatchNorms, synchronized and frozen ones among them, of float32 or float64.

    Raises:
        ValueError: As `ATAC`.
        RuntimeError: `create_graph=True` with statistics that processes share.

    Source:
        Section III of the paper, for the unit.
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if _in_one(self, x):
                norms = BatchNorm.of(self.bn1), BatchNorm.of(self.bn2)
                affine = (self.bn1.weight, self.bn1.bias, self.bn2.weight, self.bn2.bias)
                return _Unit.apply(x, self.conv1.weight, self.conv2.weight, *affine, *norms, autocast_dtype(x))
        return x * self.gate(self.bottleneck(x))


# as `layers.ACTIVATIONS`; timm prefers these by name unless a model is created to be exported or scripted
ACTIVATIONS_ME: dict[str, type[ATAC]] = {'atac': ATACMe}


def _in_one(unit: ATACMe, x: torch.Tensor) -> bool:
    """Whether a unit can run as one function, and has a reason to."""
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
        and BatchNorm.knows(unit.bn1, dtype)
        and BatchNorm.knows(unit.bn2, dtype)
        and not any(has_hooks(part) or _has_subclasses(part) for part in parts)
        # of no value, or one a channel, a norm makes no statistics alone: PyTorch knows what to do, or complains
        and (x.numel() > x.shape[1] or None not in (BatchNorm.group_of(unit.bn1), BatchNorm.group_of(unit.bn2)))
    )


def _has_subclasses(part: nn.Module) -> bool:
    return any(type(p) not in (nn.Parameter, torch.Tensor) for p in part._parameters.values() if p is not None)


def _is_pointwise(conv: nn.Module) -> bool:
    """Whether a layer is a convolution as `ATAC` makes them; one with a parametrization has another type."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
        and conv.groups == 1
        and conv.bias is None
    )


class _Unit(torch.autograd.Function):
    """`ATAC` as one operation; the arguments are the input, weights, weights and biases of the norms, and constants."""

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
        constants = (None, None, None)
        with without_autocast(grads[0].device):
            return (*(_by_autograd if torch.is_grad_enabled() else _backward)(ctx, *grads), *constants)


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the first seven arguments of `_Unit`; names the gradient of a value like the value."""
    x, weight1, weight2, scale1, shift1, scale2, shift2, hidden, *statistics = ctx.saved_tensors
    norm1, norm2 = ctx.norms
    statistics1, statistics2 = Statistics(*statistics[:3]), Statistics(*statistics[3:])
    needs_x, needs_weight1, needs_weight2, *needs_affine = ctx.needs_input_grad[:7]
    needs_hidden = needs_x or needs_weight1
    needs_relu = needs_hidden or any(needs_affine[:2])
    w1, w2 = cast(weight1, ctx.dtype), cast(weight2, ctx.dtype)
    grad_scale1 = grad_shift1 = grad_weight1 = None

    relu = norm1.again(hidden, scale1, shift1, statistics1).relu_()
    out = F.conv2d(relu, w2)
    needed = (needs_x, needs_relu or needs_weight2, *needs_affine[2:])
    end = gated_norm.backward(grad_y, x, out, norm2, scale2, shift2, statistics2, needed)
    grad_x, grad, grad_scale2, grad_shift2 = end
    del out, end
    grad, grad_weight2, _ = pointwise_backward(grad, relu, w2, (needs_relu, needs_weight2, False))
    if needs_relu:
        grad = _aten.threshold_backward.default(grad, relu, 0)
        del relu
        needed1 = [needs_hidden, *needs_affine[:2]]
        grad, grad_scale1, grad_shift1 = norm1.backward(grad, hidden, scale1, statistics1, needed1)
        grad, grad_weight1, _ = pointwise_backward(grad, cast(x, ctx.dtype), w1, (needs_x, needs_weight1, False))
    if grad_x is not None:
        grad_x.add_(grad)
    weights = [None if grad is None else grad.to(weight1.dtype) for grad in (grad_weight1, grad_weight2)]
    return (grad_x, *weights, grad_scale1, grad_shift1, grad_scale2, grad_shift2)


def _by_autograd(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """As `_backward`, such that the gradients can be differentiated."""
    norm1, norm2 = ctx.norms
    # views, so that the way from one argument to another, if there is one, is not counted here
    saved = ctx.saved_tensors
    args: list[Any] = [t if t is None else t.view_as(t) for t in saved[:7]]
    x, weight1, weight2, *affine = args
    with torch.enable_grad():
        y = F.conv2d(cast(x, ctx.dtype), cast(weight1, ctx.dtype))
        y = norm1.by_autograd(y, *affine[:2], Statistics(*saved[8:11])).relu()
        y = norm2.by_autograd(F.conv2d(y, cast(weight2, ctx.dtype)), *affine[2:], Statistics(*saved[11:]))
        y = x * y.sigmoid()
    wanted = [arg for arg, needed in zip(args, ctx.needs_input_grad, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad[:7])

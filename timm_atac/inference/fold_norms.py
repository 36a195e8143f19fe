"""Folds the BatchNorms of a model into the layers before them, and makes scales and shifts of those that stay alone."""

from typing import Any

import torch
import torch.nn as nn
from torch.nn.utils import fuse_conv_bn_weights

from .norms import FoldedNorm, ScaleShift

__all__ = ['fold', 'make_scale_shift']


@torch.no_grad()
def fold(layer: Any, norm: Any) -> None:
    """Change a layer so that it computes `norm(layer(x))` with the running statistics, and remove the norm's part.

    The new weights are computed in float64 and rounded once. Both modules keep their identity: other references to
    them see the change.

    Args:
        layer: Convolution or linear layer. It gets a bias.
        norm: BatchNorm, which becomes a `FoldedNorm` with its `drop` and `act`, if it has any.
    """
    weight, bias = fuse_conv_bn_weights(
        *_exact(layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    )  # right for a linear layer too, and the norm may have no weight
    reference, requires_grad = layer.weight, layer.weight.requires_grad
    layer.weight = nn.Parameter(torch.empty_like(reference).copy_(weight), requires_grad=requires_grad)
    layer.bias = nn.Parameter(reference.new_empty(len(bias)).copy_(bias), requires_grad=requires_grad)
    _become(norm, FoldedNorm)


@torch.no_grad()
def make_scale_shift(norm: Any, ndim: int) -> None:
    """Turn a BatchNorm with running statistics into a `ScaleShift` with its `drop` and `act`, if it has any.

    Scale and shift are computed in float64 and rounded once, to the dtype of the norm's weight or statistics.

    Args:
        norm: BatchNorm, which keeps its identity.
        ndim: Number of dimensions of its input.
    """
    mean, var, eps, weight, bias = _exact(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    reference = norm.running_mean if weight is None else norm.weight
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = (-1, *(1,) * (ndim - 2))
    _become(norm, ScaleShift)
    for name, value in (('scale', scale), ('shift', shift)):
        norm.register_buffer(name, reference.detach().new_empty(len(mean)).copy_(value).view(shape))


def _exact(*values: Any) -> Any:
    """Return tensors in float64 on the CPU (some devices have none) or on `meta`, and other values as they are."""
    tensors = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]
    return [(v if v.is_meta else v.cpu()).double() if isinstance(v, torch.Tensor) else v for v in tensors]


def _become(norm: Any, kind: type[nn.Sequential]) -> None:
    norm._modules = {name: norm._modules[name] for name in ('drop', 'act') if name in norm._modules}
    norm.__class__ = kind
    norm._parameters.clear()
    norm._buffers.clear()
    norm._non_persistent_buffers_set.clear()

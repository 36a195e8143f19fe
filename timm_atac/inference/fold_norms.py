"""BatchNorms of inference put into the convolutions and linear layers before them, wherever those are in a model."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.layers import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch.nn.utils import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import tree_iter

from ..utils.forward_pass import ForwardObserver
from ..utils.op_by_op import has_hooks

__all__ = ['Adjacency', 'fold']

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_NORMS_WITH_ACT = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
_HARMLESS = ('__get__', 'dim', 'size', '__len__', 'is_contiguous', 'stride', '__hash__')  # tell nothing of the values


def _is_layer(module: nn.Module) -> bool:
    return type(module) in _LAYERS and not has_hooks(module)


def _is_norm(module: Any) -> bool:
    known = type(module) in (*_NORMS, *_NORMS_WITH_ACT) and module.running_mean is not None
    return known and not has_hooks(module)


@torch.no_grad()
def fold(layer: Any, norm: Any) -> None:
    """Change a layer to `norm(layer(x))` by running statistics, and the norm to what is then left to do.

    Both stay the modules they are, so that whoever refers to them has the changed ones. Computed in float64 and rounded
    once.

    Args:
        layer: Convolution or linear layer; gets a bias.
        norm: BatchNorm, which becomes an identity, or of timm's norms with an activation, that activation.
    """
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    values = (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, scale, shift)
    exact: Any = [v.detach().cpu().double() if isinstance(v, torch.Tensor) else v for v in values]
    weight, bias = (fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights)(*exact)
    like, wants_grad = layer.weight, layer.weight.requires_grad
    layer.weight = nn.Parameter(torch.empty_like(like).copy_(weight), requires_grad=wants_grad)
    layer.bias = nn.Parameter(like.new_empty(len(bias)).copy_(bias), requires_grad=wants_grad)
    norm.__class__ = _Activation if isinstance(norm, _NORMS_WITH_ACT) else nn.Identity
    norm._parameters.clear()
    norm._buffers.clear()


class _Activation(nn.Module):
    """What is left of timm's norms with an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(x))


class Adjacency(ForwardObserver):
    """Watches a forward pass for layers whose output goes into one BatchNorm and nowhere else.

    Both have to run once, and by themselves: a model that takes their weights for something else keeps them.
    """

    def __init__(self, original: Mapping[nn.Module, nn.Module]) -> None:
        super().__init__()
        self._original = original
        self._stack: list[nn.Module] = []
        self._runs: dict[nn.Module, int] = {}
        self._norm_of: dict[nn.Module, nn.Module] = {}
        self._excluded: set[nn.Module] = set()
        self._layers = {m for m in original if _is_layer(original[m])}  # our own hooks are not yet on them
        self._norms = {m for m in original if _is_norm(original[m])}
        self._owners: dict[int, list[nn.Module]] = {}  # of a parameter or buffer; None is no tensor
        for module in original:
            for value in (*module._parameters.values(), *module._buffers.values()):
                if value is not None:
                    self._owners.setdefault(id(value), []).append(module)
        self._source: dict[int, tuple[torch.Tensor, nn.Module]] = {}  # output -> layer; kept, so that ids stay theirs

    def pairs(self, output: Any) -> list[tuple[nn.Module, nn.Module]]:
        """The layers and their norms, given what the model has returned."""
        for value in tree_iter(output):
            self._use(value)
            self._excluded.update(self._owners.get(id(value), ()))
        for kept, layer in self._source.values():
            if sys.getrefcount(kept) > 3:  # ours are the pair, this loop and the call
                self._excluded.add(layer)
        return [
            (self._original[layer], self._original[norm])
            for layer, norm in self._norm_of.items()
            if not {layer, norm} & self._excluded and self._runs[layer] == self._runs[norm] == 1
        ]

    def enter(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._runs[module] = self._runs.get(module, 0) + 1
        layer = self._layer(args[0]) if len(args) == 1 and not kwargs else None
        if layer is not None and module in self._norms:
            if layer in self._norm_of or module.training:
                self._excluded.add(layer)
            self._norm_of[layer] = module
        self._stack.append(module)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._stack.pop()
        # the channels of a linear layer's output are where those of a norm's input are in matrices only
        fits = isinstance(output, torch.Tensor) and (output.ndim == 2 or not isinstance(module, nn.Linear))
        if fits and module in self._layers:
            self._source[id(output)] = (output, module)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        inside = self._stack[-1] if self._stack else None
        output = func(*args, **(kwargs or {}))
        if getattr(func, '__name__', '') not in _HARMLESS or isinstance(output, torch.Tensor):  # x.T is a `__get__` too
            for value in tree_iter((args, kwargs)):
                self._excluded.update(owner for owner in self._owners.get(id(value), ()) if owner is not inside)
                if self._norm_of.get(self._layer(value)) not in self._stack:
                    self._use(value)
        return output

    def _layer(self, value: Any) -> Any:
        return self._source[id(value)][1] if id(value) in self._source else None

    def _use(self, value: Any) -> None:
        if id(value) in self._source:
            self._excluded.add(self._source[id(value)][1])

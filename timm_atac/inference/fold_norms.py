"""Folds the BatchNorms of a model into the convolutions and linear layers before them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.layers import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch.nn.utils import fuse_conv_bn_weights
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from ..utils.forward_pass import ForwardObserver
from ..utils.op_by_op import has_hooks

__all__ = ['Adjacency', 'fold']

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, nn.Linear)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d),
    *(BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d),
)
_METADATA_ONLY = ('__get__', 'dim', 'size', '__len__', 'is_contiguous', 'stride', '__hash__')


@torch.no_grad()
def fold(layer: Any, norm: Any) -> None:
    """Change a layer so that it computes `norm(layer(x))` with the running statistics, and remove the norm's part.

    The new weights are computed in float64 and rounded once. Both modules keep their identity: other references to
    them see the change.

    Args:
        layer: Convolution or linear layer. It gets a bias.
        norm: BatchNorm, which becomes an `nn.Identity`. A norm of timm that has an activation becomes an
            `nn.Sequential` of its `drop` and `act`.
    """
    values = (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    exact: Any = [v.detach().cpu().double() if isinstance(v, torch.Tensor) else v for v in values]
    weight, bias = fuse_conv_bn_weights(*exact)  # right for a linear layer too, and the norm may have no weight
    reference, requires_grad = layer.weight, layer.weight.requires_grad
    layer.weight = nn.Parameter(torch.empty_like(reference).copy_(weight), requires_grad=requires_grad)
    layer.bias = nn.Parameter(reference.new_empty(len(bias)).copy_(bias), requires_grad=requires_grad)
    norm._modules = {name: norm._modules[name] for name in ('drop', 'act') if name in norm._modules}
    norm.__class__ = nn.Sequential if norm._modules else nn.Identity
    norm._parameters.clear()
    norm._buffers.clear()


class Adjacency(ForwardObserver):
    """Finds the layers whose output is the input of one BatchNorm and is not used or kept elsewhere.

    Layer and norm have to run exactly once, and no other code may use their parameters or buffers.

    Args:
        original_of: For each module that runs, the module of the model that it is a copy of.
    """

    def __init__(self, original_of: Mapping[nn.Module, nn.Module]) -> None:
        super().__init__()
        self._original_of = original_of
        # the hooks of this observer itself are not yet registered
        without_hooks = {module: original for module, original in original_of.items() if not has_hooks(original)}
        self._layers = {module for module in without_hooks if type(module) in _LAYERS}
        self._norms = {m for m in without_hooks if type(m) in _NORMS and m.running_mean is not None}
        self._owners: dict[int, set[nn.Module]] = defaultdict(set)  # by the id of a parameter or buffer
        for module in original_of:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._owners[id(tensor)].add(module)
        self._running: list[nn.Module] = []
        self._runs: Counter[nn.Module] = Counter()
        self._norm_of: dict[nn.Module, nn.Module] = {}
        self._excluded: set[nn.Module | None] = set()
        self._layer_of = WeakTensorKeyDictionary()  # by its output, which is not kept alive

    def pairs(self, output: Any) -> list[tuple[nn.Module, nn.Module]]:
        """Return each layer that can be folded, with its norm.

        Args:
            output: The output of the model.
        """
        for value in tree_iter(output):
            self._excluded |= self._owners.get(id(value), set())
        self._excluded.update(self._layer_of.values())  # these outputs are still alive, so other code keeps them
        return [
            (self._original_of[layer], self._original_of[norm])
            for layer, norm in self._norm_of.items()
            if not {layer, norm} & self._excluded and self._runs[layer] == self._runs[norm] == 1
        ]

    def before_module(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._runs[module] += 1
        self._running.append(module)
        layer = self._find_layer(args[0]) if len(args) == 1 and not kwargs else None
        if layer is not None and module in self._norms:
            if layer in self._norm_of or module.training:
                self._excluded.add(layer)
            self._norm_of[layer] = module

    def after_module(self, module: nn.Module, output: Any) -> None:
        self._running.pop()
        # a linear layer has its channels in the last dimension, a BatchNorm in the second
        same_channel_dim = isinstance(output, torch.Tensor) and (output.ndim == 2 or not isinstance(module, nn.Linear))
        if module in self._layers and same_channel_dim:
            self._layer_of[output] = module

    def after_function(self, function: Callable, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        if getattr(function, '__name__', '') in _METADATA_ONLY and not isinstance(output, torch.Tensor):
            return  # x.T is a `__get__` too, and a tensor
        caller = self._running[-1:]
        for value in tree_iter((args, kwargs)):
            self._excluded |= self._owners.get(id(value), set()).difference(caller)
            layer = self._find_layer(value)
            if self._norm_of.get(layer) not in self._running:
                self._excluded.add(layer)

    def _find_layer(self, value: Any) -> Any:
        """Return the layer that a value is the output of, or None."""
        return self._layer_of.get(value) if isinstance(value, torch.Tensor) else None

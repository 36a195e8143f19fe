"""Finds in forward passes which BatchNorm can be folded into which layer, and which can become a scale and a shift."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from ..utils.forward_pass import ForwardObserver
from ..utils.op_by_op import has_hooks

__all__ = ['Adjacency', 'Findings', 'combine']

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, nn.Linear)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d),
    *(BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d),
)
_METADATA_ONLY = ('__get__', 'dim', 'size', '__len__', 'is_contiguous', 'stride', '__hash__')


@dataclass
class Findings:
    """What forward passes have shown, by the modules of the model.

    Attributes:
        layer_of: For each norm that can be folded, the layer.
        ndim_of: For each norm that can become a scale and a shift, the number of dimensions of its input. Norms that
            can be folded are among them.
        unused: Modules that neither ran, nor does other code use their parameters or buffers.
    """

    layer_of: dict[nn.Module, nn.Module]
    ndim_of: dict[nn.Module, int]
    unused: set[nn.Module]

    @property
    def alone(self) -> dict[nn.Module, int]:
        """`ndim_of` without the norms that can be folded."""
        return {norm: ndim for norm, ndim in self.ndim_of.items() if norm not in self.layer_of}

    def of_hooked(self, hooked: bool) -> 'Findings':
        """Return the norms with hooks on them or on their layer, or the others."""
        pairs = {
            norm: layer for norm, layer in self.layer_of.items() if hooked == (has_hooks(norm) or has_hooks(layer))
        }
        alone = {norm: ndim for norm, ndim in self.ndim_of.items() if hooked == has_hooks(norm)}
        return Findings(pairs, alone, self.unused)


def combine(findings: Sequence[Findings]) -> Findings:
    """Return what holds in the first of several forward passes, and in each other one in which the modules are used."""
    first, *others = findings
    layer_of, ndim_of = dict(first.layer_of), dict(first.ndim_of)
    for other in others:
        layer_of = {
            norm: layer
            for norm, layer in layer_of.items()
            if other.layer_of.get(norm) is layer or {norm, layer} <= other.unused
        }
        ndim_of = {
            norm: ndim for norm, ndim in ndim_of.items() if other.ndim_of.get(norm) == ndim or norm in other.unused
        }
    return Findings(layer_of, ndim_of, set.intersection(*(f.unused for f in findings)))


class Adjacency(ForwardObserver):
    """Finds the layers whose output is the input of one BatchNorm and is not used or kept elsewhere.

    Layer and norm have to run exactly once, and no other code may use their parameters or buffers. A norm that stays
    alone may run several times. Modules with hooks are found as well.

    Args:
        original_of: For each module that runs, the module of the model that it is a copy of.
    """

    def __init__(self, original_of: Mapping[nn.Module, nn.Module]) -> None:
        super().__init__()
        self._original_of = original_of
        self._layers = {module for module in original_of if type(module) in _LAYERS}
        self._norms = {m for m in original_of if type(m) in _NORMS and m.running_mean is not None}
        self._owners: dict[int, set[nn.Module]] = defaultdict(set)  # by the id of a parameter or buffer
        for module in original_of:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._owners[id(tensor)].add(module)
        self._running: list[nn.Module] = []
        self._runs: Counter[nn.Module] = Counter()
        self._norm_of: dict[nn.Module, nn.Module] = {}
        self._ndims: dict[nn.Module, set[int]] = defaultdict(set)  # of a norm's inputs
        self._excluded: set[nn.Module] = set()
        self._layer_of = WeakTensorKeyDictionary()  # by its output, which is not kept alive

    def findings(self, output: Any) -> Findings:
        """Return which norms can be folded, and which can become a scale and a shift.

        Args:
            output: The output of the model.
        """
        for value in tree_iter(output):
            self._excluded |= self._owners.get(id(value), set())
        self._excluded.update(self._layer_of.values())  # these outputs are still alive, so other code keeps them
        original = self._original_of
        layer_of = {
            original[norm]: original[layer]
            for layer, norm in self._norm_of.items()
            if not {layer, norm} & self._excluded and self._runs[layer] == self._runs[norm] == 1
        }
        ndim_of = {
            original[norm]: next(iter(ndims))
            for norm, ndims in self._ndims.items()
            if norm not in self._excluded and len(ndims) == 1
        }
        unused = {original[m] for m in original if m not in self._runs and m not in self._excluded}
        return Findings(layer_of, ndim_of, unused)

    def before_module(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._runs[module] += 1
        self._running.append(module)
        if module not in self._norms:
            return
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, torch.Tensor) or module.training:
            self._excluded.add(module)
            return
        self._ndims[module].add(x.ndim)
        layer = self._layer_of.get(x)
        if layer is not None:
            if layer in self._norm_of:
                self._excluded.add(layer)
            self._norm_of[layer] = module

    def after_module(self, module: nn.Module, output: Any) -> None:
        self._running.pop()
        # a linear layer has its channels in the last dimension, a BatchNorm in the second
        same_channel_dim = isinstance(output, torch.Tensor) and (output.ndim == 2 or not isinstance(module, nn.Linear))
        if module in self._layers and same_channel_dim:
            self._layer_of[output] = module

    def after_function(self, function: Callable, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        # x.T is a `__get__` too, and a tensor
        metadata = getattr(function, '__name__', '') in _METADATA_ONLY and not isinstance(output, torch.Tensor)
        caller = self._running[-1:]
        for value in _tensors(*args, *kwargs.values()):
            users = self._owners.get(id(value), set()).difference(caller)
            if metadata:
                self._excluded |= users & self._norms  # a norm loses its tensors, a layer gets others of the same form
                continue
            self._excluded |= users
            layer = self._layer_of.get(value)
            if layer is not None and self._norm_of.get(layer) not in self._running:
                self._excluded.add(layer)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and _is_eval_on_meta(args, kwargs or {}):
            output = torch.empty_like(args[0])  # PyTorch's own way to this takes most of the time of a pass
            self.call(self.after_function, func, args, kwargs, output)
            return output
        return super().__torch_function__(func, types, args, kwargs)


def _tensors(*values: Any) -> Iterator[torch.Tensor]:
    """The tensors among values and in their containers. Most values are tensors or have none, which saves time."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif value is not None and type(value) not in (int, float, bool, str):
            yield from (leaf for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor))


def _is_eval_on_meta(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """True if the arguments of `F.batch_norm` are a call in evaluation mode on `meta` that would not fail."""
    if len(args) != 3 or kwargs.get('training') is not False:
        return False
    x, mean, _ = args
    return x.is_meta and x.ndim > 1 and mean is not None and len(mean) == x.shape[1]

"""Observes one forward pass: which activations run, which module calls each, and the shape and layout of its input."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from ..utils.flops import FlopCounter
from ..utils.forward_pass import ForwardObserver, observe_forward
from .flow import Flow, Node

__all__ = ['ACTIVATION_TYPES', 'FUNCTIONS', 'Call', 'Invocation', 'Trace', 'is_activation', 'trace']

# Leaf modules with such names are activations. Sigmoid, tanh and softmax are not: they make gates and distributions.
_ACTIVATION = re.compile(r'relu|gelu|silu|selu|celu|^elu|swish|mish|^gammaact$|^softplus$|^softsign$', re.IGNORECASE)
ACTIVATION_TYPES: dict[str, type[nn.Module]] = {  # by the name of the function that computes the same
    'relu': nn.ReLU,
    'relu6': nn.ReLU6,
    'leaky_relu': nn.LeakyReLU,
    'prelu': nn.PReLU,
    'elu': nn.ELU,
    'celu': nn.CELU,
    'selu': nn.SELU,
    'gelu': nn.GELU,
    'silu': nn.SiLU,
    'mish': nn.Mish,
    'hardswish': nn.Hardswish,
}
FUNCTIONS: dict[Any, str] = {
    getattr(namespace, variant): name
    for name in ACTIVATION_TYPES
    for variant in (name, f'{name}_')
    for namespace in (F, torch, torch.Tensor)
    if hasattr(namespace, variant)
}
_CHANNELS_FIRST = re.compile(
    r'^(conv(_transpose)?(?P<dims>[123])d|(batch|group|instance)_norm|.*pool[123]d.*|pixel_(un)?shuffle|channel_shuffle)$'
)
_CHANNELS_LAST = ('linear', 'layer_norm', 'rms_norm')
_PERMUTATIONS = ('permute', 'transpose', 'swapaxes', 'swapdims', 'movedim', 'moveaxis')
_WITHOUT_CHANNELS = (  # no dimension of their output is known to be the channels
    *('matmul', '__matmul__', 'bmm', 'mm', 'einsum', 'scaled_dot_product_attention'),
    '__get__',  # of attributes such as x.mT
)


@dataclass
class Call:
    """One call of an activation."""

    activation: nn.Module | str  # the module, or the name of the function
    shape: tuple[int, ...]  # of the input
    channel_dim: int | None  # 1 or the last dimension of the input, None if it is unknown
    layer: nn.Module | None  # the convolution, linear or normalisation layer that ran last before the call
    step: int  # its time in the forward pass
    source: Node | None = None  # the operation that made the input, None if it does not depend on the model's input
    node: Node | None = None  # the call itself

    @property
    def width(self) -> tuple[int, str] | None:
        """Channels and layout of the input, None if they are unknown."""
        dims = len(self.shape)
        if self.channel_dim is None or dims < 2:
            return None
        if self.channel_dim == 1 and dims > 2:
            return self.shape[1], 'NCHW' if dims == 4 else 'NCL'
        return self.shape[-1], 'NHWC' if dims == 4 else 'NLC'


@dataclass
class Invocation:
    """One run of a module's forward, with the calls of activations in its own code, in their order."""

    module: nn.Module
    arguments: tuple[int, tuple[str, ...]]  # number of positional arguments, names of keyword arguments
    start: int
    end: int = sys.maxsize
    calls: list[Call] = field(default_factory=list)
    output: Node | None = None  # the operation that made the first tensor of the output
    flops: int = 0  # of convolutions and matrix products, two for each multiply-add


@dataclass
class Trace:
    """All invocations of a forward pass, in the order in which they start."""

    invocations: list[Invocation]
    output: Any
    on_meta: bool
    flow: Flow = field(default_factory=Flow)

    def calls(self) -> Iterator[tuple[Invocation, Call]]:
        """All calls of activations, each with the invocation that it is part of."""
        return ((invocation, call) for invocation in self.invocations for call in invocation.calls)


def is_activation(module: nn.Module) -> bool:
    """True if a module has no children and its class has the name of an activation."""
    return not any(True for _ in module.children()) and _ACTIVATION.search(type(module).__name__) is not None


def trace(model: nn.Module, inputs: tuple, activations: set[nn.Module]) -> Trace:
    """Run `model(*inputs)` in evaluation mode without gradients, on `meta` if possible, and record the activations.

    Args:
        model: Unchanged afterwards, except for attributes that its own code sets if it does not run on `meta`.
        inputs: Positional arguments.
        activations: Modules that count as activations.

    Raises:
        ForwardError: The model raises an exception on its own device.
    """
    # PyTorch has no formula for the attention kernels of CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        observer, output, on_meta = observe_forward(
            model, inputs, lambda original_of: _Tracer(activations, original_of, counter)
        )
    _unmark(model, inputs)
    return Trace(observer.invocations, output, on_meta, observer.flow)


def _unmark(model: nn.Module, inputs: tuple) -> None:
    """Delete the marks on tensors that outlive the forward pass. Functions that work in place return such tensors."""
    own = (value for module in model.modules() for value in (*module._buffers.values(), *vars(module).values()))
    for tensor in (*tree_leaves(inputs), *model.parameters(), *own):
        if isinstance(tensor, torch.Tensor):
            for name in ('_timm_atac_node', '_timm_atac_call', '_timm_atac_dim'):
                vars(tensor).pop(name, None)


class _Tracer(ForwardObserver):
    """Keeps the stack of running modules, and follows the channel dimension from tensor to tensor.

    A tensor has the dimension as `_timm_atac_dim`, and the call of an activation that made it as `_timm_atac_call`.
    """

    def __init__(
        self, activations: set[nn.Module], original_of: Mapping[nn.Module, nn.Module], counter: FlopCounter
    ) -> None:
        super().__init__()
        self._counter = counter
        self._activations = activations
        self._original_of = original_of
        self.invocations: list[Invocation] = []
        self._running: list[Invocation] = []
        self._arguments: list[tuple[tuple, dict[str, Any]]] = []  # of the running modules
        self._last_layer: tuple[nn.Module | None, int | None] = (None, None)  # with the channels of its output
        self._step = 0
        self.flow = Flow()

    def before_module(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._step += 1
        module = self._original_of[module]
        if not self._running:
            self.flow.add_inputs((args, dict(kwargs)))
        if module in self._activations and args and isinstance(args[0], torch.Tensor):
            self._record_call(module, args[0])
        self._running.append(Invocation(module, (len(args), tuple(kwargs)), self._step, flops=-self._counter.flops))
        self._arguments.append((args, dict(kwargs)))
        self.invocations.append(self._running[-1])

    def after_module(self, module: nn.Module, output: Any) -> None:
        self._step += 1
        invocation, arguments = self._running.pop(), self._arguments.pop()
        invocation.end = self._step
        invocation.flops += self._counter.flops
        caller = self._running[-1] if self._running else None
        call = caller.calls[-1] if caller is not None and caller.calls else None
        if call is not None and call.activation is invocation.module and isinstance(output, torch.Tensor):
            output._timm_atac_call = call  # type: ignore[attr-defined]
            call.node = self.flow.add_activation(call.source, output, self._step, caller)
        else:
            self.flow.connect(arguments, output, self._step, invocation)
        invocation.output = next((self.flow.node_of(t) for t in tree_leaves(output)), None)

    def after_function(self, function: Callable, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        name = getattr(function, '__name__', '')
        if 'input' in kwargs:
            args = (kwargs['input'], *args)
        module = self._running[-1].module if self._running else None
        outputs = [
            t for t in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(t, torch.Tensor)
        ]
        self._follow_layout(name, module, args, kwargs, outputs)
        if function in FUNCTIONS and module not in self._activations and args and isinstance(args[0], torch.Tensor):
            call = self._record_call(FUNCTIONS[function], args[0])
            if call is not None and outputs:
                outputs[0]._timm_atac_call = call  # type: ignore[attr-defined]
                call.node = self.flow.add_activation(call.source, outputs[0], self._step, self._running[-1])
                return
        self.flow.add_function(function, args, kwargs, output, self._step, self._running[-1] if self._running else None)

    def _follow_layout(
        self, name: str, module: nn.Module | None, args: tuple, kwargs: Mapping[str, Any], outputs: list[torch.Tensor]
    ) -> None:
        """Set the channel dimension of the outputs of a function, and of an input if it was unknown until now."""
        if not _has_known_layout(name, args):
            for t in outputs:
                _propagate(name, args, kwargs, t)
            return
        channels_last = name in _CHANNELS_LAST
        _resolve(args[0], channels_last)
        for t in outputs:
            if t.ndim > 1:
                # a norm may get its tokens as (B * N, C)
                dim = t.ndim - 1 if channels_last or t.ndim == 2 else 1
                t._timm_atac_dim = dim  # type: ignore[attr-defined]
                if 'pool' not in name:
                    self._last_layer = (module, t.shape[dim])

    def _record_call(self, activation: nn.Module | str, x: torch.Tensor) -> Call | None:
        """Add a call to the running invocation and return it. A model that is an activation itself has none."""
        if not self._running:
            return None
        layer, channels = self._last_layer
        dim = _channel_dim(x, channels)
        call = Call(activation, tuple(x.shape), dim, layer, self._step, self.flow.node_of(x))
        self._running[-1].calls.append(call)
        return call


def _channel_dim(x: torch.Tensor, last_channels: int | None) -> int | None:
    """Return the dimension of the channels. If it was not followed, it is the only one with the last layer's channels.

    If that is not unique either, it is None until the next layer shows it (`_resolve`).
    """
    dim = getattr(x, '_timm_atac_dim', None)
    if dim is not None or x.ndim < 2:
        return dim
    if x.ndim == 2:
        return 1
    candidates = [d for d in (1, x.ndim - 1) if x.shape[d] == last_channels]
    return candidates[0] if len(candidates) == 1 else None


def _has_known_layout(name: str, args: tuple) -> bool:
    """True for a function whose output has its channels where all functions of its kind have them."""
    if name == 'layer_norm':
        return len(args) > 1 and len(args[1]) == 1  # over several dimensions, any layout is possible
    channels_first = _CHANNELS_FIRST.match(name)
    if channels_first and channels_first['dims'] and isinstance(args[0], torch.Tensor):
        return args[0].ndim == int(channels_first['dims']) + 2  # not for an image without a batch dimension
    return channels_first is not None or name in _CHANNELS_LAST


def _resolve(x: Any, channels_last: bool) -> None:
    """Set the unknown channel dimension of a call whose output is the input of a layer with a known layout."""
    call = getattr(x, '_timm_atac_call', None)
    if call is not None and call.channel_dim is None and len(call.shape) == x.ndim:
        call.channel_dim = x.ndim - 1 if channels_last else 1


def _propagate(name: str, args: tuple, kwargs: Mapping[str, Any], output: torch.Tensor) -> None:
    """Copy the channel dimension and the call from the inputs of a function to its output, where they are certain."""
    flat = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else [arg])]
    tensors = [a for a in flat if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        if hasattr(tensor, '_timm_atac_call') and tensor.shape == output.shape:
            output._timm_atac_call = tensor._timm_atac_call  # type: ignore[attr-defined]
    source = next((t for t in tensors if hasattr(t, '_timm_atac_dim')), None)
    if source is None or source is output or output.ndim < 2 or name in _WITHOUT_CHANNELS:
        return
    dim: int = source._timm_atac_dim  # type: ignore[attr-defined]
    last, new_last = source.ndim - 1, output.ndim - 1
    new: int | None = None
    if name in _PERMUTATIONS:
        new = _permuted(name, args, kwargs, dim, source.ndim)
    elif last == new_last and (output.shape[dim] == source.shape[dim] or _differ_only_in(dim, output, source)):
        new = dim
    elif dim == last and output.shape[-1] == source.shape[-1]:
        new = new_last
    elif dim == 1 and output.shape[1] == source.shape[1]:
        new = 1
    if new in (1, new_last):
        output._timm_atac_dim = new  # type: ignore[attr-defined]


def _differ_only_in(dim: int, a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if all other sizes of two shapes are equal."""
    return all(x == y for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if d != dim)


def _permuted(name: str, args: tuple, kwargs: Mapping[str, Any], dim: int, dims: int) -> int:
    """Return the position of `dim` after a permutation, which is run on a tensor with the sizes 1, 2, 3, ..."""
    probe = torch.empty(tuple(range(1, dims + 1)), device='meta')
    permuted = getattr(torch.Tensor, name)(probe, *args[1:], **{k: v for k, v in kwargs.items() if k != 'input'})
    return list(permuted.shape).index(dim + 1)

"""One forward pass, watched: which activations run, who calls them, and on which feature maps.

Runs on the `meta` device where the model can, so that nothing is computed and no memory is spent.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..utils.forward_pass import ForwardObserver, observe_forward

__all__ = ['Call', 'Invocation', 'Trace', 'is_activation', 'trace']

# Leaf modules with such names are activations; sigmoid, tanh and softmax are not: they make gates and distributions.
_ACTIVATION = re.compile(r'relu|gelu|silu|selu|celu|^elu|swish|mish|^gammaact$|^softplus$|^softsign$', re.IGNORECASE)
FUNCTIONS: dict[Any, str] = {
    function: name
    for name in ('relu', 'relu6', 'leaky_relu', 'prelu', 'elu', 'celu', 'selu', 'gelu', 'silu', 'mish', 'hardswish')
    for home in (F, torch, torch.Tensor)
    for function in (getattr(home, name, None), getattr(home, f'{name}_', None))
    if function is not None
}
_CHANNELS_FIRST = re.compile(
    r'^(conv(_transpose)?(?P<dims>[123])d|(batch|group|instance)_norm|.*pool[123]d.*|pixel_(un)?shuffle|channel_shuffle)$'
)
_CHANNELS_LAST = ('linear', 'layer_norm', 'rms_norm')


@dataclass
class Call:
    """An activation that ran."""

    activation: nn.Module | str  # the module, or the name of the function
    shape: tuple[int, ...]  # of its input
    channel_dim: int | None  # 1 or the last; None: could not be followed
    layer: nn.Module | None  # the last convolution, linear or normalisation layer before it
    step: int  # when

    @property
    def width(self) -> tuple[int, str] | None:
        """Channels and layout of the input, None where they cannot be told."""
        dims = len(self.shape)
        if self.channel_dim is None or dims < 2:
            return None
        if self.channel_dim == 1 and dims > 2:
            return self.shape[1], 'NCHW' if dims == 4 else 'NCL'
        return self.shape[-1], 'NHWC' if dims == 4 else 'NLC'


@dataclass
class Invocation:
    """One run of a module's forward, and the activations it called itself, in order."""

    module: nn.Module
    arguments: tuple[int, tuple[str, ...]]  # how many positional, and the names of the others
    start: int
    end: int = sys.maxsize
    calls: list[Call] = field(default_factory=list)


@dataclass
class Trace:
    """Every invocation of a forward pass, in the order of their beginnings."""

    invocations: list[Invocation]
    output: Any
    on_meta: bool

    def calls(self) -> Iterator[tuple[Invocation, Call]]:
        for invocation in self.invocations:
            for call in invocation.calls:
                yield invocation, call


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation: a leaf with the name of one."""
    return not any(True for _ in module.children()) and _ACTIVATION.search(type(module).__name__) is not None


def trace(model: nn.Module, inputs: tuple, watch: set[nn.Module]) -> Trace:
    """Run `model(*inputs)` with `eval()` and no gradients, on `meta` where possible, and watch the activations.

    Args:
        model: Unchanged afterwards, but for what its own code leaves in it if it does not run on `meta`.
        inputs: Positional arguments.
        watch: Modules that are taken for activations.

    Raises:
        Exception: What the forward pass raises on the model's own device.
    """
    watcher, output, on_meta = observe_forward(model, inputs, lambda original: _Watcher(watch, original))
    return Trace(watcher.invocations, output, on_meta)


class _Watcher(ForwardObserver):
    """Follows the channel dimension through PyTorch's functions, and keeps the stack of running modules."""

    def __init__(self, watch: set[nn.Module], original: Mapping[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.watch = watch
        self._original = original
        self.invocations: list[Invocation] = []
        self._stack: list[Invocation] = []
        self._last: tuple[nn.Module | None, int] | None = None  # layer, its channels
        self._step = 0

    def enter(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._step += 1
        module = self._original[module]
        if module in self.watch and args and isinstance(args[0], torch.Tensor):
            self._call(module, args[0])
        self._stack.append(Invocation(module, (len(args), tuple(kwargs)), self._step))
        self.invocations.append(self._stack[-1])

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._step += 1
        left = self._stack.pop()
        left.end = self._step
        calls = self._stack[-1].calls if self._stack else []
        if calls and calls[-1].activation is left.module and isinstance(output, torch.Tensor):
            output._timm_atac_call = calls[-1]  # type: ignore[attr-defined]

    def _call(self, activation: nn.Module | str, x: torch.Tensor) -> None:
        if self._stack:
            layer = self._last[0] if self._last is not None else None
            self._stack[-1].calls.append(Call(activation, tuple(x.shape), self._channel_dim(x), layer, self._step))

    def _channel_dim(self, x: torch.Tensor) -> int | None:
        """Dimension of the channels; of a tensor that could not be followed, the one that fits the last layer.

        None where neither tells: then the next layer does (`_resolve`), or nobody.
        """
        dim = getattr(x, '_timm_atac_dim', None)
        if dim is None and x.ndim == 2:
            return 1
        if dim is None and self._last is not None and x.ndim > 1:
            fits = [d for d in {1, x.ndim - 1} if x.shape[d] == self._last[1]]
            dim = fits[0] if len(fits) == 1 else None
        return dim

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inside = self._stack[-1].module if self._stack else None
        name = getattr(func, '__name__', '')
        is_call = func in FUNCTIONS and inside not in self.watch and args and isinstance(args[0], torch.Tensor)
        if is_call:
            self._call(FUNCTIONS[func], args[0])
        if _tells_channels(name, args):
            _resolve(args[0], last=name in _CHANNELS_LAST)
        output = func(*args, **kwargs)
        if is_call and self._stack and isinstance(output, torch.Tensor):
            output._timm_atac_call = self._stack[-1].calls[-1]  # type: ignore[attr-defined]
        outputs = [
            t for t in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(t, torch.Tensor)
        ]
        if _tells_channels(name, args):
            for t in outputs:
                if t.ndim > 1:
                    last = name in _CHANNELS_LAST or t.ndim == 2  # (B * N, C): tokens, on their way through a norm
                    dim = t.ndim - 1 if last else 1
                    t._timm_atac_dim = dim  # type: ignore[attr-defined]
                    if 'pool' not in name:
                        self._last = (inside, t.shape[dim])
        else:
            for t in outputs:
                _follow(name, args, kwargs, t)
        return output


def _tells_channels(name: str, args: tuple) -> bool:
    """Whether a function's output has its channels where functions of that kind have them."""
    if name == 'layer_norm':
        return len(args) > 1 and len(args[1]) == 1  # over more dimensions it may be any layout's
    first = _CHANNELS_FIRST.match(name)
    if first and first['dims'] and isinstance(args[0], torch.Tensor):
        return args[0].ndim == int(first['dims']) + 2  # one dimension less is one image without its batch
    return first is not None or name in _CHANNELS_LAST


def _resolve(x: Any, last: bool) -> None:
    """Let the layer that takes an activation's output tell its channels, where nothing before it has."""
    call = getattr(x, '_timm_atac_call', None)
    if call is not None and call.channel_dim is None and len(call.shape) == x.ndim:
        call.channel_dim = x.ndim - 1 if last else 1


def _follow(name: str, args: tuple, kwargs: Mapping[str, Any], output: torch.Tensor) -> None:
    """Give a function's output the channel dimension of its input, and its activation, where that is clear."""
    flat = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else [arg])]
    for call in (a._timm_atac_call for a in flat if hasattr(a, '_timm_atac_call') and a.shape == output.shape):
        output._timm_atac_call = call  # type: ignore[attr-defined]
    source = next((a for a in flat if isinstance(a, torch.Tensor) and hasattr(a, '_timm_atac_dim')), None)
    if source is None or source is output or output.ndim < 2:
        return
    dim, dims = source._timm_atac_dim, source.ndim
    new: int | None = None
    if name in ('permute', 'transpose', 'swapaxes', 'swapdims', 'movedim', 'moveaxis'):
        new = _permuted(name, args, kwargs, dim, dims)
    elif name in ('matmul', '__matmul__', 'bmm', 'mm', 'einsum', 'scaled_dot_product_attention', '__get__'):
        return  # `__get__` is of attributes, such as x.mT
    elif output.ndim == dims and (output.shape[dim] == source.shape[dim] or _same_but(output, source, dim)):
        new = dim
    elif dim == dims - 1 and output.shape[-1] == source.shape[-1]:
        new = output.ndim - 1
    elif dim == 1 and output.shape[1] == source.shape[1]:
        new = 1
    if new is not None and new in (1, output.ndim - 1):
        output._timm_atac_dim = new  # type: ignore[attr-defined]


def _same_but(a: torch.Tensor, b: torch.Tensor, dim: int) -> bool:
    return all(x == y for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if d != dim)


def _permuted(name: str, args: tuple, kwargs: Mapping[str, Any], dim: int, dims: int) -> int | None:
    """Where a permutation of dimensions puts `dim`: by running it on a tensor whose sizes are the dimensions."""
    probe = torch.empty(tuple(range(1, dims + 1)), device='meta')
    moved = getattr(torch.Tensor, name)(probe, *args[1:], **{k: v for k, v in kwargs.items() if k != 'input'})
    return list(moved.shape).index(dim + 1)

"""One forward pass, watched: which activations run, who calls them, and on which feature maps.

Runs on the `meta` device where the model can, so that nothing is computed and no memory is spent.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

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
_CHANNELS_FIRST = re.compile(r'^(conv(_transpose)?[123]d|(batch|group|instance)_norm|.*pool[123]d.*)$')
_CHANNELS_LAST = ('linear', 'layer_norm', 'rms_norm')


@dataclass
class Call:
    """An activation that ran."""

    activation: nn.Module | str  # the module, or the name of the function
    shape: tuple[int, ...]  # of its input
    channel_dim: int | None  # 1 or the last; None: could not be followed
    layer: nn.Module | None  # the last convolution, linear or normalisation layer before it
    step: int  # when


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

    def calls(self) -> Iterator[tuple[Invocation, Call]]:
        for invocation in self.invocations:
            for call in invocation.calls:
                yield invocation, call


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation: a leaf with the name of one."""
    return not any(True for _ in module.children()) and _ACTIVATION.search(type(module).__name__) is not None


def trace(model: nn.Module, inputs: tuple, watch: set[nn.Module]) -> Trace:
    """Run `model(*inputs)` in inference mode, on `meta` where possible, and watch the activations in `watch`.

    Args:
        model: Unchanged afterwards.
        inputs: Positional arguments.
        watch: Modules that are taken for activations.

    Raises:
        Exception: What the forward pass raises on the model's own device.
    """
    try:
        return _run(model, inputs, watch, on_meta=True)
    except Exception:  # meta tensors have no values to branch on, and tensors that are no buffers stay where they are
        return _run(model, inputs, watch, on_meta=False)


def _run(model: nn.Module, inputs: tuple, watch: set[nn.Module], on_meta: bool) -> Trace:
    tensors: dict[str, torch.Tensor] = {}
    if on_meta:
        inputs = torch.utils._pytree.tree_map_only(torch.Tensor, _to_meta, inputs)
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        tensors = {name: _to_meta(t) for name, t in named}
    watcher = _Watcher(watch)
    with ExitStack() as stack:
        stack.enter_context(_inference(model))
        stack.enter_context(torch.no_grad())
        for module in dict.fromkeys(model.modules()):
            handles = (
                module.register_forward_pre_hook(watcher.enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(watcher.leave),
            )
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(watcher)
        output = torch.func.functional_call(model, tensors, inputs, tie_weights=False) if on_meta else model(*inputs)
    return Trace(watcher.invocations, output)


def _to_meta(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to('meta')


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Watcher(TorchFunctionMode):
    """Follows the channel dimension through PyTorch's functions, and keeps the stack of running modules."""

    def __init__(self, watch: set[nn.Module]) -> None:
        super().__init__()
        self.watch = watch
        self.invocations: list[Invocation] = []
        self._stack: list[Invocation] = []
        self._last: tuple[nn.Module | None, int, bool] | None = None  # layer, its channels, whether they come last
        self._step = 0

    def enter(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._step += 1
        if module in self.watch and args and isinstance(args[0], torch.Tensor):
            self._call(module, args[0])
        self._stack.append(Invocation(module, (len(args), tuple(kwargs)), self._step))
        self.invocations.append(self._stack[-1])

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._step += 1
        self._stack.pop().end = self._step

    def _call(self, activation: nn.Module | str, x: torch.Tensor) -> None:
        if self._stack:
            layer = self._last[0] if self._last is not None else None
            self._stack[-1].calls.append(Call(activation, tuple(x.shape), self._channel_dim(x), layer, self._step))

    def _channel_dim(self, x: torch.Tensor) -> int | None:
        dim = getattr(x, '_timm_atac_dim', None)
        if dim is None and self._last is not None and x.ndim > 1:
            _, channels, last = self._last
            fits = [d for d in {1, x.ndim - 1} if x.shape[d] == channels]
            dim = fits[0] if len(fits) == 1 else x.ndim - 1 if last else 1
        return dim

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inside = self._stack[-1].module if self._stack else None
        if func in FUNCTIONS and inside not in self.watch and args and isinstance(args[0], torch.Tensor):
            self._call(FUNCTIONS[func], args[0])
        output = func(*args, **kwargs)
        name = getattr(func, '__name__', '')
        outputs = [
            t for t in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(t, torch.Tensor)
        ]
        if name in _CHANNELS_LAST or _CHANNELS_FIRST.match(name):
            for t in outputs:
                if t.ndim > 1:
                    last = name in _CHANNELS_LAST or t.ndim == 2  # (B * N, C): tokens, on their way through a norm
                    dim = t.ndim - 1 if last else 1
                    t._timm_atac_dim = dim  # type: ignore[attr-defined]
                    if 'pool' not in name:
                        self._last = (inside, t.shape[dim], last)
        else:
            for t in outputs:
                _follow(name, args, kwargs, t)
        return output


def _follow(name: str, args: tuple, kwargs: Mapping[str, Any], output: torch.Tensor) -> None:
    """Give a function's output the channel dimension of its input, where that is clear."""
    flat = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else [arg])]
    source = next((a for a in flat if isinstance(a, torch.Tensor) and hasattr(a, '_timm_atac_dim')), None)
    if source is None or source is output or output.ndim < 2:
        return
    dim, dims = source._timm_atac_dim, source.ndim
    new: int | None = None
    if name in ('permute', 'transpose', 'swapaxes', 'swapdims', 'movedim', 'moveaxis'):
        new = _permuted(name, args, kwargs, dim, dims)
    elif name in ('matmul', '__matmul__', 'bmm', 'mm', 'einsum', 'scaled_dot_product_attention'):
        new = None
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

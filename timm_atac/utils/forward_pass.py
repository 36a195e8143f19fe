"""A forward pass, watched: modules and functions as they run, on the `meta` device where the model can do that.

There nothing is computed and no memory is spent.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .. import _timm

__all__ = ['ForwardObserver', 'evaluation_mode', 'example_inputs', 'floating', 'observe_forward', 'shapes']


class ForwardObserver(TorchFunctionMode, ABC):
    """Sees the modules and functions of a forward pass."""

    @abstractmethod
    def enter(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """A module is about to run."""

    @abstractmethod
    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A module has run."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which no module trains. It restores modes and buffers at its end, also after an exception.

    It sets `training` and does not call `eval()`, which some models override: LoRA layers merge their weights there.

    Args:
        model: Any model. Other state that its forward pass changes is not restored.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, None if buffer.is_meta else buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        if modes[model]:
            model.train()  # a model such as timm's LeViT empties here what it has cached for inference
        for module, training in modes.items():
            module.training = training
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if value is not None and not torch.equal(buffer, value):
                buffer.detach().copy_(value)


W = TypeVar('W', bound=ForwardObserver)


def observe_forward(
    model: nn.Module, inputs: tuple, make: Callable[[Mapping[nn.Module, nn.Module]], W]
) -> tuple[W, Any, bool]:
    """Run `model(*inputs)` with `eval()` and no gradients, on `meta` where possible.

    Args:
        model: Unchanged afterwards, but for what its own code leaves in it if it does not run on `meta`.
        inputs: Positional arguments.
        make: Creates the watcher, given for each module that will run the model's own one that it stands for.

    Returns:
        The watcher, the output, and whether both are of the `meta` device.

    Raises:
        Exception: What the forward pass raises on the model's own device.
    """
    with suppress(Exception):  # meta tensors have no values to branch on, and some code makes tensors on the CPU
        copied, original = _meta_copy(model)
        return (*_run(copied, tree_map_only(torch.Tensor, _to_meta, inputs), make(original)), True)
    return (*_run(model, inputs, make({module: module for module in model.modules()})), False)


def example_inputs(model: nn.Module, example_input: Any = None) -> tuple:
    """Positional arguments for a forward pass: those given, else two images of the size the model was created for."""
    if isinstance(example_input, tuple):
        return example_input
    if example_input is not None:
        return (example_input,)
    like = next(floating(model), torch.empty(0))
    return (torch.zeros(2, *_timm.input_size(model), device=like.device, dtype=like.dtype),)


def _run(model: nn.Module, inputs: tuple, watcher: W) -> tuple[W, Any]:
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        for module in model.modules():
            handles = (
                module.register_forward_pre_hook(watcher.enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(watcher.leave),
            )
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(watcher)
        return watcher, model(*inputs)


def _meta_copy(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy without values, so that what a forward pass leaves in it (cached masks) is not left in the model.

    Returns:
        The copy, and for each of its modules the one it is a copy of.
    """
    memo: dict[int, Any] = {}  # deepcopy takes from here what it would have copied
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor):
                memo[id(value)] = _to_meta(value)
    copied = copy.deepcopy(model, memo)
    return copied, {memo[id(module)]: module for module in model.modules()}


def _to_meta(t: torch.Tensor) -> torch.Tensor:
    meta = t.detach().to('meta')
    return nn.Parameter(meta, requires_grad=False) if isinstance(t, nn.Parameter) else meta


def floating(module: nn.Module | None) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a floating-point type."""
    if module is not None:
        yield from (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def shapes(values: Any) -> Any:
    """The values, with shapes for tensors, for messages."""
    return tree_map_only(torch.Tensor, lambda t: tuple(t.shape), values)

"""One forward pass with an observer of its modules and functions, on the `meta` device where the model can run there.

On `meta` nothing is computed and no memory is used.
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

__all__ = [
    'ForwardError',
    'ForwardObserver',
    'evaluation_mode',
    'example_inputs',
    'floating_point_tensors',
    'observe_forward',
    'observe_on_meta',
]


class ForwardError(ValueError):
    """A model does not run on its example input. The exception that it raised is the `__cause__`."""


class ForwardObserver(TorchFunctionMode, ABC):
    """Is called before and after each module of a forward pass, and after each function of PyTorch.

    Attributes:
        error: The exception that a method of the observer raised, None if there is none.
    """

    error: Exception | None = None

    @abstractmethod
    def before_module(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Called with the arguments of a module that runs next."""

    @abstractmethod
    def after_module(self, module: nn.Module, output: Any) -> None:
        """Called with the output of a module."""

    @abstractmethod
    def after_function(self, function: Callable, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        """Called with the arguments and the output of a function of PyTorch."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.call(self.after_function, func, args, kwargs, output)
        return output

    def call(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method of the observer and keep the exception that it raises."""
        try:
            method(*args)
        except Exception as error:
            self.error = error
            raise


O = TypeVar('O', bound=ForwardObserver)  # noqa: E741


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


def observe_forward(
    model: nn.Module, inputs: tuple, create_observer: Callable[[Mapping[nn.Module, nn.Module]], O]
) -> tuple[O, Any, bool]:
    """Run `model(*inputs)` in evaluation mode without gradients, on the `meta` device if possible.

    A model that cannot be copied to `meta`, or raises an exception there, runs a second time on its own device.

    Args:
        model: Unchanged afterwards, except for attributes that its own code sets when it runs on its own device.
        inputs: Positional arguments.
        create_observer: Gets a dictionary and returns the observer. The keys are the modules that run, the values are
            the modules of `model` that they are copies of (or that they are).

    Returns:
        The observer, the output of the model, and True if the model ran on `meta`.

    Raises:
        ForwardError: The model raises an exception on its own device.
        ValueError: accelerate has offloaded weights of the model.
        Exception: An exception of the observer.
    """
    _check_not_offloaded(model)
    on_meta = observe_on_meta(model, inputs, create_observer)
    if on_meta is not None:
        return *on_meta, True
    observer = create_observer({module: module for module in model.modules()})
    return observer, _run(model, inputs, observer), False


def observe_on_meta(
    model: nn.Module, inputs: tuple, create_observer: Callable[[Mapping[nn.Module, nn.Module]], O]
) -> tuple[O, Any] | None:
    """Run a copy of the model on the `meta` device, as `observe_forward` does.

    Returns:
        The observer and the output, or None if the model does not run there.
    """
    try:
        meta_model, original_of = _meta_copy(model)
        meta_inputs = tree_map_only(torch.Tensor, _to_meta, inputs)
    except Exception:  # of a model or an input that cannot be copied
        return None
    observer = create_observer(original_of)
    with suppress(ForwardError):  # meta tensors have no values to branch on, and some code makes tensors on the CPU
        return observer, _run(meta_model, meta_inputs, observer)
    return None


def _check_not_offloaded(model: nn.Module) -> None:
    """Raise ValueError for a model with hooks of accelerate that load its weights for each forward pass."""
    if not any(hasattr(module, '_hf_hook') for module in model.modules()):
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f'{type(model).__name__} has weights that accelerate has offloaded: {name!r} is only loaded while its '
                f'module runs. Load the model without `device_map`, or take the offloading back by '
                f'accelerate.hooks.remove_hook_from_module(model, recurse=True). Offload the model afterwards.'
            )


def example_inputs(model: nn.Module, example_input: Any = None) -> tuple:
    """Return the positional arguments of a forward pass.

    Args:
        model: The model that gets them.
        example_input: A tuple of all positional arguments, or the only one. None is a batch of two images of the size
            for which timm has created the model, or (2, 3, 224, 224).
    """
    if isinstance(example_input, tuple):
        return example_input
    if example_input is not None:
        return (example_input,)
    reference = next(floating_point_tensors(model), torch.empty(0))
    return (torch.zeros(2, *_timm.input_size(model), device=reference.device, dtype=reference.dtype),)


def floating_point_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers of a floating-point type."""
    return (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def _run(model: nn.Module, inputs: tuple, observer: ForwardObserver) -> Any:
    """Run the model and return its output. Only an exception of the model becomes a `ForwardError`."""

    def before(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        observer.call(observer.before_module, module, args, kwargs)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        observer.call(observer.after_module, module, output)

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        try:
            for module in model.modules():  # an exception for a ScriptModule, which cannot have hooks
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            with observer:
                output = model(*inputs)
        except Exception as error:
            if observer.error is None:
                shapes = tree_map_only(torch.Tensor, lambda t: tuple(t.shape), inputs)
                reason = f'{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip(".: ")}'
                raise ForwardError(
                    f'{type(model).__name__} does not run on {shapes}: {reason}. Give an example_input that it takes, '
                    f'a tensor or a tuple of positional arguments.'
                ) from error
    if observer.error is not None:  # also one that the model caught
        raise observer.error
    return output


def _meta_copy(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Copy a model without the values of its tensors. A cache that the copy fills does not reach the model.

    Returns:
        The copy, and a dictionary from each of its modules to the module that it is a copy of.
    """
    memo: dict[int, Any] = {}  # deepcopy takes the copies of tensors from here
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor):
                memo[id(value)] = _to_meta(value)
    copied = copy.deepcopy(model, memo)
    return copied, {memo[id(module)]: module for module in model.modules()}


def _to_meta(t: torch.Tensor) -> torch.Tensor:
    meta = t.detach().to('meta')
    return nn.Parameter(meta, requires_grad=False) if isinstance(t, nn.Parameter) else meta

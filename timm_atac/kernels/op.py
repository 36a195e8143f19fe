"""Operations of PyTorch made of Triton kernels: seen by torch.compile, kept whole by torch.export."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from .switch import IS_INTERPRETED

__all__ = ['operation', 'run_kernel', 'wrap_triton']


def operation(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.ops.timm_atac.NAME`.

    Args:
        name: Of the operation.
        fake: The same without values: checks its arguments, and returns empty tensors of the right shape and strides.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        # what is interpreted needs values, which a compiler has not; and before PyTorch 2.6 no kernel runs at all
        looked_into = None if IS_INTERPRETED else getattr(torch.library, 'triton_op', None)
        define = looked_into or torch.library.custom_op
        defined = define(f'timm_atac::{name}', mutates_args=())(function)
        defined.register_fake(fake)
        return defined

    return decorate


def wrap_triton(kernel: Any) -> Any:
    """A kernel as a compiler sees it; by this name PyTorch finds in an operation's source what its caches depend on."""
    return kernel if IS_INTERPRETED else torch.library.wrap_triton(kernel)


def run_kernel(wrapped: Any, grid: tuple[int, ...], x: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel inside of an operation, on the device of its first argument, which need not be the current one."""
    is_value = type(x) in (torch.Tensor, torch.nn.Parameter)  # and not what a compiler traces with
    with torch.cuda.device(x.device) if is_value and x.device.type == 'cuda' else nullcontext():
        wrapped[grid](x, *args, **constants)

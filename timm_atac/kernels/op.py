"""Operations of PyTorch made of Triton kernels: seen by torch.compile, kept whole by torch.export."""

from collections.abc import Callable
from typing import Any

import torch

from .switch import IS_INTERPRETED

__all__ = ['launcher', 'operation']


def operation(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.ops.timm_atac.NAME`.

    Args:
        name: Of the operation.
        fake: The same without values: checks its arguments, and returns empty tensors of the right shape and strides.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        define = getattr(torch.library, 'triton_op', torch.library.custom_op)  # before 2.6 no kernel runs in it
        defined = define(f'timm_atac::{name}', mutates_args=())(function)
        defined.register_fake(fake)
        return defined

    return decorate


def launcher(kernel: Any) -> Any:
    """A kernel to be launched inside of an operation."""
    return kernel if IS_INTERPRETED else torch.library.wrap_triton(kernel)

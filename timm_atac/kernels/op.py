"""Registration of Triton kernels as operations of PyTorch. torch.compile traces into them, torch.export does not."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from .switch import IS_INTERPRETED

__all__ = ['next_power_of_2', 'operation', 'run_kernel', 'wrap_triton']


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is not less than n."""
    return 1 << (n - 1).bit_length()


def operation(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.ops.timm_atac.NAME`, once in a process.

    If this package is imported anew, the operation of the former import stays. PyTorch would free it for a second
    definition, and the former modules would then call freed memory.

    Args:
        name: Name of the operation.
        fake: Function of the same arguments, which checks them and returns empty tensors like the result.

    Returns:
        A decorator, which returns the operation.
    """

    # in PyTorch's namespace, which stays when our modules are removed from `sys.modules`
    known: dict[str, Any] = vars(torch.ops.timm_atac).setdefault('_defined', {})

    def decorate(function: Callable[..., Any]) -> Any:
        if name in known:
            return known[name]
        # the interpreter needs values, which a compiler does not have; before PyTorch 2.6 there is no triton_op
        opaque = torch.library.custom_op
        define = opaque if IS_INTERPRETED else getattr(torch.library, 'triton_op', opaque)
        defined = define(f'timm_atac::{name}', mutates_args=())(function)
        defined.register_fake(fake)
        known[name] = defined
        return defined

    return decorate


def wrap_triton(kernel: Any) -> Any:
    """Wrap a kernel for torch.compile, which looks for this function's name in the source of an operation."""
    return kernel if IS_INTERPRETED else torch.library.wrap_triton(kernel)


def run_kernel(wrapped: Any, grid: tuple[int, ...], x: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel inside an operation, on the device of its first argument, which may not be the current device."""
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter)  # not a fake tensor of a compiler
    with torch.cuda.device(x.device) if is_plain and x.device.type == 'cuda' else nullcontext():
        wrapped[grid](x, *args, **constants)

"""Conditions under which a unit must run its parts one by one, and not as one operation."""

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

__all__ = ['has_hooks', 'must_run_op_by_op']

_GLOBAL_HOOKS = tuple(f'_global_{name}_hooks' for name in ('forward', 'forward_pre', 'backward', 'backward_pre'))


def must_run_op_by_op(x: torch.Tensor) -> bool:
    """True under torch.compile, tracing, torch.func, forward-mode AD, tensor subclasses or global hooks."""
    return (
        type(x) not in (torch.Tensor, nn.Parameter)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
    )


def has_hooks(module: nn.Module) -> bool:
    """True if a module has forward or backward hooks, or an instance attribute `forward`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or 'forward' in vars(module)

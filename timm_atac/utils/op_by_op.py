"""Whether a unit may run as one operation, because nobody looks at its parts."""

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

__all__ = ['has_hooks', 'must_run_op_by_op']

_GLOBAL_HOOKS = tuple(f'_global_{name}_hooks' for name in ('forward', 'forward_pre', 'backward', 'backward_pre'))


def must_run_op_by_op(x: torch.Tensor) -> bool:
    """Whether somebody wants each operation, other than autograd: a compiler, a tracer, a transform, a subclass."""
    return (
        type(x) not in (torch.Tensor, nn.Parameter)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody is to be called when a module runs, or runs something else in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or 'forward' in vars(module)

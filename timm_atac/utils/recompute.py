"""Recompute intermediate values in the backward pass instead of storing them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .op_by_op import must_run_op_by_op

__all__ = ['recomputed']


def recomputed(function: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any) -> torch.Tensor:
    """Return `function(x, *args)`, and store only the arguments for the backward pass.

    It is an ordinary call without gradients, and where `must_run_op_by_op(x)` is true.

    Args:
        function: Deterministic function without side effects.
        x: First argument.
        *args: Other arguments.
    """
    if not torch.is_grad_enabled() or must_run_op_by_op(x):
        return function(x, *args)
    return checkpoint(function, x, *args, use_reentrant=False, preserve_rng_state=False)

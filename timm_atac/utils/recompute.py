"""Compute again in the backward pass instead of keeping."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .op_by_op import must_run_op_by_op

__all__ = ['recomputed']


def recomputed(function: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any) -> torch.Tensor:
    """`function(x, *args)`, of which the backward pass keeps the arguments only.

    Args:
        function: Deterministic, and without effects on anything else.
        x: Its first argument. Where others want each operation (a compiler, a tracer), or no gradients are, it is an
            ordinary call.
        *args: The others.
    """
    if not torch.is_grad_enabled() or must_run_op_by_op(x):
        return function(x, *args)
    return checkpoint(function, x, *args, use_reentrant=False, preserve_rng_state=False)

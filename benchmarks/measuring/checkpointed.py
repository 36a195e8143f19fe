"""ATAC with `torch.utils.checkpoint`: a short alternative to `ATACMe`, for any norm and activation.

A checkpoint runs the unit again in the backward pass. By default, this second pass updates the norms' running
statistics a second time (PyTorch issue 96136). Here a context manager prevents that.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from timm_atac import ATAC

__all__ = ['CheckpointedATAC']


class CheckpointedATAC(ATAC):
    """`ATAC` that only saves its input for the backward pass, (B, C, H, W) -> (B, C, H, W)."""

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().activate(x)
        activate = super().activate
        return checkpoint(activate, x, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _SecondPass(self)


class _SecondPass(AbstractContextManager):
    """Puts the modules into the modes of the first pass, and stops updates of running statistics.

    It can be entered several times, which second derivatives do.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.modes = {module: module.training for module in unit.modules()}
        self.norms = [module for module in unit.modules() if isinstance(module, _BatchNorm)]

    def __enter__(self) -> None:
        self.previous_modes = {module: module.training for module in self.modes}
        self.previous_settings = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for module, training in self.modes.items():
            module.training = training
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for module, training in self.previous_modes.items():
            module.training = training
        for norm, (momentum, count) in zip(self.norms, self.previous_settings, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count

"""ATAC behind `torch.utils.checkpoint`: the peer of `ATACMe`, in a few lines and for any norm and activation.

A checkpoint runs the unit again in the backward pass. Left alone, the second pass would update the norms' running
statistics once more (PyTorch issue 96136). Here a context of the second pass keeps them.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from timm_atac import ATAC

__all__ = ['CheckpointedATAC']


class CheckpointedATAC(ATAC):
    """`ATAC` that keeps its input alone for the backward pass, (B, C, H, W) -> (B, C, H, W)."""

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().activate(x)
        activate = super().activate
        return checkpoint(activate, x, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _SecondPass(self)


class _SecondPass(AbstractContextManager):
    """Modules are in the modes of the first pass, and norms update no running statistics.

    It may be entered again, as a second derivative does.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.modes = {module: module.training for module in unit.modules()}
        self.norms = [module for module in unit.modules() if isinstance(module, _BatchNorm)]

    def __enter__(self) -> None:
        self.modes_now = {module: module.training for module in self.modes}
        self.kept = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for module, training in self.modes.items():
            module.training = training
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for module, training in self.modes_now.items():
            module.training = training
        for norm, (momentum, count) in zip(self.norms, self.kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count

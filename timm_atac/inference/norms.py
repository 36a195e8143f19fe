"""What takes the place of a BatchNorm in a fused model. Both classes are for inference, and raise an error in training.

Tracing, scripting and exporting see a folded norm as nothing, and a scale and shift as one product and one sum.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..utils.op_by_op import must_run_op_by_op

__all__ = ['FoldedNorm', 'ScaleShift']

_SMALL = 2**19  # values


def _check_mode(training: bool) -> None:
    if training:
        raise RuntimeError(
            'The model is fused for inference and cannot train, because its norms have no statistics any more. Call '
            'eval() on it, or train the model that was given to timm_atac.fuse(model).'
        )


class FoldedNorm(nn.Sequential):
    """Takes the place of a norm that is folded into the layer before it. It runs the norm's `drop` and `act`, if any.

    Raises:
        RuntimeError: It runs in training mode.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        _check_mode(self.training)
        for module in self:
            input = module(input)
        return input


class ScaleShift(nn.Sequential):
    """Takes the place of a BatchNorm in evaluation mode that stays alone: `x * scale + shift`.

    It runs the norm's `drop` and `act` after that, if any.

    Attributes:
        scale: (C, 1, ...), with as many dimensions as an image of the batch.
        shift: Like `scale`.

    Raises:
        RuntimeError: It runs in training mode.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        _check_mode(self.training)
        if torch.jit.is_scripting():
            input = (input * self.scale + self.shift).to(input.dtype)
        else:
            input = self._scale_and_shift(input)
        for module in self:
            input = module(input)
        return input

    @torch.jit.unused
    def _scale_and_shift(self, x: torch.Tensor) -> torch.Tensor:
        if not must_run_op_by_op(x):
            if self._is_small(x):
                y = x * self.scale
                return y + self.shift if y.requires_grad else y.add_(self.shift)
            # one pass over memory, and half precision is rounded once
            zeros, ones = torch.zeros_like(self.scale).flatten(), torch.ones_like(self.scale).flatten()
            return F.batch_norm(x, zeros, ones, self.scale.flatten(), self.shift.flatten(), eps=0.0)
        y = x * self.scale + self.shift
        if isinstance(x, torch.fx.Proxy):
            return y
        if x.ndim != self.scale.ndim + 1:  # broadcasting would accept some of these
            raise ValueError(f'This norm was fused for inputs of {self.scale.ndim + 1} dimensions, not {x.ndim}.')
        return y if y.dtype == x.dtype else y.to(x.dtype)  # a BatchNorm returns the dtype of its input under autocast

    @torch.jit.unused
    def _is_small(self, x: torch.Tensor) -> bool:
        """True if two operations take less time than the preparation of one."""
        fits = x.ndim == self.scale.ndim + 1 and x.shape[1] == len(self.scale)
        return fits and x.numel() <= _SMALL and x.dtype == self.scale.dtype and x.element_size() >= 4

    def extra_repr(self) -> str:
        return f'{len(self.scale)} channels'

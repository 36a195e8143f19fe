"""The backward pass of a 1x1 convolution, for code that calls PyTorch below autograd."""

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ['pointwise_backward']


def pointwise_backward(grad: Any, x: torch.Tensor, weight: torch.Tensor, needed: Sequence[bool]) -> Any:
    """Gradients of the input, the weight and the bias, None where one is not needed.

    Args:
        grad: (B, K, H, W), of the output; may be None where nothing is needed.
        x: (B, C, H, W), the input.
        weight: (K, C, 1, 1).
        needed: Which, in that order.
    """
    if not any(needed):
        return None, None, None
    pointwise = ([weight.shape[0]], (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    return torch.ops.aten.convolution_backward.default(grad, x, weight, *pointwise, list(needed))

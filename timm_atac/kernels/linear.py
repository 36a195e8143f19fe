"""A linear layer, with bias and ReLU in the same operation where PyTorch has one for that."""

import functools
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ['linear']


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, relu: bool = False) -> torch.Tensor:
    """Compute `rows @ weight.T + bias`, and a ReLU behind it, without autograd.

    In float16 and bfloat16 on a CPU, `F.linear` first writes the bias to the whole output, and a ReLU is another pass.
    There this function calls the operation of oneDNN that `torch.compile` uses.

    Args:
        rows: (N, in_features).
        weight: (out_features, in_features).
        bias: (out_features,).
        relu: Whether a ReLU follows.

    Returns:
        (N, out_features), in the dtype of `rows`.
    """
    if rows.device.type == 'cpu' and _has_onednn(rows.dtype):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, 'relu' if relu else 'none', [], '')
    if relu and rows.device.type in ('cpu', 'cuda'):
        return torch._addmm_activation(bias, rows, weight.t())
    y = F.linear(rows, weight, bias)
    return y.relu_() if relu else y


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """True if oneDNN computes in this half precision on this processor."""
    operators: Any = torch.ops.mkldnn
    name = {torch.bfloat16: '_is_mkldnn_bf16_supported', torch.float16: '_is_mkldnn_fp16_supported'}.get(dtype)
    if name is None or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(operators, '_linear_pointwise') and hasattr(operators, name) and getattr(operators, name)()

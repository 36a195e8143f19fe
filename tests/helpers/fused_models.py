"""Models with norms that are no identities, and inputs for them."""

from typing import Any

import torch
import torch.nn as nn

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def with_random_norms(model: Any, size: int = 32, dtype: torch.dtype = torch.float64) -> Any:
    """Give the norms of a model random scales and shifts, and the statistics of one batch."""
    model = model.to(dtype).train()
    for norm in norms(model):
        norm.momentum = None
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    with torch.no_grad():
        model(images(model, size))
    return model.eval()


def images(model: nn.Module, size: int = 32) -> torch.Tensor:
    reference = next(model.parameters())
    return torch.randn(8, 3, size, size, device=reference.device, dtype=reference.dtype)


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, _BATCH_NORM)]


def scale(values: Any) -> float:
    return max(v.abs().max().item() for v in (values if isinstance(values, list) else [values]))

"""A plain and a lean unit side by side."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from timm_atac import ATAC, ATACMe

# Odd and prime, so that a transposed or flattened axis cannot fit by accident.
SHAPE = (3, 14, 7, 5)


def pair(channels: int = 14, **kwargs: Any) -> tuple[Any, Any]:
    """A plain and a lean unit with the same parameters and statistics, whose norms have something to do."""
    plain: Any = ATAC(channels, **kwargs)
    norms: tuple[Any, Any] = (plain.bn1, plain.bn2)
    for norm in norms:
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    lean = ATACMe(channels, **kwargs)
    lean.load_state_dict(plain.state_dict())
    return plain, lean


def is_lean(y: torch.Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == '_UnitBackward'


def naming(name: str) -> Callable[[str], str]:
    return lambda text: f'{name}: {text}'


def everything(unit: nn.Module, x: torch.Tensor, grad: torch.Tensor, lean: bool) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers after one backward pass."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = unit(x)
    assert is_lean(y) == lean or unit.input_fmt != 'NCHW'  # the other layouts end with a view
    y.backward(grad)
    assert x.grad is not None
    found = {'output': y.detach(), 'input': x.grad, **{f'buffer {n}': b for n, b in unit.named_buffers()}}
    return found | {n: p.grad for n, p in unit.named_parameters() if p.grad is not None}


def assert_same(plain: Any, lean: Any, x: torch.Tensor, rtol: float, atol: float) -> None:
    grad = torch.randn_like(x)
    expected, found = everything(plain, x, grad, lean=False), everything(lean, x, grad, lean=True)
    assert found.keys() == expected.keys()
    assert {name for name, p in lean.named_parameters() if p.requires_grad} <= found.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=naming(name))

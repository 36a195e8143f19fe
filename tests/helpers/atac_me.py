"""Comparison of ATAC and ATACMe."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from timm_atac import ATAC, ATACMe

# Odd and prime, so that a transposed or flattened axis cannot fit by accident.
SHAPE = (3, 14, 7, 5)


def pair(channels: int = 14, **kwargs: Any) -> tuple[Any, Any]:
    """An ATAC and an ATACMe with the same parameters and statistics. Their norms are not the identity."""
    plain: Any = ATAC(channels, **kwargs)
    norms: tuple[Any, Any] = (plain.bn1, plain.bn2)
    for norm in norms:
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    me = ATACMe(channels, **kwargs)
    me.load_state_dict(plain.state_dict())
    return plain, me


def is_recomputed(y: torch.Tensor) -> bool:
    """True if y was computed as the one operation of ATACMe, which recomputes values in the backward pass."""
    return y.grad_fn is not None and y.grad_fn.name() == '_RecomputedATACBackward'


def with_name(name: str) -> Callable[[str], str]:
    """A `msg` for `torch.testing.assert_close`, which puts a name before the usual message."""
    return lambda text: f'{name}: {text}'


def everything(unit: nn.Module, x: torch.Tensor, grad: torch.Tensor, recomputed: bool) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers after one backward pass. `recomputed` is the expected `is_recomputed(output)`."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = unit(x)
    assert is_recomputed(y) == recomputed or unit.input_fmt != 'NCHW'  # the other layouts end with a view
    y.backward(grad)
    assert x.grad is not None
    found = {'output': y.detach(), 'input': x.grad, **{f'buffer {n}': b for n, b in unit.named_buffers()}}
    return found | {n: p.grad for n, p in unit.named_parameters() if p.grad is not None}


def assert_same(plain: Any, me: Any, x: torch.Tensor, rtol: float, atol: float) -> None:
    grad = torch.randn_like(x)
    expected, found = everything(plain, x, grad, recomputed=False), everything(me, x, grad, recomputed=True)
    assert found.keys() == expected.keys()
    assert {name for name, p in me.named_parameters() if p.requires_grad} <= found.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=with_name(name))

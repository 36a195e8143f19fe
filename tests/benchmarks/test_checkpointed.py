"""benchmarks/measuring/checkpointed.py: the unit with a checkpoint is compared with the plain unit."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from atac_me import SHAPE, pair, with_name
from measuring.checkpointed import CheckpointedATAC
from measuring.timing import bytes_kept

from timm_atac import ATAC


def both(**kwargs: Any) -> tuple[Any, Any]:
    plain, _ = pair(**kwargs)
    unit = CheckpointedATAC(14, **kwargs)
    unit.load_state_dict(plain.state_dict())
    return plain.double(), unit.double()


def results(unit: Any, x: torch.Tensor, grad: torch.Tensor, between: Any = None) -> dict[str, torch.Tensor]:
    """Return output, gradients and buffers after one backward pass. `between` is called before it."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = unit(x)
    if between is not None:
        between(unit)
    y.backward(grad)
    assert x.grad is not None
    grads = {name: p.grad for name, p in unit.named_parameters()}
    return {'output': y.detach(), 'input': x.grad, **grads, **dict(unit.named_buffers())}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_same_numbers(training, momentum, layout) -> None:
    units = both()
    x, grad = (torch.randn(SHAPE, dtype=torch.float64).contiguous(memory_format=layout) for _ in range(2))
    for unit in units:
        unit.train(training)
        unit.bn1.momentum = unit.bn2.momentum = momentum
    for _ in range(2):  # the second time, the running statistics are other ones
        expected, found = (results(unit, x, grad) for unit in units)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=with_name(name))
        assert units[1].bn1.momentum == momentum and units[1].training == training


@pytest.mark.parametrize('training', [True, False])
def test_second_pass_has_the_modes_of_the_first(training) -> None:
    units = both()
    x, grad = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    expected, found = (results(unit.train(training), x, grad, lambda u: u.train(not training)) for unit in units)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert all(module.training != training for module in units[1].modules())


def test_second_derivatives() -> None:
    units = both()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    found = []
    for unit in units:
        (first,) = torch.autograd.grad(unit(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.sin().sum(), unit.conv1.weight)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_other_norms_and_activations() -> None:
    kwargs: dict[str, Any] = dict(norm_layer=lambda channels, **dd: nn.GroupNorm(1, channels, **dd), act_layer='silu')
    plain, unit = ATAC(14, **kwargs), CheckpointedATAC(14, **kwargs)
    unit.load_state_dict(plain.state_dict())
    x, grad = torch.randn(SHAPE), torch.randn(SHAPE)
    expected, found = results(plain, x, grad), results(unit, x, grad)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_only_saves_its_input() -> None:
    unit = CheckpointedATAC(14).train()
    x = torch.randn(4, 14, 32, 32, requires_grad=True)
    kept = bytes_kept(lambda: unit(x), unit)
    assert kept / (x.numel() * x.element_size()) == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        assert unit(x).grad_fn is None

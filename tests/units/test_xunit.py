"""timm_atac/units/xunit.py: against its formula, in every layout, and by name in timm."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_atac
from timm_atac import XUnit
from timm_atac.inference.norms import FoldedNorm

SHAPE = (3, 14, 7, 5)  # odd and prime, so that a transposed axis cannot fit by accident


def make(channels: int = 14, **kwargs: Any) -> Any:
    """A unit whose norm is not the identity."""
    unit: Any = XUnit(channels, **kwargs).double()
    nn.init.uniform_(unit.bn.weight, 0.5, 1.5)
    nn.init.normal_(unit.bn.bias)
    nn.init.normal_(unit.bn.running_mean, std=0.1)
    return unit.eval()


def reference(unit: Any, x: torch.Tensor) -> torch.Tensor:
    """The definition, channel by channel and position by position."""
    padded = F.pad(x.clamp(min=0), (1, 1, 1, 1))
    d = torch.zeros_like(x)
    for row in range(3):
        for column in range(3):
            weight = unit.conv.weight[:, 0, row, column, None, None]
            d += weight * padded[:, :, row : row + x.shape[2], column : column + x.shape[3]]
    d += unit.conv.bias[:, None, None]
    scale = unit.bn.weight / (unit.bn.running_var + unit.bn.eps).sqrt()
    d = (d - unit.bn.running_mean[:, None, None]) * scale[:, None, None] + unit.bn.bias[:, None, None]
    return x / torch.exp(d * d)


def test_formula() -> None:
    unit, x = make(), torch.randn(SHAPE, dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(unit(x), reference(unit, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_layouts() -> None:
    unit, last = make(), make(input_fmt='NHWC')
    last.load_state_dict(unit.state_dict())
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), unit(x), rtol=0, atol=0)
    torch.testing.assert_close(
        timm_atac.gate(last, x.permute(0, 2, 3, 1)) * x.permute(0, 2, 3, 1), last(x.permute(0, 2, 3, 1))
    )


@pytest.mark.parametrize('kernel_size', [1, 5])
def test_options(kernel_size) -> None:
    unit = XUnit(8, kernel_size, act_layer=None, norm_layer=None, gate_layer='sigmoid')
    assert sum(p.numel() for p in unit.parameters()) == 8 * (kernel_size**2 + 1)
    x = torch.randn(2, 8, 6, 7)
    torch.testing.assert_close(unit(x), x * unit.conv(x).sigmoid())


def test_gradients() -> None:
    unit = make(3)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, (x,))


@pytest.mark.parametrize('blocks, added', [(1, 240), (2, 464), (3, 688), (4, 912), (5, 1136)])
def test_parameters_are_those_of_the_figure(blocks, added) -> None:
    """The figure on activation units in the authors' README, read to about 300 parameters, for 100 outputs."""
    read_off = {1: 86_647, 2: 186_482, 3: 286_317, 4: 386_358, 5: 486_193}
    plain, model = (
        timm.create_model(f'resnet{6 * blocks + 2}_cifar', num_classes=100, act_layer=act) for act in ('relu', 'xunit')
    )
    counts = [sum(p.numel() for p in each.parameters()) for each in (plain, model)]
    assert counts[1] - counts[0] == 12 * added
    assert counts[1] == pytest.approx(read_off[blocks], abs=350)


def test_by_name_in_a_model_of_timm() -> None:
    model: Any = timm.create_model('resnet18', act_layer='xunit', num_classes=5)
    units = [m for m in model.modules() if isinstance(m, XUnit)]
    assert len(units) == 17
    x = torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    assert all(p.grad is not None for unit in units for p in unit.parameters())
    assert len(timm_atac.viz.gate_maps(model, x)) == 17


@pytest.mark.slow
def test_in_place_of_activations_and_fused() -> None:
    """`fuse` folds each unit's norm into its convolution."""
    model: Any = timm.create_model('resnetv2_50', num_classes=5)
    timm_atac.replace_activations(model, 'xunit', where=[4])
    units: list[Any] = [m for m in model.modules() if isinstance(m, XUnit)]
    assert len(units) == 9
    for unit in units:
        nn.init.uniform_(unit.bn.weight, 0.5, 1.5)
        nn.init.normal_(unit.bn.bias)
        nn.init.normal_(unit.bn.running_mean)
        nn.init.uniform_(unit.bn.running_var, 0.5, 1.5)
    model.eval()
    fused = timm_atac.fuse(model)
    assert [type(m.bn) for m in fused.modules() if isinstance(m, XUnit)] == [FoldedNorm] * 9
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_activation_in_place_leaves_the_input_alone() -> None:
    unit, x = XUnit(8, act_layer=partial(nn.ReLU, inplace=True)), torch.randn(2, 8, 4, 4)
    before = x.clone()
    unit(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize('way', ['script', 'trace', 'export', 'compile'])
def test_ways_to_run(way) -> None:
    unit, x = make(), torch.randn(SHAPE, dtype=torch.float64)
    if way == 'script':
        other = torch.jit.script(unit)
    elif way == 'trace':
        other = torch.jit.trace(unit, x)
    elif way == 'export':
        other = torch.export.export(unit, (x,)).module()
    else:
        other = torch.compile(unit, backend='eager', fullgraph=True)
    torch.testing.assert_close(other(x), unit(x))


@pytest.mark.parametrize(
    'kwargs, shape, message',
    [
        (dict(channels=0), None, 'channels=0: expected an integer >= 1'),
        (dict(kernel_size=2), None, 'kernel_size=2: expected an odd integer'),
        (dict(kernel_size=True), None, 'kernel_size=True: expected an odd integer'),
        (dict(kernel_size=1.5), None, 'kernel_size=1.5: expected an odd integer'),
        (dict(input_fmt='HW'), None, "input_fmt='HW': expected one of"),
        ({}, (2, 7, 5, 5), r'XUnit is for 8 channels in NCHW and got an input of shape \(2, 7, 5, 5\)'),
        (dict(input_fmt='NLC'), (2, 9, 8), r'shape \(2, 9, 8\): expected \(B, C, H, W\) or \(B, H, W, C\)'),
        (dict(input_fmt='NCL'), (2, 8, 9), r'shape \(2, 8, 9\): expected \(B, C, H, W\) or \(B, H, W, C\)'),
    ],
)
def test_wrong_input(kwargs, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        XUnit(**{'channels': 8, **kwargs})(torch.zeros(shape or (1, 8, 2, 2)))

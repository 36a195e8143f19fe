"""timm_atac/models/ge_resnet.py: the layer against its formula, the network against the authors' definition."""

from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from networks import wild

import timm_atac
from timm_atac.units.gather_excite import GatherExcite, MapConv2d


def test_formula() -> None:
    layer: Any = GatherExcite(6, (7, 5), rd_ratio=0.5).double().eval()
    norm = layer.gather[1]
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(layer.mlp.fc1.bias)
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64)
    gathered = F.conv2d(x, layer.gather[0].weight, groups=6)
    gathered = (
        (gathered - norm.running_mean.view(-1, 1, 1)) / (norm.running_var + norm.eps).sqrt().view(-1, 1, 1)
    ).relu()
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    hidden = (torch.einsum('oi,bi->bo', fc1.weight[..., 0, 0], gathered[..., 0, 0]) + fc1.bias).relu()
    gate = 1 / (1 + torch.exp(-torch.einsum('oi,bi->bo', fc2.weight[..., 0, 0], hidden) - fc2.bias))
    torch.testing.assert_close(layer(x), x * gate[..., None, None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_sum_is_pytorchs_convolution(bias, memory_format) -> None:
    conv = MapConv2d(6, 6, (7, 5), groups=6, bias=bias).double().to(memory_format=memory_format)
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    expected = F.conv2d(x, conv.weight, conv.bias, groups=6)
    torch.testing.assert_close(conv(x), expected)
    tensors = [x, *conv.parameters()]
    grad = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(conv(x), tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_parameters_are_those_of_the_authors_definition() -> None:
    """The parameters in models/RN50-GEPP.prototxt of hujie-frank/GENet, 33.7 M in its slides."""
    model = timm.create_model('ge_plus_resnet50', device='meta')
    parts = {'gather': 0, 'mlp': 0, 'rest': 0}
    for name, parameter in model.named_parameters():
        parts[next((part for part in parts if f'se.{part}.' in name), 'rest')] += parameter.numel()
    assert parts == {'gather': 5_549_568, 'mlp': 2_530_992, 'rest': 25_557_032}
    assert sum(parts.values()) / 1e6 == pytest.approx(33.7, rel=0.01)


def test_placement() -> None:
    model: Any = timm.create_model('ge_plus_resnet50', img_size=(96, 65), device='meta')
    found = {name: module.feat_size for name, module in model.named_modules() if isinstance(module, GatherExcite)}
    sizes = ((1, 3, (24, 17)), (2, 4, (12, 9)), (3, 6, (6, 5)), (4, 3, (3, 3)))
    assert found == {f'layer{stage}.{block}.se': size for stage, depth, size in sizes for block in range(depth)}


def test_initial_values() -> None:
    model: Any = timm.create_model('ge_plus_resnet50')
    layer = model.layer2[0].se
    assert layer.gather[0].weight.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.02)
    assert layer.mlp.fc2.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not layer.mlp.fc2.bias.any()


@pytest.mark.parametrize('size', [(224, 96), (64, 64)])
def test_another_image_size_is_an_error(size) -> None:
    model = timm.create_model('ge_plus_resnet50', img_size=96).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)
        with pytest.raises(
            ValueError,
            match=r'GatherExcite is for feature maps of 24 x 24 \(of images of 96 x 96\) and got .*img_size=',
        ):
            model(torch.zeros(1, 3, *size))


def test_rd_ratio() -> None:
    model: Any = timm.create_model('ge_plus_resnet50', rd_ratio=0.25, device='meta')
    assert model.layer1[0].se.mlp.fc1.out_channels == 64
    with pytest.raises(ValueError, match=r'rd_ratio=-1: expected a number in \(0, 1\]'):
        timm.create_model('ge_plus_resnet50', rd_ratio=-1)


def test_norm_layer_goes_into_the_layers() -> None:
    model: Any = timm.create_model('ge_plus_resnet50', norm_layer='groupnorm', img_size=32, device='meta')
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.slow
def test_fused() -> None:
    model = wild('ge_plus_resnet50', img_size=32)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(timm_atac.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_map_of_another_size_does_not_broadcast() -> None:
    with pytest.raises(AssertionError, match='expected a map as large as the weight'):
        MapConv2d(6, 6, 7, groups=6)(torch.zeros(1, 6, 1, 7))
    scripted = torch.jit.script(GatherExcite(6, (7, 7)))
    with pytest.raises(torch.jit.Error, match='expected a map as large as the weight'):
        scripted(torch.zeros(1, 6, 1, 1))


@pytest.mark.slow
def test_half_precision() -> None:
    model = wild('ge_plus_resnet50', img_size=32)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        found = model(x)
        torch.testing.assert_close(found.float(), model.float()(x).float(), rtol=0.05, atol=0.05)

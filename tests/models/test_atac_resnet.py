from functools import partial
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn as nn
from networks import gmacs

from timm_atac import ATAC, AtacResNet, SEActivation


def create(name: str, **kwargs) -> Any:
    model = timm.create_model(name, **kwargs)
    assert isinstance(model, AtacResNet)
    return model


def units(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ATAC)]


# Parameters in M and GMACs at 224 px. The first row is in the paper's Table 4 (28.0M, 4.4); the known values of
# resnet50 check the counter.
@pytest.mark.slow
@pytest.mark.parametrize(
    'name, params, macs, num_units',
    [
        ('atac_resnet50', 27.93, 4.40, 18),
        ('atac_resnet50_full', 28.09, 4.62, 32),
        ('resnet50', 25.56, 4.09, 0),
        ('atac_resnet18', 12.35, 1.87, 4),
        ('atac_resnet34', 22.99, 3.78, 9),
        ('atac_resnet101', 49.18, 8.55, 52),
        ('atac_resnext50_32x4d', 34.50, 5.46, 18),
    ],
)
def test_size(name, params, macs, num_units) -> None:
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.006)
    assert gmacs(model, 224) == pytest.approx(macs, abs=0.006)
    assert len(units(model)) == num_units


def test_placement() -> None:
    model = create('atac_resnet50', device='meta')
    assert units(model) == [
        f'layer{stage}.{block}.act{act}'
        for stage, depth in ((3, 6), (4, 3))
        for block in range(depth)
        for act in (1, 2)
    ]
    assert isinstance(model.act1, nn.ReLU)
    assert isinstance(model.layer4[0].act3, nn.ReLU)
    basic = create('atac_resnet18', device='meta')
    assert units(basic) == ['layer3.0.act1', 'layer3.1.act1', 'layer4.0.act1', 'layer4.1.act1']


@pytest.mark.parametrize('stages', [(), (1,), (2, 4), (1, 2, 3, 4)])
def test_atac_stages(stages) -> None:
    model = create('atac_resnet18', atac_stages=stages, device='meta')
    assert {int(name[5]) for name in units(model)} == set(stages)


def test_variants() -> None:
    model = create('atac_resnet18', act_layer=partial(SEActivation, act_layer=None), rd_ratio=0.25, device='meta')
    unit = model.layer3[0].act1
    assert type(unit) is SEActivation
    assert isinstance(unit.act, nn.Identity)
    assert unit.conv1.out_channels == 64
    assert isinstance(create('atac_resnet18', norm_layer='groupnorm', device='meta').layer3[0].act1.bn1, nn.GroupNorm)


def test_without_units_it_is_timms_resnet() -> None:
    ours, theirs = create('atac_resnet18', atac_stages=()), timm.create_model('resnet18')
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(atac_stages=(5,)), r'atac_stages=\(5,\)'),
        (dict(rd_ratio=2), 'rd_ratio=2: expected'),
        (dict(act_layer='relu', rd_ratio=0.5), 'no bottleneck'),
        (dict(act_layer='atak'), 'no activation of that name'),
    ],
)
def test_wrong_arguments(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        create('atac_resnet18', device='meta', **kwargs)


def test_wrong_block() -> None:
    with pytest.raises(ValueError, match="expected timm's BasicBlock or Bottleneck"):
        AtacResNet(cast(Any, timm.models.resnetv2.PreActBottleneck), (1, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['atac_resnet18', 'atac_resnet8_cifar'])
def test_interface_of_timm(name) -> None:
    model: Any = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)
    assert model.get_classifier() is model.fc

    groups = timm.models.group_parameters(model, model.group_matcher())
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    names = {n for n, _ in model.named_parameters()}
    assert {n for group in groups.values() for n in group} == names
    assert 3 <= len(coarse) <= len(groups)

    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(7, 'catavgmax')
    assert model(x).shape == (2, 7)
    assert model.forward_head(features, pre_logits=True).shape == (2, 2 * model.num_features)
    model.reset_classifier(0, 'catavgmax')  # by name, since older ResNets of timm reset the pooling to its default
    assert model(x).shape == (2, 2 * model.num_features)
    assert timm.create_model(name, num_classes=0, global_pool='')(x).shape == features.shape


@pytest.mark.parametrize('zero_init_last', [True, False])
def test_init(zero_init_last) -> None:
    model = create('atac_resnet18', zero_init_last=zero_init_last)
    block = model.layer3[0]
    assert bool((block.bn2.weight == 0).all()) is zero_init_last
    assert bool((block.act1.bn2.weight == 1).all())
    assert bool((model.fc.bias == 0).all())
    expected = nn.init.calculate_gain('leaky_relu', 0.25) / ((256 + 256) * 9 / 2) ** 0.5
    assert block.conv2.weight.std().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('output_stride, size', [(32, 2), (16, 4), (8, 8)])
def test_output_stride(output_stride, size) -> None:
    model = create('atac_resnet50', output_stride=output_stride, device='meta')
    assert model.forward_features(torch.empty(2, 3, 64, 64, device='meta')).shape == (2, 2048, size, size)


@pytest.mark.slow
@pytest.mark.parametrize('in_chans', [1, 4])
def test_pretrained_with_other_input_and_classes(in_chans, tmp_path) -> None:
    source = create('atac_resnet18')
    path = tmp_path / 'atac_resnet18.pth'
    torch.save(source.state_dict(), path)
    model = create(
        'atac_resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), in_chans=in_chans, num_classes=7
    )
    assert model.conv1.weight.shape[1] == in_chans
    assert model.fc.out_features == 7
    assert torch.equal(model.layer4[1].act1.conv2.weight, source.layer4[1].act1.conv2.weight)


def test_default_cfg() -> None:
    cfg = create('atac_resnet50', device='meta').pretrained_cfg
    assert (cfg['architecture'], cfg['tag'], cfg['input_size']) == ('atac_resnet50', 'open_atac_in1k', (3, 224, 224))
    assert (cfg['crop_pct'], cfg['interpolation']) == (0.875, 'bilinear')

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn

from timm_atac import ATAC, CifarResNet, LocalSE
from timm_atac.models.cifar_resnet import checkpoint_filter_fn


def create(name: str, **kwargs) -> Any:
    model = timm.create_model(name, **kwargs)
    assert isinstance(model, CifarResNet)
    return model


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    'name, params, kwargs',
    [
        ('resnet8_cifar', 77_850, {}),
        ('atac_resnet8_cifar', 89_578, {}),
        ('atac_resnet20_cifar.cifar100', 312_708, {}),
        ('resnet8_cifar', 89_578, dict(act_layer='se_act')),
        ('resnet8_cifar', 89_578, dict(act_layer='nin')),
        ('resnet8_cifar', 83_562, dict(attn_layer='local_se')),
        ('resnet14_cifar', 193_338, dict(act_layer='atac', atac_stages=(3, 4))),
        ('atac_resnet26_cifar', 415_498, {}),
    ],
)
def test_num_params(name, params, kwargs) -> None:
    assert num_params(create(name, device='meta', **kwargs)) == params


@pytest.mark.slow
@pytest.mark.parametrize('depth, blocks', [(8, 1), (14, 2), (20, 3), (26, 4)])
def test_depth(depth, blocks) -> None:
    host, atac = create(f'resnet{depth}_cifar'), create(f'atac_resnet{depth}_cifar')
    assert [len(stage) for stage in host.stages] == [blocks] * 3
    units = sum(isinstance(m, ATAC) for m in atac.modules())
    relus = sum(isinstance(m, nn.ReLU) for m in host.modules())
    assert units == relus == depth - 1
    with_units = create(f'resnet{depth}_cifar', act_layer='atac')
    with_units.load_state_dict(atac.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(with_units.eval()(x), atac.eval()(x))


@pytest.mark.parametrize('tag, num_classes', [('cifar10', 10), ('cifar100', 100)])
def test_tags(tag, num_classes) -> None:
    model = create(f'atac_resnet8_cifar.{tag}')
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, num_classes)
    cfg = model.pretrained_cfg
    assert (cfg['mean'], cfg['std']) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize('stages', [(), (3,), (4,), (1, 2)])
def test_atac_stages(stages) -> None:
    model = create('resnet14_cifar', act_layer='silu', atac_stages=stages)
    found = {
        int(n.split('.')[1]) + 1 if n.startswith('stages') else 4
        for n, m in model.named_modules()
        if isinstance(m, nn.SiLU)
    }
    assert found == set(stages)


def test_local_se() -> None:
    model = create('resnet14_cifar', attn_layer='local_se')
    assert [type(block.attn) for stage in model.stages for block in stage] == [LocalSE] * 6
    assert not any(isinstance(block.act1, ATAC) for stage in model.stages for block in stage)
    other = create('resnet8_cifar', attn_layer='local_se', norm_layer='groupnorm1', data_norm_layer='')
    assert isinstance(other.stages[0][0].attn.bn1, timm.layers.GroupNorm1)
    assert type(create('resnet8_cifar', attn_layer='se').stages[0][0].attn) is timm.layers.SEModule


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(atac_stages=(0, 1)), r'atac_stages=\(0, 1\)'),
        (dict(rd_ratio=0.5), 'no bottleneck'),
        (dict(act_layer='atac', rd_ratio=0), 'rd_ratio=0: expected'),
    ],
)
def test_wrong_arguments(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        create('resnet8_cifar', **kwargs)


def test_dropout_and_drop_path() -> None:
    model = create('resnet14_cifar', drop_rate=0.5, drop_path_rate=0.3).train()
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for stage in model.stages for block in stage]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.3)
    features = model.forward_features(x)
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_zero_init_last() -> None:
    assert all(
        (block.conv2.weight == 0).all()
        for stage in create('atac_resnet8_cifar', zero_init_last=True).stages
        for block in stage
    )
    assert not any((block.conv2.weight == 0).any() for stage in create('atac_resnet8_cifar').stages for block in stage)


def test_intermediates_and_norm() -> None:
    model = create('atac_resnet14_cifar').eval()
    x = torch.randn(2, 3, 32, 32)
    final, taps = model.forward_intermediates(x, norm=True)
    assert [tuple(t.shape) for t in taps] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert torch.equal(taps[-1], final)
    assert torch.equal(final, model.forward_features(x))
    raw = model.forward_intermediates(x, indices=[2], intermediates_only=True)
    assert torch.equal(model.act(model.norm(raw[0])), final)


def test_features_only() -> None:
    model: Any = timm.create_model('atac_resnet8_cifar', features_only=True)
    assert model.feature_info.channels() == [16, 32, 64]
    assert model.feature_info.reduction() == [1, 2, 4]


@pytest.mark.parametrize('in_chans', [1, 2, 5])
def test_pretrained_with_other_input_and_classes(in_chans, tmp_path) -> None:
    source = create('atac_resnet8_cifar').train()
    source(torch.randn(8, 3, 32, 32) * torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    path = tmp_path / 'atac_resnet8_cifar.pth'
    torch.save(source.state_dict(), path)
    model = create(
        'atac_resnet8_cifar',
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path)),
        in_chans=in_chans,
        num_classes=7,
    )
    variance = source.data_bn.running_var
    expected = {1: variance.mean(0, keepdim=True), 2: variance[:2], 5: variance[[0, 1, 2, 0, 1]]}[in_chans]
    torch.testing.assert_close(model.data_bn.running_var, expected)
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 7)


def test_checkpoint_filter_leaves_its_input_alone() -> None:
    state = create('resnet8_cifar').state_dict()
    before = dict(state)
    checkpoint_filter_fn(state, create('resnet8_cifar', in_chans=1))
    assert all(state[k] is before[k] for k in before)


def test_grey_pretrained_is_the_colour_network_on_grey_images(tmp_path) -> None:
    source = create('resnet8_cifar').eval()
    path = tmp_path / 'resnet8_cifar.pth'
    torch.save(source.state_dict(), path)
    grey = create('resnet8_cifar', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), in_chans=1).eval()
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), source(x.expand(-1, 3, -1, -1)))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['atac_resnet8_cifar', 'atac_resnet18'])
def test_compile_and_export(name) -> None:
    model = timm.create_model(name)
    x = torch.randn(2, 3, 32, 32)
    compiled: Any = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in compiled.parameters())
    expected = model.eval()(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # warnings of the exporter
@pytest.mark.parametrize('name', ['atac_resnet8_cifar', 'atac_resnet18'])
def test_onnx(name, run_onnx) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(run_onnx(model, x), model(x).detach(), rtol=1e-4, atol=1e-5)

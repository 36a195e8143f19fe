"""`norm_layer` reaches every norm of our networks, and the data norm of the CIFAR networks has an argument."""

import json
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from timm_versions import needs_safe_folders

import timm_atac

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
GROUP_NORM: dict[str, Any] = dict(norm_layer='groupnorm1')
WARNING = r"norm_layer='groupnorm1', data_norm_layer=None: .* still a BatchNorm.* Pass data_norm_layer=''"


def three_groups(channels: int, **kwargs: Any) -> nn.Module:
    return nn.GroupNorm(3, channels, **kwargs)


def change_by_other_images(model: nn.Module, x: torch.Tensor) -> float:
    """The largest change of the first image's logits if the other images change, relative to the largest logit."""
    other = torch.cat([x[:1], 3 * x[1:] + 1])
    logits = model.train()(x)[0]
    return ((model(other)[0] - logits).abs().max() / logits.abs().max()).item()


@pytest.mark.parametrize('name', ['resnet8_cifar', 'atac_resnet8_cifar'])
@pytest.mark.parametrize('data_norm_layer', ['', 'groupnorm1', 'layernorm2d', nn.InstanceNorm2d, three_groups])
def test_an_image_does_not_depend_on_others(name, data_norm_layer) -> None:
    model: Any = timm.create_model(name, **GROUP_NORM, data_norm_layer=data_norm_layer)
    assert not any(isinstance(module, BATCH_NORMS) for module in model.modules())
    assert not list(model.data_bn.parameters())
    x = torch.randn(4, 3, 16, 16)
    assert change_by_other_images(model, x) < 1e-5
    with torch.no_grad():
        features = model.forward_intermediates(x, norm=True)[1]
        torch.testing.assert_close(features[-1], model.forward_features(x))


@pytest.mark.parametrize('norm_layer', ['groupnorm1', nn.InstanceNorm2d, 'layernorm2d'])
def test_another_norm_layer_alone_warns(norm_layer) -> None:
    with pytest.warns(UserWarning, match='data_norm_layer=None: the norm of the images is still a BatchNorm'):
        model: Any = timm.create_model('resnet8_cifar', norm_layer=norm_layer)
    assert type(model.data_bn) is nn.BatchNorm2d
    assert change_by_other_images(model, torch.randn(4, 3, 16, 16)) > 1e-3


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(norm_layer='batchnorm2d'),
        dict(norm_layer=nn.SyncBatchNorm),
        dict(norm_layer=timm.layers.BatchNormAct2d),
    ],
)
def test_default_is_a_batch_norm(kwargs) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model: Any = timm.create_model('resnet8_cifar', **kwargs)
        explicit: Any = timm.create_model('resnet8_cifar', **GROUP_NORM, data_norm_layer='batchnorm2d')
    assert type(model.data_bn) is type(explicit.data_bn) is nn.BatchNorm2d
    assert not model.data_bn.affine and not explicit.data_bn.affine


@needs_safe_folders
@pytest.mark.parametrize('save', [timm.models.save_for_hf, timm_atac.save_for_hf])
@pytest.mark.parametrize('data_norm_layer', ['', 'groupnorm1', 'batchnorm2d'])
def test_saved_and_created_again(save, data_norm_layer, tmp_path) -> None:
    kwargs: dict[str, Any] = {**GROUP_NORM, 'data_norm_layer': data_norm_layer}
    model: Any = timm.create_model('atac_resnet8_cifar', **kwargs).eval()
    options: dict[str, Any] = {'safe_serialization': True} if save is timm.models.save_for_hf else {}
    save(model, str(tmp_path), model_args=kwargs, **options)
    again: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(again.data_bn) is type(model.data_bn)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x))


@needs_safe_folders
def test_a_config_without_the_argument_still_means_a_batch_norm(tmp_path) -> None:
    with pytest.warns(UserWarning, match=WARNING):
        model: Any = timm.create_model('resnet8_cifar', **GROUP_NORM)
    model(torch.randn(4, 3, 16, 16))
    timm_atac.save_for_hf(model.eval(), tmp_path, model_args=GROUP_NORM)
    assert 'data_norm_layer' not in json.loads((tmp_path / 'config.json').read_text())['model_args']
    with pytest.warns(UserWarning, match=WARNING):
        again: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('in_chans', [1, 5])
def test_pretrained_for_other_images(in_chans, tmp_path) -> None:
    kwargs: dict[str, Any] = {**GROUP_NORM, 'data_norm_layer': ''}
    path = tmp_path / 'weights.pth'
    torch.save(timm.create_model('resnet8_cifar', **kwargs).state_dict(), path)
    overlay = dict(file=str(path))
    model = timm.create_model(
        'resnet8_cifar', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_chans, **kwargs
    )
    assert model(torch.randn(2, in_chans, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('atac_resnet50', {}),
        ('atac_resnet18', dict(act_layer='xunit', layers=(1, 1, 1, 1))),
        ('atac_resnet50', dict(act_layer='nin', stem_type='deep', avg_down=True)),
        ('ge_plus_resnet50', dict(img_size=64)),
        ('aa_resnet50', dict(img_size=64)),
        ('fa_resnet50', {}),
        ('resnet8_cifar', dict(attn_layer='local_se', data_norm_layer='')),
        ('resnet8_cifar', dict(act_layer='xunit', data_norm_layer='')),
    ],
)
def test_norm_layer_reaches_all_norms(name, kwargs) -> None:
    kwargs = {'layers': (1,) * (3 if 'cifar' in name else 4), **GROUP_NORM, **kwargs}
    model: Any = timm.create_model(name, **kwargs)
    assert not any(isinstance(module, BATCH_NORMS) for module in model.modules())
    assert change_by_other_images(model, torch.randn(3, 3, 64, 64)) < 1e-5

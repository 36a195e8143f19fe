from typing import Any

import pytest
import timm
import torch.nn as nn

from timm_atac.hub.profile import profile


# GMACs and activations (M) as in timm's benchmark-infer-amp-nhwc-pt240-cu124-rtx3090.csv, which counts BN and pools too
@pytest.mark.slow
@pytest.mark.parametrize(
    'name, params, gmacs, activations',
    [('resnet50', 25.56, 4.11, 11.11), ('legacy_seresnet50', 28.09, 3.88, 10.6), ('seresnet50', 28.09, 4.11, 11.13)],
)
def test_figures_of_timm(name, params, gmacs, activations) -> None:
    found = profile(timm.create_model(name, device='meta'))
    assert found.params == pytest.approx(params, abs=0.006)
    assert found.gmacs == pytest.approx(gmacs, rel=0.01)
    assert found.activations == pytest.approx(activations, rel=0.002)
    assert found.input_size == (3, 224, 224)


def test_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 6, 7))
    found = profile(model, (3, 6, 8))
    assert found.params * 1e6 == pytest.approx(3 * 5 * 9 + 5 + 120 * 7 + 7)
    assert found.gmacs * 1e9 == pytest.approx(5 * 4 * 6 * 27 + 120 * 7)
    assert found.activations * 1e6 == pytest.approx(120 + 7)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['fa_resnet50', 'test_vit'])
def test_attention_is_counted_on_any_device(name) -> None:
    assert profile(timm.create_model(name)) == profile(timm.create_model(name, device='meta'))


def test_the_model_is_as_before() -> None:
    model: Any = timm.create_model('atac_resnet8_cifar')
    model.stages.eval()
    modes = [module.training for module in model.modules()]
    mean = model.norm.running_mean.clone()
    profile(model)
    assert [module.training for module in model.modules()] == modes
    assert (model.norm.running_mean == mean).all()
    assert not model.conv1._forward_hooks


@pytest.mark.slow
def test_a_model_that_looks_at_its_own_gradient_functions() -> None:
    """PiT's tokens after `replace_activations`: PyTorch's counter fails there without gradients."""
    found = profile(timm.create_model('atac_host', host='pit_ti_224', device='meta'))
    assert found.gmacs == pytest.approx(1.31, abs=0.01)

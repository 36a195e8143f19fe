"""Names of units, and the norm in them."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import GroupNorm1, LayerNorm2d, get_act_layer
from timm.models import save_for_hf

from timm_atac import ATAC, NiN, SEActivation, XUnit, replace_activations
from timm_atac.units import deferred
from timm_atac.units.host_norm import HostNorm
from timm_atac.units.names import ACTIVATIONS, NORMS, name_of

UNITS = {'atac': ATAC, 'se_act': SEActivation, 'nin': NiN, 'xunit': XUnit}
NORM_TYPES = {'layernorm2d': LayerNorm2d, 'groupnorm1': GroupNorm1}


def units(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, tuple(UNITS.values()))]


def norms_of(unit: Any) -> list[nn.Module]:
    return [getattr(unit, name) for name in ('bn', 'bn1', 'bn2') if hasattr(unit, name)]


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize(
    'unit', ['atac', *(pytest.param(unit, marks=pytest.mark.slow) for unit in UNITS if unit != 'atac')]
)
def test_a_name_says_the_norm_in_all_three_ways(unit: str, norm: str, tmp_path: Path) -> None:
    name = f'{unit}_{norm}'
    by_act_layer = timm.create_model('test_resnet', act_layer=name, num_classes=3)
    replaced: Any = replace_activations(timm.create_model('test_resnet', num_classes=3), name)
    by_host = timm.create_model('atac_host', host='test_resnet', act=name, num_classes=3)
    for model in (by_act_layer, replaced, by_host):
        found = units(model)
        assert found and all(type(m).__mro__[0] is UNITS[unit] or issubclass(type(m), UNITS[unit]) for m in found)
        assert {type(norm) for m in found for norm in norms_of(m)} == {NORM_TYPES[norm]}
    assert replaced.replaced_activations.act == name
    assert replaced.replaced_activations.model_args['act'] == name

    save_for_hf(replaced, str(tmp_path), model_args=replaced.replaced_activations.model_args)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(x), replaced.eval()(x))


def test_names_of_classes_and_partials() -> None:
    assert name_of(ATAC) == 'atac' and name_of(get_act_layer('atac')) == 'atac'
    assert name_of(partial(ATAC, norm_layer='layernorm2d')) == 'atac_layernorm2d'
    assert name_of(partial(ATAC, norm_layer='layernorm2d', rd_ratio=0.25)) is None
    assert name_of(nn.ReLU) is None
    assert len(ACTIVATIONS) == len(UNITS) * (1 + len(NORMS))


@pytest.mark.slow
def test_a_batch_of_one_trains_as_it_does_with_the_own_activation() -> None:
    x = torch.randn(1, 3, 32, 32)
    for act in ('silu', 'atac_layernorm2d', 'atac_groupnorm1'):
        timm.create_model('convnext_atto', act_layer=act).train()(x).sum().backward()
    with pytest.raises(ValueError, match=r'Expected more than 1 value per channel.*another `norm_layer`'):
        timm.create_model('convnext_atto', act_layer='atac').train()(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('host', 'kwargs', 'norm'),
    [
        ('resnet10t', {}, None),
        ('efficientnet_b0', {}, None),
        ('resnet10t', {'norm_layer': 'groupnorm1'}, 'GroupNorm1'),
        ('resnetv2_50x1_bit', {}, 'GroupNormAct'),
        ('convnext_atto', {}, 'LayerNorm2d'),
        ('vit_tiny_patch16_224', {}, 'LayerNorm'),
    ],
)
def test_batch_norm_in_a_model_without_it_is_said_once(
    host: str, kwargs: dict[str, Any], norm: str | None, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(deferred, 'host_norm', HostNorm())
    with caplog.at_level(logging.WARNING, 'timm_atac'):
        for _ in range(2):
            model = timm.create_model(host, act_layer='atac', **kwargs)
    assert units(model)
    said = [record.getMessage() for record in caplog.records if 'has BatchNorm' in record.getMessage()]
    assert len(said) == (norm is not None)
    assert all(f'the layers around it have {norm}. In training' in text for text in said)
    assert deferred._handle is None


def test_nothing_is_said_of_a_unit_with_another_norm(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(deferred, 'host_norm', HostNorm())
    with caplog.at_level(logging.WARNING, 'timm_atac'):
        timm.create_model('convnext_atto', act_layer='atac_layernorm2d')
    assert not caplog.records


def test_the_search_for_a_norm_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, 'host_norm', HostNorm())
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ATAC())
    assert deferred.host_norm.is_watching
    for _ in range(110):
        nn.Sequential(nn.ReLU())
    assert not deferred.host_norm.is_watching and deferred._handle is None and model[1].channels == 8


def test_a_container_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that contain a unit may be deleted before its width is known."""
    monkeypatch.setattr(deferred, 'host_norm', HostNorm())
    inner = nn.Sequential(ATAC())
    unit = inner[0]
    outer = nn.Sequential()
    outer.add_module('inner', inner)
    (places,) = deferred._waiting.values()
    places.insert(0, (lambda: None, '0'))  # as the weak reference of a deleted module
    outer.add_module('conv', nn.Conv2d(8, 4, 1))
    assert unit.channels == 8


@pytest.mark.slow
def test_replacement_reports_the_norm() -> None:
    report: Any = replace_activations(timm.create_model('convnext_atto'), where='paper', dry_run=True)
    assert report.mixes_images and report.norms == ('BatchNorm2d',)
    assert 'the model has no BatchNorm' in str(report) and 'the model has no BatchNorm' in report.caveats()
    other: Any = replace_activations(
        timm.create_model('convnext_atto'), 'atac_layernorm2d', where='paper', dry_run=True
    )
    assert not other.mixes_images and '  norm of the units: LayerNorm2d' in str(other).splitlines()
    host: Any = replace_activations(timm.create_model('resnet10t'), dry_run=True)
    assert not host.mixes_images and '  norm of the units: BatchNorm2d' in str(host).splitlines()


def test_a_norm_given_twice_keeps_the_name() -> None:
    model = timm.create_model('atac_resnet18', layers=(1, 1, 1, 1), act_layer='atac_layernorm2d', norm_layer=GroupNorm1)
    assert {type(norm) for m in units(model) for norm in norms_of(m)} == {LayerNorm2d}

"""timm_atac/_register.py"""

from importlib.metadata import requires
from typing import Any

import pytest
import timm
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from timm.models import nfnet

from timm_atac import ATAC, ATACMe, _register


def test_oldest_timm_is_what_the_package_requires() -> None:
    requirements = {r.name: r for r in map(Requirement, requires('timm_atac') or [])}
    assert str(requirements['timm'].specifier) == f'>={_register.MIN_TIMM}'
    assert Version(timm.__version__) in requirements['timm'].specifier


@pytest.mark.parametrize(
    'version, release',
    [
        ('1.0.31', (1, 0, 31)),
        ('1.0.21.dev0', (1, 0, 21)),
        ('1.1', (1, 1)),
        ('1.0.31rc1', (1, 0, 31)),
        ('1.0.31+local.4', (1, 0, 31)),
    ],
)
def test_release(version, release) -> None:
    assert _register._release(version) == release


def test_registering_twice_changes_nothing(recwarn) -> None:
    before = timm.list_models(include_tags=True)
    _register.register()
    assert timm.list_models(include_tags=True) == before
    assert not recwarn.list


def test_acts_by_name() -> None:
    assert timm.layers.get_act_layer('atac') is ATACMe
    with timm.layers.set_scriptable(True):
        assert timm.layers.get_act_layer('atac') is ATAC


@pytest.mark.parametrize('name', ['atac', 'se_act', 'nin'])
def test_gain_for_nfnets(name) -> None:
    """An NFNet scales its weights so that activations keep the variance of a standard normal input."""
    unit = timm.layers.create_act_layer(name, channels=257)
    y = unit(torch.randn(64, 257, 7, 5)) * nfnet._nonlin_gamma[name]
    assert y.std().item() == pytest.approx(1, abs=0.01)


def test_a_model_that_wants_a_function_is_told() -> None:
    model: Any = timm.create_model('dm_nfnet_f0', act_layer='atac', device='meta')
    with pytest.raises(ValueError, match=r"calls its activation as a function.*replace_activations\(model, 'atac'\)"):
        model(torch.zeros(2, 3, 64, 64, device='meta'))

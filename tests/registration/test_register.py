import copy
from importlib.metadata import requires
from typing import Any

import pytest
import timm
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from timm.models import nfnet
from timm_tests import OUR_MODULES

from timm_atac import ATAC, ATACMe, _register, _timm


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


def test_forget_removes_what_is_ours_and_nothing_else() -> None:
    registry = _timm._registry
    tables = {k: v for k, v in vars(registry).items() if isinstance(v, (dict, set)) and not k.startswith('__')}
    before = copy.deepcopy(tables)
    others = set(timm.list_models()) - set(timm.list_models(module=OUR_MODULES))
    networks = timm.list_models(module=OUR_MODULES)
    assert networks
    try:
        _timm.forget(networks, OUR_MODULES, ['atac'])
        assert set(timm.list_models()) == others
        assert not set(OUR_MODULES) & set(timm.list_modules())
        assert not [key for table in tables.values() for key in table if key in networks or '_cifar' in str(key)]
        with pytest.raises(KeyError):
            timm.layers.get_act_layer('atac')
    finally:
        _register.register()
    assert tables == before
    assert timm.layers.get_act_layer('atac') is ATACMe
    with timm.layers.set_scriptable(True):
        assert timm.layers.get_act_layer('atac') is ATAC


def test_registering_twice_changes_nothing(recwarn) -> None:
    before = timm.list_models(include_tags=True)
    _register.register()
    assert timm.list_models(include_tags=True) == before
    assert not recwarn.list


def test_failure_in_the_middle_leaves_nothing(monkeypatch) -> None:
    registry = _timm._registry
    networks = timm.list_models(module=OUR_MODULES)
    _timm.forget(networks, OUR_MODULES, ['atac', 'se_act', 'nin'])
    before = timm.list_models(include_tags=True)
    calls: list[Any] = []

    def register_three(entry_function):
        if len(calls) == 3:
            raise TypeError('a timm too new')
        calls.append(registry.register_model(entry_function))

    monkeypatch.setattr(timm.models, 'register_model', register_three)
    try:
        with pytest.raises(TypeError, match='a timm too new'):
            _register.register()
        assert len(calls) == 3
        assert timm.list_models(include_tags=True) == before
    finally:
        monkeypatch.undo()
        _register.register()
    assert timm.list_models(module=OUR_MODULES) == networks


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

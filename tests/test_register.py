from importlib.metadata import requires

import pytest
import timm
from packaging.requirements import Requirement
from packaging.version import Version

from timm_atac import _register, _timm


def test_oldest_timm_is_what_the_package_requires() -> None:
    requirements = {r.name: r for r in map(Requirement, requires('timm_atac') or [])}
    assert str(requirements['timm'].specifier) == f'>={_register.MIN_TIMM}'
    assert Version(timm.__version__) in requirements['timm'].specifier


@pytest.mark.parametrize(
    'version, release',
    [('1.0.31', (1, 0, 31)), ('1.0.21.dev0', (1, 0, 21)), ('1.1', (1, 1)), ('2.0.0rc1', (2, 0)), ('1.0.9', (1, 0, 9))],
)
def test_release(version, release) -> None:
    assert _register._release(version) == release


def test_snapshot_restores_every_table() -> None:
    registry = _timm._registry
    before = _timm.Snapshot()
    assert {'_model_entrypoints', '_module_to_models', '_model_has_pretrained', 'act_layers'} <= set(before._tables)
    entrypoints = dict(registry._model_entrypoints)
    registry._model_entrypoints.pop('resnet50')
    registry._module_to_models['resnet'].discard('resnet50')
    registry._model_has_pretrained.add('nonsense')
    registry._model_with_tags['resnet50'].append('nonsense')
    before.restore()
    assert registry._model_entrypoints == entrypoints
    assert 'resnet50' in registry._module_to_models['resnet']
    assert 'nonsense' not in {*registry._model_has_pretrained, *registry._model_with_tags['resnet50']}
    assert timm.list_models('resnet50') == ['resnet50']


def test_taken_activation_name() -> None:
    with pytest.raises(RuntimeError, match=r"the activation name 'silu' is taken by .*SiLU"):
        _timm.add_act_layer('silu', timm.layers.Swish)

"""ATAC in place of the activations of finished models."""

import copy
import io
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from hosts import by_act_layer, by_replacing

from timm_atac import ATAC, NiN, replace_activations
from timm_atac.replace import UnitPerWidth

MODULES = ['resnet', 'levit', 'starnet', 'vision_transformer', 'mambaout']


@pytest.mark.slow
@pytest.mark.parametrize('way', [by_act_layer, by_replacing])
@pytest.mark.parametrize('module', MODULES)
def test_hosts(module, way) -> None:
    row = way(module)
    assert row.result == 'ok', row
    assert row.units
    assert row.features in ('ok', ''), row


def test_one_unit_for_each_place() -> None:
    model: Any = torchvision.models.resnet50(weights=None)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    done: Any = replace_activations(model)
    assert id(done) == id(model)
    report: Any = model.replaced_activations
    assert len(report.replaced) == 49
    assert not report.left
    block: Any = model.layer4[0]
    assert isinstance(block, torchvision.models.resnet.Bottleneck)
    assert [block.relu.channels, block.relu_2.channels] == [512, 2048]
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items())

    model.eval()
    x = torch.randn(2, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    'where, units',
    [('layer4.*', 4), (nn.ReLU, 17), (4, 4), ((-2, -1), 8), (lambda name, _: name.endswith('act1'), 9), (None, 17)],
)
def test_where(where, units) -> None:
    model = replace_activations(timm.create_model('resnet18'), where=where)
    assert sum(isinstance(m, ATAC) for m in model.modules()) == units


class _Loop(nn.Module):
    """Calls one activation with two widths, as often as the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 7, 1), nn.ReLU()

    def forward(self, x):
        x = self.act(self.conv1(x))
        return self.act(self.conv2(x)) if x.shape[0] > 1 else x


def test_one_unit_for_each_width_where_there_is_no_graph() -> None:
    model: Any = replace_activations(_Loop(), 'nin')
    assert isinstance(model.act, UnitPerWidth)
    assert {unit.channels for unit in model.act.units.values() if isinstance(unit, NiN)} == {5, 7}
    assert model(torch.randn(2, 3, 11, 13)).shape == (2, 7, 11, 13)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'where': 'layer9.*'}, 'fits no activation of ResNet that can be replaced'),
        ({'where': 9}, 'expected a stage from 1 to 4'),
        ({'where': []}, 'expected a pattern of names'),
        ({'act': 'relu'}, "act='relu': expected 'atac', 'se_act', 'nin'"),
        ({'example_input': torch.zeros(2, 5, 64, 64)}, 'Give an example_input'),
    ],
)
def test_errors_change_nothing(kwargs, message) -> None:
    model = timm.create_model('resnet18')
    before = repr(model)
    with pytest.raises(ValueError, match=message):
        replace_activations(model, **kwargs)
    assert repr(model) == before

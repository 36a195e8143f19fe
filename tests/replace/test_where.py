"""Each name selects its place, and every part of `where` has to fit something."""

from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from timm_atac import ATAC, replace_activations
from timm_atac.replace.activations import replace_selected
from timm_atac.replace.edits import UnitPerWidth
from timm_atac.replace.placement import Placement
from timm_atac.replace.places import find_places
from timm_atac.replace.trace import is_activation, trace
from timm_atac.replace.where import Selection

X = torch.randn(2, 3, 5, 7)


class Shared(nn.Module):
    """One ReLU at three places, a function and an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.relu, self.act = nn.ReLU(), nn.GELU()

    def forward(self, x):
        x = F.silu(self.relu(self.conv1(x)))
        return self.act(self.relu(self.conv3(self.relu(self.conv2(x)))))


class Branches(nn.Module):
    """Has no graph, so that there is a unit for each width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.ReLU()

    def forward(self, x):
        x = self.relu(self.conv1(x))
        return self.relu(self.conv2(x)) if x.mean() < 100 else x


def report(model: nn.Module, where: Any = 'all', x: Any = X) -> Any:
    return replace_activations(model, where=where, example_input=x, dry_run=True)


def names(found: Any) -> list[str]:
    return [r.name for r in found.replaced]


@pytest.mark.slow
@pytest.mark.parametrize('cls', [Shared, Branches])
def test_each_name_of_the_full_report_selects_its_place(cls) -> None:
    full = names(report(cls()))
    assert full == (['relu', 'silu', 'relu_1', 'relu_2', 'act'] if cls is Shared else ['relu.units.8', 'relu.units.6'])
    for name in full:
        assert names(report(cls(), name)) == [name]
        model: Any = replace_activations(cls(), where=name, example_input=X)
        assert [k for k, m in model.named_modules() if isinstance(m, ATAC)] == [name]
        assert model(X).shape == ((2, 8, 5, 7) if cls is Shared else (2, 6, 5, 7))


def test_names_do_not_depend_on_what_else_is_chosen() -> None:
    for where in (['relu', 'relu_2'], ['silu', 'relu_1'], ['relu_2'], ['relu_1', 'act']):
        model: Any = replace_activations(Shared(), where=where, example_input=X)
        units = [k for k, m in model.named_modules() if isinstance(m, ATAC)]
        assert sorted(units) == sorted(where)
        left = {'relu', 'relu_1', 'relu_2'} - set(where)
        assert all(type(getattr(model, k, None)) in (nn.ReLU, type(None)) for k in left)


@pytest.mark.parametrize('where', ['relu', 'relu_1', ['relu_1', 'relu_2']])
def test_other_places_compute_what_they_did(where) -> None:
    """With a unit that doubles its input, the changed places double, and the others remain ReLUs."""

    class Double(nn.Module):
        def __init__(self, channels, input_fmt='NCHW') -> None:
            super().__init__()

        def forward(self, x):
            return 2 * x

    plain = Shared()
    chosen = [where] if isinstance(where, str) else where

    def expected(x):
        def act(name, y):
            return 2 * y if name in chosen else y.relu()

        x = F.silu(act('relu', plain.conv1(x)))
        return F.gelu(act('relu_2', plain.conv3(act('relu_1', plain.conv2(x)))))

    y = expected(X)
    torch.testing.assert_close(replace_activations(plain, Double, where=where, example_input=X)(X), y)


def test_only_one_width_of_an_activation_without_a_graph() -> None:
    model: Any = replace_activations(Branches(), where='relu.units.8', example_input=X)
    assert isinstance(model.relu, UnitPerWidth)
    assert isinstance(model.relu.units['8'], ATAC) and isinstance(model.relu.units['6'], nn.ReLU)


@pytest.mark.slow
def test_names_of_torchvision() -> None:
    model = torchvision.models.resnet50(weights=None)
    inputs = (torch.zeros(2, 3, 64, 64),)
    activations = {m for m in model.modules() if is_activation(m)}
    observed = trace(model, inputs, activations)
    places = find_places(model, activations, observed)
    assert len(places) == 49
    for place in places:
        assert Selection(place.name).choose(model, places, Placement(observed), []) == [place]
    found = Selection('layer4.*.relu_1').choose(model, places, Placement(observed), [])
    assert [place.name for place in found] == [f'layer4.{i}.relu_1' for i in range(3)]
    assert len(Selection('layer4.*.relu', saved=True).choose(model, places, Placement(observed), [])) == 9


@pytest.mark.parametrize(
    'where, message',
    [
        (
            ['layer3.*.act1', 'layr4.*.act1'],
            r"where='layr4.\*.act1' fits no activation of ResNet; did you mean 'layer4",
        ),
        (['layer3.*.act1', nn.GELU], "where=<class 'torch.nn.modules.activation.GELU'> fits no activation of ResNet"),
        (9, r'1 to 4, .* ResNet has 4 stages: 1 \(layer1\); 2 \(layer2\); 3 \(layer3\); 4 \(layer4\)\. Patterns'),
        ('attention', "where='attention' fits no activation of ResNet. There are 17 activations: act1, layer1.0.act1,"),
    ],
)
def test_a_part_that_fits_nothing(where, message) -> None:
    model = timm.create_model('resnet18', device='meta')
    with pytest.raises(ValueError, match=message):
        replace_activations(model, where=where)
    assert not hasattr(model, 'replaced_activations')


def test_functions_are_among_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"did you mean 'silu' or 'relu'\? There are 5 activations: relu, silu, relu_1, relu_2"
    ):
        report(Shared(), 'slu')


def test_nothing_is_an_inner_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.ReLU())
    with pytest.raises(ValueError, match=r'none is an inner activation of a block.* There is 1 activation: 2\. .*none'):
        report(model, 'paper')


@pytest.mark.slow
def test_stages_of_efficientnet() -> None:
    with torch.device('meta'):
        model = timm.create_model('efficientnet_b0')
    found = report(model, -1, None)
    assert {name.partition('.bn')[0].rpartition('.')[0] for name in names(found)} == {'blocks.5', 'blocks.6'}
    assert found.stages[-1] == '5 (blocks.5, blocks.6)'
    assert not any('.se.' in name for name in names(found))
    assert dict(found.not_chosen)['inside an attention module'][-1] == 'blocks.6.0.se.act1'
    assert len(names(report(model, [-1, 'attention'], None))) == len(names(found)) + 5


@pytest.mark.slow
def test_saved_stages_are_counted_as_they_were() -> None:
    """The last stage of a ByobNet ends with a module that has no children. Version 0.1 did not count it."""
    model = timm.create_model('test_byobnet', device='meta')
    saved = replace_selected(model, 'atac', Selection(-1, saved=True), None, None, dry_run=True)
    assert names(saved) == ['stages.2.0.conv1_kxk.bn.act', 'stages.2.0.attn_last.act', 'stages.2.0.act']
    now = report(model, -1, None)
    assert all(name.startswith('stages.3.0.') for name in names(now))
    assert now.stages[-1] == '5 (stages.3)'


def test_saved_arguments_mean_what_they_meant() -> None:
    def old(where: Any) -> list[str]:
        return names(replace_selected(Shared(), 'atac', Selection(where, saved=True), X, None, dry_run=True))

    assert old('relu') == ['relu', 'relu_1', 'relu_2']
    assert old(['act', 'nowhere.*']) == ['act']
    assert old(None) == old('all') == names(report(Shared()))


@pytest.mark.parametrize(
    'where, saved, expected',
    [
        (None, False, 'all'),
        ('all', False, 'all'),
        ('relu_1', False, {'places': ['relu_1']}),
        (nn.GELU, False, {'places': ['act']}),
        (lambda name, _: name == 'relu_2', False, {'places': ['relu_2']}),
        (['relu*', 'attention'], False, {'places': ['attention', 'relu*']}),
        (None, True, 'all'),
        (['relu', 'act'], True, ['relu', 'act']),
        (nn.ReLU, True, ['relu']),
    ],
)
def test_serializable(where, saved, expected) -> None:
    model = Shared()
    activations = {m for m in model.modules() if is_activation(m)}
    observed = trace(model, (X,), activations)
    selection = Selection(where, saved)
    chosen = selection.choose(model, find_places(model, activations, observed), Placement(observed), [])
    assert selection.serializable(chosen) == expected

"""A module that calls one activation several times gets a unit for each place."""

import copy
import io
import random
import types
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.utils import ModelEmaV3

from timm_atac import ATAC, replace_activations
from timm_atac.replace.edits import UnitPerWidth

X = torch.randn(2, 3, 5, 7)


class Twice(nn.Module):
    """One activation after each of two convolutions of different width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.ReLU()
        self.scale = 1.0
        self.seen: Any = None

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))))


class WithOptions(Twice):
    def forward(self, x, mask=None, scale=1.0):
        x = self.relu(self.conv1(x)) * scale
        return self.relu(self.conv2(x))


class Keeps(Twice):
    def forward(self, x):
        self.seen = self.relu(self.conv1(x))
        return self.relu(self.conv2(self.seen))


class MakesTensors(Twice):
    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x) * torch.tensor(0.5))))


class Random(Twice):
    def forward(self, x):
        x = self.relu(self.conv1(x))
        return self.relu(self.conv2(x)) if random.random() < 0.5 else self.relu(self.conv2(-x))


class Scaled(Twice):
    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x)))) * self.scale


class Functional(Twice):
    def forward(self, x, skips=()):
        return F.relu(self.conv2(F.relu(self.conv1(x))))


def replaced(module: nn.Module) -> Any:
    return replace_activations(module, example_input=X)


def units(model: nn.Module) -> dict[str, int | None]:
    return {name: m.channels for name, m in model.named_modules() if isinstance(m, ATAC)}


def test_a_unit_for_each_place() -> None:
    assert units(replaced(Twice())) == {'relu': 8, 'relu_1': 6}


@pytest.mark.parametrize('cls', [Keeps, MakesTensors, Random])
def test_no_graph_where_the_forward_pass_does_more_than_it(cls) -> None:
    module = cls()
    model = replaced(module)
    assert isinstance(model.relu, UnitPerWidth)
    assert units(model) == {'relu.units.6': 6, 'relu.units.8': 8}
    assert model.seen is None or type(model.seen) is torch.Tensor
    assert not [name for name in vars(model) if 'tensor_constant' in name]
    model(X)
    if cls is Keeps:
        assert tuple(getattr(model, 'seen').shape) == (2, 8, 5, 7)  # noqa: B009


def test_functions_of_a_forward_pass_that_has_no_graph_stay() -> None:
    module = Functional()
    with pytest.raises(ValueError, match=r'relu_1 stays: a function, and its arguments have defaults'):
        replaced(module)


def test_an_instance_with_a_forward_of_its_own() -> None:
    module: Any = Twice()
    module.forward = types.MethodType(Twice.forward, module)
    assert isinstance(replaced(module).relu, UnitPerWidth)


def test_options_keep_their_names() -> None:
    model = replaced(WithOptions())
    assert set(units(model)) == {'relu', 'relu_1'}
    assert model(X, mask=None).shape == (2, 6, 5, 7)
    with pytest.raises(Exception, match='scale'):  # the graph is for the value it was made with
        model(X, scale=2.0)


def test_what_is_part_of_the_graph_cannot_change_silently() -> None:
    model = replaced(Scaled())
    assert set(units(model)) == {'relu', 'relu_1'}
    model.scale = 1.0
    model.other = 2
    with pytest.raises(AttributeError, match=r'scale = 0.5: it was 1.0.*Set it before replace_activations'):
        model.scale = 0.5
    assert model.scale == 1.0
    copy.deepcopy(model).train().half()


def test_graph_modules_are_left_whole() -> None:
    model = torch.fx.symbolic_trace(Twice())
    replaced(model).eval()
    torch.testing.assert_close(copy.deepcopy(model)(X), model(X))


@pytest.mark.slow
def test_copies_have_their_own_weights_also_when_compiled() -> None:
    model = replaced(Twice()).eval()
    model.compile(backend='eager')
    model(X)
    average = ModelEmaV3(model, decay=0.0)
    expected = model(X)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(average.module(X), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is type(model)


@pytest.mark.slow
def test_one_class_for_all_blocks_that_are_alike() -> None:
    model: Any = torchvision.models.resnet18(weights=None)
    replace_activations(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again.layer1[0]) is type(model.layer1[0]) is type(model.layer1[1])


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # the width becomes a constant
def test_trace_of_a_unit_per_width() -> None:
    model = replaced(Random()).eval()
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(torch.jit.trace(model.relu, (x,))(x), model.relu(x))

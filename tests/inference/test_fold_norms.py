"""Which norms are folded into which layers, and that the layers then compute the same."""

import copy
import sys
import weakref
from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn as nn
from fused_models import images, norms, with_random_norms
from timm.utils import freeze
from torch.nn.utils import parametrize

from timm_atac import NiN, SEActivation, fuse
from timm_atac.inference.fold_norms import fold
from timm_atac.inference.norms import FoldedNorm, ScaleShift


class Net(nn.Module):
    """Two layers and two norms, put together in a given way."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def _kept(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.last = net.conv(x)
    return net.bn(net.last)


def _in_place(net: Any, x: torch.Tensor) -> torch.Tensor:
    h = net.conv(x)
    h.mul_(2)
    return net.bn(h)


@pytest.mark.parametrize(
    'folds, run',
    [
        (1, lambda net, x: net.bn(net.conv(x))),
        (1, lambda net, x: net.bn(net.conv(x)) + x),
        (0, lambda net, x: net.bn(net.conv(x).relu())),
        (0, _in_place),
        (0, lambda net, x: (lambda h: net.bn(h) + h)(net.conv(x))),
        (0, lambda net, x: (lambda h: (net.bn(h), h))(net.conv(x))),
        (0, lambda net, x: (lambda h: net.bn(h) + net.other(h))(net.conv(x))),
        (0, lambda net, x: net.bn(net.conv(net.conv(x)))),
        (0, lambda net, x: net.bn(net.bn(net.conv(x)))),
        (0, lambda net, x: net.bn(net.conv(x)) * net.conv.weight.mean()),
        (0, lambda net, x: net.bn(net.conv(x)) * net.bn.running_var.mean()),
        (0, lambda net, x: (net.bn(net.conv(x)), net.conv.weight)),
        (0, lambda net, x: net.bn.train()(net.conv(x))),
        (0, _kept),
        (1, lambda net, x: net.bn(net.conv(x)) * net.bn.eps),
        (0, lambda net, x: net.bn(torch.cat([net.conv(x)[:1], x[1:]]))),
        (0, lambda net, x: (lambda h: net.bn(h) + h.mT.mean())(net.conv(x))),
        (1, lambda net, x: (lambda h: net.bn(h) * h.shape[1])(net.conv(x))),
    ],
)
def test_only_what_is_next_to_each_other(folds, run) -> None:
    model = with_random_norms(Net(run))
    x = images(model)
    fused = fuse(model, example_input=x)
    assert isinstance(fused.bn, FoldedNorm) == bool(folds)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


def _in_a_future(h: torch.Tensor) -> Any:
    """Only C++ has a reference to the tensor."""
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(h)
    return future


KEPT: list[Any] = []


@pytest.mark.parametrize(
    'keep',
    [
        lambda h: h,
        lambda h: {'output': [h]},
        lambda h: lambda: h,
        lambda h: h[:, :1],
        lambda h: h.view(-1),
        lambda h: h.detach(),
        lambda h: h.data,
        lambda h: h.mT,
        lambda h: h.untyped_storage(),
        lambda h: h.numpy(),
        _in_a_future,
        torch.utils.dlpack.to_dlpack,
    ],
)
@pytest.mark.parametrize('by_value', [False, True])
@pytest.mark.parametrize('references', [0, 1])
def test_a_kept_output_is_not_normalized(monkeypatch, keep, by_value, references) -> None:
    """Python 3.14 counts fewer references to an object, because it borrows them."""
    monkeypatch.setattr(sys, 'getrefcount', lambda value, count=sys.getrefcount: count(value) - 1 - references)
    monkeypatch.setattr(sys.modules[__name__], 'KEPT', [])

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        h = net.conv(x)
        KEPT.append(keep(h))
        return net.bn(h) * (x.sum().item() if by_value else 1)

    model = with_random_norms(Net(run))
    fused = fuse(model, example_input=images(model))
    assert isinstance(fused.bn, ScaleShift)


class CountLive(nn.Module):
    """Keeps weak references to its inputs and counts how many of them are alive."""

    inputs: ClassVar[list[weakref.ref]] = []
    most: ClassVar[int] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(weakref.ref(x))
        CountLive.most = max(self.most, sum(value() is not None for value in self.inputs))
        return x


class NeedsValues(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * x.sum().item()


def test_outputs_are_not_kept_alive(monkeypatch) -> None:
    """A pass on the device of the model needs the memory of one feature map after the other, not of all."""
    monkeypatch.setattr(CountLive, 'inputs', [])
    monkeypatch.setattr(CountLive, 'most', 0)
    stages = [nn.Sequential(nn.Conv2d(3, 3, 1), CountLive(), nn.BatchNorm2d(3)) for _ in range(8)]
    model = with_random_norms(NeedsValues(*stages))
    CountLive.inputs.clear()
    CountLive.most = 0
    fused = fuse(model, example_input=images(model))
    assert not norms(fused)
    assert len(CountLive.inputs) == 4 * len(stages)  # on meta, on the device, and twice to compare the outputs
    assert CountLive.most <= 2


def _hooked(net: Any) -> None:
    net.conv.register_forward_hook(lambda module, args, y: y * 2)


def _parametrized(net: Any) -> None:
    parametrize.register_parametrization(net.conv, 'weight', nn.Tanh())


def _without_statistics(net: Any) -> None:
    net.bn = nn.BatchNorm2d(3, track_running_stats=False).double()


@pytest.mark.parametrize('change', [_hooked, _parametrized, _without_statistics])
@pytest.mark.parametrize('by_value', [False, True])
def test_what_stays(change, by_value) -> None:
    """`by_value` is a forward pass that needs values, so that it cannot run on the meta device."""
    model = with_random_norms(Net(lambda net, x: net.bn(net.conv(x)) * (x.sum().item() if by_value else 1)))
    change(model)
    model.eval()
    x = images(model)
    fused = fuse(model, example_input=x)
    assert not isinstance(fused.bn, FoldedNorm)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


def test_forward_that_needs_values() -> None:
    model = with_random_norms(Net(lambda net, x: net.bn(net.conv(x)) * x.sum().item()))
    x = images(model)
    fused = fuse(model, example_input=x)
    assert isinstance(fused.bn, FoldedNorm)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    'layer, norm, shape',
    [
        (nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), (4, 3, 9)),
        (nn.Conv3d(3, 5, 3, groups=1), nn.BatchNorm3d(5, affine=False), (4, 3, 5, 5, 5)),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2, dilation=2, bias=False), nn.BatchNorm2d(6), (4, 4, 9, 9)),
        (timm.layers.Conv2dSame(3, 5, 3, stride=2), nn.BatchNorm2d(5, eps=0.1), (4, 3, 8, 8)),
        (nn.Linear(3, 5), nn.BatchNorm1d(5), (7, 3)),
    ],
)
def test_layers(layer, norm, shape) -> None:
    model = nn.Sequential(layer, norm).double().train()
    x = torch.randn(shape, dtype=torch.float64)
    model(x * 3 + 1)
    expected = model.eval()(x)
    fused: Any = fuse(model, example_input=x)
    assert isinstance(fused[1], FoldedNorm)
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)


def test_linear_layer_of_tokens_stays() -> None:
    """Its channels are the last dimension, those of a BatchNorm the second."""
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).double()
    x = torch.randn(4, 5, 5, dtype=torch.float64)
    model(x)
    fused: Any = fuse(model.eval(), example_input=x)
    assert isinstance(fused[1], ScaleShift)
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.slow
def test_frozen_norms() -> None:
    model = with_random_norms(timm.create_model('atac_resnet18'))
    frozen: Any = copy.deepcopy(model)
    freeze(frozen)
    assert not norms(frozen)
    fused = fuse(frozen)
    assert not [m for m in fused.modules() if 'BatchNorm' in type(m).__name__]
    x = images(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11)


def test_drop_runs_before_the_activation() -> None:
    """timm's synchronized norm has them as attributes in the other order."""
    norm = timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(3, drop_layer=nn.Dropout)).eval()
    assert [name for name, _ in norm.named_children()] == ['act', 'drop']
    fold(nn.Conv2d(3, 3, 1), norm)
    assert type(norm) is FoldedNorm
    assert [name for name, _ in norm.named_children()] == ['drop', 'act']


def test_half_precision_is_folded_exactly() -> None:
    """The folded weights are the float64 weights rounded once."""
    conv, norm = nn.Conv2d(16, 16, 1).bfloat16(), nn.BatchNorm2d(16).eval().bfloat16()
    assert norm.running_var is not None
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    exact = copy.deepcopy(conv).double()
    fold(exact, copy.deepcopy(norm).double())
    fold(conv, norm)
    assert conv.weight.dtype == torch.bfloat16 and torch.equal(conv.weight, exact.weight.bfloat16())
    assert conv.bias is not None and exact.bias is not None
    assert conv.bias.dtype == torch.bfloat16 and torch.equal(conv.bias, exact.bias.bfloat16())


def test_other_units_are_folded_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), NiN(6), SEActivation(6)).eval()
    fused: Any = fuse(model, example_input=torch.zeros(2, 3, 4, 4))
    assert [type(m) for m in fused] == [nn.Conv2d, NiN, SEActivation]
    assert not norms(fused)

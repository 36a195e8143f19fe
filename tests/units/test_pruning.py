"""Networks whose layers become narrower: a unit has the width of its layers."""

import copy
import io
import pickle
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn

from timm_atac import ATAC, ATACMe, LocalSE, NiN, SEActivation, XUnit, fuse, replace_activations
from timm_atac.replace.edits import UnitPerWidth

UNITS: list[Any] = [ATAC, ATACMe, SEActivation, LocalSE, NiN, XUnit]
LEFT = torch.tensor([0, 2, 3, 5, 6, 9])  # of ten channels


def narrow(layer: Any, out: Any, into: Any, numbers: bool) -> None:
    """Leave the channels `out` and `into` of a convolution or norm, None for all, and change its numbers too."""
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.ndim:
            left = tensor.detach() if out is None else tensor.detach()[out]
            left = left[:, into] if tensor.ndim == 4 and into is not None else left
            setattr(layer, name, nn.Parameter(left) if isinstance(tensor, nn.Parameter) else left)
    if not isinstance(layer, nn.Conv2d):
        layer.num_features = len(layer.running_mean)
    elif layer.groups > 1:
        layer.groups = layer.in_channels = layer.out_channels = len(layer.weight)
    elif numbers:
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]


def narrow_unit(unit: Any, numbers: bool = True) -> None:
    """Leave some channels of a unit of ten channels, and three of the five in its bottleneck."""
    if isinstance(unit, XUnit):
        narrow(unit.conv, LEFT, None, numbers)
        narrow(unit.bn, LEFT, None, numbers)
        return
    hidden = torch.tensor([0, 3, 4])
    narrow(unit.conv1, hidden, LEFT, numbers)
    narrow(unit.bn1, hidden, None, numbers)
    narrow(unit.conv2, LEFT, hidden, numbers)
    narrow(unit.bn2, LEFT, None, numbers)


@pytest.mark.parametrize('numbers', [True, False])
@pytest.mark.parametrize('unit', UNITS)
def test_by_hand(unit, numbers) -> None:
    """`numbers` is False for a method that changes only tensors, since PyTorch's layers run then too."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), unit(), nn.Conv2d(10, 4, 1))
    narrow(model[0], LEFT, None, numbers)
    narrow(model[1], LEFT, None, numbers)
    narrow_unit(model[2], numbers)
    narrow(model[3], None, LEFT, numbers)
    assert model[2].channels == 6
    assert repr(model[2]).startswith(f'{unit.__name__}(\n  6, input_fmt=NCHW')

    x = torch.randn(2, 3, 7, 7)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    expected = model.eval()(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())
    fused: Any = fuse(model, example_input=x)
    assert fused[2].channels == 6
    torch.testing.assert_close(fused(x), expected)
    for network in (model, fused):
        with pytest.raises(ValueError, match=r'is for 6 channels in NCHW and got .*2, 10, 5, 5'):
            network[2](torch.randn(2, 10, 5, 5))


def test_layout_of_tokens() -> None:
    unit = ATAC(10, input_fmt='NLC').eval()
    narrow_unit(unit)
    assert unit(torch.randn(2, 4, 6)).shape == (2, 4, 6)


def test_after_fusion() -> None:
    fused: Any = fuse(nn.Sequential(ATAC(10)), example_input=torch.randn(2, 10, 3, 3))
    narrow_unit_without_norms = (('conv1', slice(3), LEFT), ('conv2', LEFT, slice(3)))
    for name, out, into in narrow_unit_without_norms:
        narrow(getattr(fused[0], name), out, into, True)
    assert fused[0].channels == 6
    assert 'FusedATAC(\n  6, ' in repr(fused[0])
    assert fused(torch.randn(2, 6, 3, 3)).shape == (2, 6, 3, 3)


@pytest.mark.parametrize('unit', [ATACMe, XUnit])
def test_pickles_from_when_a_unit_remembered_its_width(unit) -> None:
    old = unit(10).eval()
    vars(old)['channels'] = vars(old).pop('created_channels')
    del vars(old)['inferred_from']
    for new in (copy.deepcopy(old), pickle.loads(pickle.dumps(old))):
        assert new.channels == new.created_channels == 10
        assert 'channels' not in vars(new)
        x = torch.randn(2, 10, 3, 3)
        assert torch.equal(new(x), old(x))
        with pytest.raises(ValueError, match='is for 10 channels'):
            new(torch.randn(2, 6, 3, 3))
        narrow_unit(new)
        assert new(torch.randn(2, 6, 3, 3)).shape == (2, 6, 3, 3)


def test_first_layer_of_unknown_width() -> None:
    """The unit still knows the width that it was created with."""
    unit = ATAC(10)
    unit.conv1 = nn.Sequential(unit.conv1)  # type: ignore[assignment]
    assert unit.channels == 10
    assert unit(torch.randn(2, 10, 3, 3)).shape == (2, 10, 3, 3)


def test_parametrized_weight() -> None:
    unit = nn.utils.parametrizations.weight_norm(ATAC(10).conv1)
    changed = ATAC(10)
    changed.conv1 = unit
    assert changed.channels == 10


def test_unit_for_each_width() -> None:
    """What takes the place of an activation that is called with several widths goes by the units' widths too."""
    x, y, z = torch.randn(2, 10, 3, 3), torch.randn(2, 7, 3, 3), torch.randn(2, 6, 3, 3)
    units: Any = UnitPerWidth({7: ATAC(7), 10: ATAC(10)}, 1)
    narrow_unit(units.units['10'])
    assert [units(each).shape[1] for each in (z, y)] == [6, 7]
    with pytest.raises(ValueError, match=r'expected the channels of one unit .* The units have 7, 6 channels'):
        units(x)
    assert list(units.units) == ['7', '10']


@pytest.mark.slow
@pytest.mark.parametrize(
    'create',
    [
        pytest.param(partial(timm.create_model, 'atac_resnet18', num_classes=10), id='atac_resnet18'),
        pytest.param(partial(timm.create_model, 'resnet8_cifar', act_layer='atac'), id='act_layer'),
        pytest.param(partial(timm.create_model, 'atac_resnet8_cifar'), id='atac_resnet8_cifar'),
        pytest.param(lambda: replace_activations(timm.create_model('resnet18', num_classes=10)), id='replaced'),
        pytest.param(partial(timm.create_model, 'resnet8_cifar', act_layer='xunit'), id='xunit'),
        pytest.param(partial(timm.create_model, 'resnet8_cifar', attn_layer='local_se'), id='local_se'),
    ],
)
def test_torch_pruning(create) -> None:
    """A quarter of the channels goes. The smaller network trains a step, is fused, saved and loaded."""
    tp = pytest.importorskip('torch_pruning')
    torch.manual_seed(0)
    model: Any = create()
    x = torch.randn(2, 3, 64, 64)
    widths: dict[str, Any] = {name: m.channels for name, m in model.named_modules() if isinstance(m, (ATAC, XUnit))}
    before = sum(p.numel() for p in model.parameters())
    importance = tp.importance.MagnitudeImportance(p=2)
    head = model.get_classifier()
    tp.pruner.MagnitudePruner(model, x, importance=importance, pruning_ratio=0.25, ignored_layers=[head]).step()
    after = sum(p.numel() for p in model.parameters())
    assert after < 0.6 * before
    pruned: dict[str, Any] = {name: m.channels for name, m in model.named_modules() if isinstance(m, (ATAC, XUnit))}
    assert pruned == {name: width * 3 // 4 for name, width in widths.items()}
    print(f'{before:,} -> {after:,} parameters, {sorted({*widths.values()})} -> {sorted({*pruned.values()})} channels')

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(x).square().mean().backward()
    optimizer.step()
    expected = model.eval()(x).detach()
    torch.testing.assert_close(fuse(model, example_input=x)(x), expected, rtol=1e-4, atol=1e-4)

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), expected)
    for p in loaded.parameters():
        p.data.zero_()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    assert torch.equal(loaded(x), expected)

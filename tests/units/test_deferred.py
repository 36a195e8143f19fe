"""Units that get their width from the layers next to them."""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.res2net import Bottle2neck
from torch.nn.modules.module import register_module_module_registration_hook

from timm_atac import ATAC, ATACMe, LocalSE, NiN, SEActivation, XUnit, fuse
from timm_atac.units import deferred
from timm_atac.units.atac import init_weight_
from timm_atac.units.host_norm import HostNorm


@pytest.fixture(autouse=True)
def _no_search_for_norms(monkeypatch) -> None:
    """The search for the norm around a unit keeps the hook for longer. tests/units/test_names.py tests it."""
    host_norm = HostNorm()
    monkeypatch.setattr(host_norm, '_has_warned', True)
    monkeypatch.setattr(deferred, 'host_norm', host_norm)


def hooks() -> int:
    handle = register_module_module_registration_hook(lambda *_: None)
    handle.remove()
    return len(handle.hooks_dict_ref() or {})


class _Gate(nn.Module):
    """As in ECA: a convolution along the channels, which has one channel itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)


@pytest.mark.parametrize(
    'layers, channels, input_fmt',
    [
        (lambda: [nn.Conv2d(3, 7, 1), ATAC()], 7, 'NCHW'),
        (lambda: [nn.Linear(3, 7), nn.Dropout(), ATAC(inplace=True)], 7, 'NLC'),
        (lambda: [nn.Conv1d(3, 7, 1), nn.BatchNorm1d(7), ATAC()], 7, 'NCL'),
        (lambda: [nn.Linear(3, 7), nn.BatchNorm1d(7), ATAC()], 7, 'NLC'),
        (lambda: [ATAC(True), nn.Conv2d(7, 3, 1)], 7, 'NCHW'),
        (lambda: [nn.Sequential(nn.Conv2d(3, 7, 1), nn.GroupNorm(7, 7)), nn.Identity(), ATAC()], 7, 'NCHW'),
        (lambda: [nn.Conv3d(3, 7, 1), nn.GroupNorm(7, 7), ATAC()], 7, 'NCL'),
        (lambda: [nn.Conv1d(3, 7, 1), nn.SyncBatchNorm(7), ATAC()], 7, 'NCL'),
        (lambda: [nn.GroupNorm(7, 7), ATAC()], 7, 'NCHW'),
        (lambda: [nn.Conv2d(3, 7, 1), nn.LayerNorm((7, 14, 14)), ATAC()], 7, 'NCHW'),
        (lambda: [nn.Conv2d(3, 7, 1), _Gate(), ATAC()], 7, 'NCHW'),
    ],
)
def test_width_and_layout(layers, channels, input_fmt) -> None:
    unit = next(m for m in nn.Sequential(*layers()) if isinstance(m, ATAC))
    assert (unit.channels, unit.input_fmt) == (channels, input_fmt)
    assert unit.conv1.weight.shape == (channels // 2, channels, 1, 1)
    assert hooks() == 0


def test_a_first_layer_without_a_shape() -> None:
    unit = ATAC(8)
    unit.conv1 = nn.LazyConv2d(4, 1)
    assert unit.channels == 0 and repr(unit)


def test_device_and_dtype_of_the_surroundings() -> None:
    model = nn.Sequential(nn.Conv2d(3, 7, 1, device='meta', dtype=torch.float16), partial(ATAC, rd_ratio=0.25)())
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.float16)}
    unit: Any = model[1]
    assert unit.conv1.out_channels == 1


def test_no_parameter_is_missed_silently() -> None:
    model = nn.Sequential(ATAC())
    for use in (
        lambda: torch.optim.SGD(model.parameters()),
        lambda: [p.numel() for p in model.parameters()],
        model.state_dict,
        model.half,
        lambda: model(torch.randn(2, 3, 5, 5)),
    ):
        with pytest.raises(ValueError, match='was created without `channels`'):
            use()


@pytest.mark.parametrize('unit', [ATAC, SEActivation, NiN])
@pytest.mark.parametrize('input_fmt, shape', [('NHWC', (3, 5, 7, 14)), ('NLC', (3, 5, 14)), ('NLC', (3, 14))])
def test_layouts_are_views_of_one_unit(unit, input_fmt, shape) -> None:
    torch.manual_seed(0)
    first = unit(14).eval()
    last = unit(14, input_fmt=input_fmt).eval()
    last.load_state_dict(first.state_dict())
    x = torch.randn(shape)
    nchw = x.reshape(3, 1, -1, 14).permute(0, 3, 1, 2)
    torch.testing.assert_close(last(x).reshape(3, 1, -1, 14).permute(0, 3, 1, 2), first(nchw))


def _shuffled() -> Any:
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), ATAC())


WRONG: list[tuple[Callable[[], nn.Module], tuple[int, ...], str]] = [
    (
        _shuffled,
        (2, 3, 4, 4),
        r"ATAC at '2' of .*Sequential inferred 16 from '0', got 4: give channels=4\. .*\(2, 4, 8,",
    ),
    (
        lambda: fuse(_shuffled()[2:], example_input=torch.randn(2, 16, 3, 3)),
        (2, 4, 3, 3),
        r"inferred 16 from '0', got 4",
    ),
    (lambda: ATACMe(16), (2, 4, 8, 8), r'ATACMe is for 16 channels in NCHW .*\(2, 4, 8, 8\): give channels=4\. '),
    (lambda: SEActivation(16), (2, 8, 7, 16), r"is for 16 channels in NCHW .* give input_fmt='NHWC'\."),
    (lambda: NiN(16, input_fmt='NLC'), (2, 16, 7), r"is for 16 channels in NLC .* give input_fmt='NCL'\."),
    (lambda: ATAC(16, input_fmt='NHWC'), (2, 16, 7, 5), r"is for 16 channels in NHWC .* give input_fmt='NCHW'\."),
    (lambda: ATAC(16), (2, 7, 16), r"is for 16 channels in NCHW .* give input_fmt='NLC'\."),
    (lambda: ATAC(16), (2, 7, 8), r'is for 16 channels in NCHW .* give `channels`, and input_fmt='),
    (lambda: ATAC(16), (16,), r'is for 16 channels in NCHW and got an input of shape \(16,\)'),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(), ATAC()),
        (2, 3, 2, 3),
        r"inferred 16 from '0', got \(2, 96\): give `channels`, and input_fmt='NCL' for \(B, C, ...\)",
    ),
]


@pytest.mark.parametrize('create, shape, message', WRONG)
def test_message_for_a_wrong_input(create, shape, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        create()(torch.randn(shape))
    assert 'timm_atac.replace_activations(model)' in str(error.value)


@pytest.mark.parametrize('name, widths', [('res2net50_26w_4s', (104, 26, 256)), ('res2next50', (128, 32, 256))])
@pytest.mark.parametrize('act_layer, unit', [('atac', 'ATACMe'), (partial(XUnit, kernel_size=5), 'XUnit')])
def test_activation_of_several_widths(name, widths, act_layer, unit) -> None:
    """In Res2Net, layers of several widths share one activation. The model is not built."""
    first, inner, last = widths
    message = (
        f"{unit} at 'relu' of timm.models.res2net.Bottle2neck would get {first} from 'bn1', {inner} from 'bns', {last}"
    )
    with pytest.raises(ValueError, match=message) as error:
        timm.create_model(name, act_layer=act_layer, device='meta')
    assert 'timm_atac.replace_activations(model)' in str(error.value)
    nn.Sequential(nn.Identity())
    assert hooks() == 0


def test_activation_of_one_width_at_several_places() -> None:
    block = Bottle2neck(8, 16, base_width=256, scale=1, act_layer=ATAC, norm_layer=nn.BatchNorm2d)
    assert block.relu.channels == 64


def both_ways(unit: Any, options: dict[str, Any], **dd: Any) -> tuple[Any, Any]:
    """The same unit created with its width, and created without it and then put behind a convolution."""
    return unit(7, **options, **dd), nn.Sequential(nn.Conv2d(3, 7, 1, **dd), unit(**options))[1]


PARTS = ['relu', 'prelu', None]


@pytest.mark.parametrize('unit', [ATAC, ATACMe, SEActivation, LocalSE, NiN, XUnit])
@pytest.mark.parametrize('act_layer', PARTS)
@pytest.mark.parametrize('gate_layer', ['sigmoid', *PARTS])
def test_order_of_parameters_is_that_of_a_unit_created_with_its_width(unit, act_layer, gate_layer) -> None:
    """An optimizer's state is matched to parameters by position."""
    options = {'act_layer': act_layer} | ({} if unit is NiN else {'gate_layer': gate_layer})
    created, deferred = both_ways(unit, options, device='meta', dtype=torch.float16)
    assert [name for name, _ in deferred.named_parameters()] == [name for name, _ in created.named_parameters()]
    assert list(deferred.state_dict()) == list(created.state_dict())
    assert [name for name, _ in deferred.named_modules()] == [name for name, _ in created.named_modules()]
    parameters = list(deferred.parameters())
    assert [p.shape for p in parameters] == [p.shape for p in created.parameters()]
    assert {(p.device.type, p.dtype) for p in parameters} == {('meta', torch.float16)}


@pytest.mark.parametrize('unit', [ATAC, XUnit])
def test_optimizer_state_of_a_unit_with_a_parameter_in_its_gate(unit) -> None:
    created, deferred = both_ways(unit, {'gate_layer': 'prelu'})
    states: list[dict[str, Any]] = []
    for each in (created, deferred):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        if states:
            optimizer.load_state_dict(states[0])
        each(torch.randn(2, 7, 3, 3)).sum().backward()
        optimizer.step()
        assert all(optimizer.state[p]['momentum_buffer'].shape == p.shape for p in each.parameters())
        states.append(optimizer.state_dict())


@pytest.mark.parametrize('unit', [ATAC, XUnit])
def test_pickle_of_a_unit_created_from_lambdas(unit) -> None:
    layers = {'act_layer': lambda: nn.ReLU(), 'norm_layer': lambda channels, **dd: nn.BatchNorm2d(channels, **dd)}
    for each in both_ways(unit, {**layers, 'gate_layer': lambda: nn.Sigmoid()}):
        x = torch.randn(2, 7, 3, 3)
        assert torch.equal(pickle.loads(pickle.dumps(each.eval()))(x), each(x))


@pytest.mark.parametrize('unit', [ATAC, ATACMe, SEActivation, NiN])
def test_weights_in_a_model_are_initialised_once(unit, monkeypatch) -> None:
    """PyTorch's own initialisation of a unit's convolutions is half of the time to build the unit."""
    torch.manual_seed(0)
    initialised: list[nn.Module] = []
    monkeypatch.setattr(nn.Conv2d, 'reset_parameters', lambda conv: initialised.append(conv))
    first = nn.Conv2d(3, 512, 1)
    initialised.clear()
    built: Any = nn.Sequential(first, unit())[1]
    assert not initialised
    for conv in (built.conv1, built.conv2):  # xavier_normal_ for PReLU of slope 0.25
        assert type(conv) is nn.Conv2d
        assert conv.weight.std().item() == pytest.approx((2 / (1 + 0.25**2) * 2 / (512 + 256)) ** 0.5, rel=0.01)
        assert abs(conv.weight.mean().item()) < 1e-3


def test_a_seed_gives_the_weights_of_former_versions() -> None:
    """Units with their width, as in the networks of this package, draw the same numbers as ever."""
    torch.manual_seed(0)
    unit = ATAC(14)
    following = torch.randn(3)
    torch.manual_seed(0)
    convs = nn.Conv2d(14, 7, 1, bias=False), nn.Conv2d(7, 14, 1, bias=False)
    for conv, created in zip(convs, (unit.conv1, unit.conv2), strict=True):
        init_weight_(conv.weight)
        assert torch.equal(conv.weight, created.weight)
    assert torch.equal(torch.randn(3), following)

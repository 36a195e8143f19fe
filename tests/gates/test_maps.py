"""timm_atac/gates/maps.py."""

from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn as nn
from networks import wild_units
from timm.layers import SEModule
from timm.layers.activations import GELUTanh

from timm_atac import ATAC, LocalSE, NiN, SEActivation, gate, replace_activations
from timm_atac.gates.pictures import gate_maps


class Case(NamedTuple):
    model: str
    kwargs: dict[str, Any]
    image: tuple[int, ...]
    units: int
    shapes: dict[str, tuple[int, ...]]  # of the first, the last and special modules


B = 2
CASES = [
    Case(
        'resnet18',
        {'act_layer': 'atac'},
        (3, 64, 96),
        17,
        {'act1': (64, 32, 48), 'layer1.0.act1': (64, 16, 24), 'layer4.1.act2': (512, 2, 3)},
    ),
    Case('atac_resnet18', {}, (3, 64, 64), 4, {'layer3.0.act1': (256, 4, 4), 'layer4.1.act1': (512, 2, 2)}),
    Case(
        'resnet8_cifar',
        {'act_layer': 'se_act'},
        (3, 32, 32),
        7,
        {'stages.0.0.act1': (16, 1, 1), 'act': (64, 1, 1)},
    ),
    Case(
        'resnet8_cifar',
        {'attn_layer': 'local_se', 'in_chans': 1},
        (1, 8, 8),
        3,
        {'stages.0.0.attn': (16, 8, 8), 'stages.2.0.attn': (64, 2, 2)},
    ),
    # maps (B, H, W, C): the unit has the layout NLC, because of the Linear layers next to it
    Case(
        'test_convnext',
        {'act_layer': 'atac'},
        (3, 64, 96),
        9,
        {'stages.0.blocks.0.mlp.act': (96, 16, 24), 'stages.3.blocks.1.mlp.act': (256, 2, 3)},
    ),
    Case(
        'test_vit',
        {'act_layer': 'atac', 'img_size': 64},
        (3, 64, 64),
        6,
        {'blocks.0.mlp.act': (192, 17), 'blocks.5.mlp.act': (192, 17)},
    ),
    Case(
        'test_vit',
        {'act_layer': 'se_act', 'img_size': 64},
        (3, 64, 64),
        6,
        {'blocks.0.mlp.act': (192, 1, 1), 'blocks.5.mlp.act': (192, 1, 1)},
    ),
    Case(
        'atac_resnet18',
        {'features_only': True},
        (3, 64, 64),
        4,
        {'layer3.0.act1': (256, 4, 4), 'layer4.1.act1': (512, 2, 2)},
    ),
    Case(
        'atac_host',
        {'host': 'test_resnet'},
        (3, 64, 64),
        12,
        {'conv1.2': (16, 32, 32), 'layer4.0.act2': (96, 2, 2)},
    ),
]


@pytest.fixture(scope='module')
def small() -> Any:
    return wild_units(timm.create_model('atac_resnet8_cifar', in_chans=1)).eval()


@pytest.mark.parametrize('case', CASES, ids=lambda case: f'{case.model}-{"-".join(map(str, case.kwargs.values()))}')
def test_shapes_and_values(case) -> None:
    model = wild_units(timm.create_model(case.model, **case.kwargs)).eval()
    inputs: dict[str, torch.Tensor] = {}  # in the order of the forward pass
    for name, unit in model.named_modules():
        if isinstance(unit, ATAC):
            unit.register_forward_pre_hook(lambda unit, args, name=name: inputs.update({name: args[0].clone()}))
    gates = gate_maps(model, torch.randn(B, *case.image))

    names = list(gates)
    assert names == list(inputs) and len(names) == case.units
    assert (names[0], names[-1]) == (next(iter(case.shapes)), next(reversed(case.shapes)))
    assert {name: tuple(gates[name].shape) for name in case.shapes} == {k: (B, *s) for k, s in case.shapes.items()}
    for name, x in inputs.items():
        torch.testing.assert_close(gates[name], expected(model.get_submodule(name), x), rtol=1e-5, atol=1e-6)
        assert gates[name].std() > 0.05


@torch.no_grad()
def expected(unit: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute the gates of each position separately, as an image of one pixel."""
    x = x if unit.input_fmt in ('NHWC', 'NLC') else x.movedim(1, -1)
    if isinstance(unit, SEActivation):
        x = x.flatten(1, -2).mean(1)[:, None, None]
    pixels = x.reshape(-1, x.shape[-1])[..., None, None]
    return torch.sigmoid(unit.bottleneck(pixels)).reshape(x.shape).movedim(-1, 1)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_any_dtype(dtype) -> None:
    model = replace_activations(timm.create_model('test_resnet', dtype=dtype))
    gates = gate_maps(model, torch.randn(1, 3, 32, 32))
    assert len(gates) == 12 and all(g.dtype == torch.float32 for g in gates.values())
    assert all(not g.is_inference() and not g.requires_grad for g in gates.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_any_device() -> None:
    gates = gate_maps(timm.create_model('atac_resnet8_cifar').cuda(), torch.randn(1, 3, 32, 32))
    assert {g.device.type for g in gates.values()} == {'cpu'}


class Twice(nn.Module):
    """Calls one unit twice, on different shapes, and another one never. It raises an error if `fails`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.unused = nn.Conv2d(3, 8, 1), ATAC(8), ATAC(8)
        self.calls: torch.Tensor
        self.register_buffer('calls', torch.zeros(()))
        self.fails = False

    def forward(self, x):
        self.calls += 1
        x = self.act(self.conv(x))
        if self.fails:
            raise RuntimeError('as it should')
        return self.act(x[..., ::2])


def test_a_unit_that_is_called_twice_and_one_that_is_not() -> None:
    gates = gate_maps(Twice(), torch.randn(1, 3, 4, 6))
    assert {name: tuple(g.shape) for name, g in gates.items()} == {'act': (1, 8, 4, 6), 'act#2': (1, 8, 4, 3)}


def test_hooks_of_others_may_change_the_output() -> None:
    model = nn.Sequential(ATAC(3))
    model[0].register_forward_hook(lambda module, args, output: output.flatten(2))
    assert gate_maps(model, torch.randn(1, 3, 4, 6))['0'].shape == (1, 3, 4, 6)


@pytest.mark.parametrize('types', [SEModule, nn.ReLU])
def test_hooks_may_change_the_input(types) -> None:
    """The gates are those of the input that the module gets, also if a hook of the user changes it."""
    model = timm.create_model('resnet8_cifar', attn_layer='se').eval()
    name, module = next((name, m) for name, m in model.named_modules() if isinstance(m, types))
    module.register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    inputs: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    gates = gate_maps(model, torch.randn(B, 3, 32, 32), types)
    assert len(inputs) == 1
    module._forward_pre_hooks.clear()
    with torch.no_grad():
        torch.testing.assert_close(gates[name], gate(module, inputs[0]))


@pytest.mark.parametrize('fails', [False, True])
def test_the_model_is_as_before(fails) -> None:
    model = Twice()
    model.fails = fails
    model.act.bn1.eval()  # each module has a mode of its own
    calls: list[int] = []
    model.act.register_forward_hook(lambda *_: calls.append(1))
    before = [(dict(m._forward_hooks), m.training) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grad = torch.is_grad_enabled()
    if fails:
        with pytest.raises(RuntimeError, match='as it should'):
            gate_maps(model, torch.randn(1, 3, 4, 6))
    else:
        gate_maps(model, torch.randn(1, 3, 4, 6))
    assert calls == [1] * (1 if fails else 2)
    assert [(dict(m._forward_hooks), m.training) for m in model.modules()] == before
    assert model.state_dict().keys() == state.keys() and model.training and torch.is_grad_enabled() == grad
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_output_is_as_before_and_it_trains(small) -> None:
    x = torch.randn(2, 1, 8, 8)
    y = small(x)
    loss = y.sum()
    gate_maps(small, x)
    loss.backward()  # through what was computed before
    assert torch.equal(small(x), y)


def test_a_cache_of_the_host_is_not_left_behind() -> None:
    model = timm.create_model('levit_128s', act_layer='atac', num_classes=0)
    gate_maps(model, torch.randn(1, 3, 224, 224))
    assert not any(m.attention_bias_cache for m in model.modules() if hasattr(m, 'attention_bias_cache'))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.compiler, 'set_stance'), reason='PyTorch before 2.6')
def test_a_compiled_model(small) -> None:
    x = torch.randn(1, 1, 8, 8)
    model: Any = torch.compile(small, backend='eager')
    with torch.no_grad():
        y = model(x)
    assert [name.removeprefix('_orig_mod.') for name in gate_maps(model, x)] == list(gate_maps(small, x))
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    'model, shape, message',
    [
        (lambda: nn.Conv2d(3, 3, 1), (1, 3, 8, 8), 'Conv2d has no unit with a gate .* timm_atac.replace_activations'),
        (lambda: NiN(3), (1, 3, 8, 8), 'NiN has no unit with a gate'),
        (lambda: ATAC(3, gate_layer=None), (1, 3, 8, 8), 'ATAC has no unit with a gate'),
        (lambda: LocalSE(3), (3, 8, 8), r'x of shape \(3, 8, 8\): expected images \(B, C, H, W\)'),
        (lambda: LocalSE(3), (0, 3, 8, 8), r'x of shape \(0, 3, 8, 8\): expected .* at least one'),
        (ATAC, (1, 3, 8, 8), 'created without `channels`'),
    ],
)
def test_errors(model, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        gate_maps(model(), torch.zeros(shape))


def test_error_if_none_is_called() -> None:
    model = nn.Conv2d(3, 3, 1)
    model.unit = ATAC(3)  # type: ignore[assignment]
    with pytest.raises(ValueError, match='has 1 module with a gate, and its forward pass calls none'):
        gate_maps(model, torch.zeros(1, 3, 8, 8))


def test_gates_of_activations_that_write_over_their_input() -> None:
    model = timm.create_model('resnet8_cifar').eval()
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
            module.register_forward_pre_hook(lambda act, args, name=name: inputs.update({name: args[0].clone()}))
    gates = gate_maps(model, torch.randn(B, 3, 32, 32), nn.ReLU)
    assert list(gates) == list(inputs) and len(gates) == 7
    assert all(torch.equal(gates[name], (inputs[name] > 0).float()) for name in gates)


def test_a_gate_that_is_the_input_of_a_module_that_writes_over_it() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(x)

    gate.register(Square, lambda module, x: x)
    x = torch.full((1, 3, 2, 2), 3.0)
    assert torch.equal(gate_maps(nn.Sequential(nn.Identity(), Square()), x.clone(), Square)['1'], x)


def test_gates_of_several_types(small) -> None:
    """Given types that contain units, their gates are those of `gate_maps(model, x)`, one for each call."""
    x = torch.randn(1, 1, 8, 8)
    model = wild_units(timm.create_model('resnet8_cifar', in_chans=1, act_layer='atac', attn_layer='se'))
    gates = gate_maps(model, x, (ATAC, SEModule, nn.ReLU))
    units = gate_maps(model, x)
    assert [name for name in gates if name in units] == list(units)
    assert all(torch.equal(gates[name], units[name]) for name in units)
    kinds = [type(model.get_submodule(name)) for name in gates]
    assert [kinds.count(cls) for cls in (type(model.act), SEModule, nn.ReLU)] == [7, 3, 10]
    assert gates['stages.1.0.attn'].shape == (1, 32, 1, 1) and gates['act.act'].shape == (1, 32, 2, 2)


@pytest.mark.parametrize(
    'model, kwargs, name, shape',
    [
        ('test_convnext', {}, 'stages.0.blocks.0.mlp.act', (96, 16, 16)),
        ('test_vit', {'img_size': 64}, 'blocks.0.mlp.act', (192, 17)),
    ],
)
def test_the_layout_of_activations(model, kwargs, name, shape) -> None:
    gates = gate_maps(timm.create_model(model, **kwargs), torch.randn(1, 3, 64, 64), (nn.GELU, GELUTanh))
    assert gates[name].shape == (1, *shape)


@pytest.mark.parametrize('fails', [False, True])
def test_the_model_is_as_before_the_gates_of_types(fails) -> None:
    model = Twice()
    model.fails = fails
    before = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError, match='as it should'):
            gate_maps(model, torch.randn(1, 3, 4, 6), ATAC)
    else:
        assert list(gate_maps(model, torch.randn(1, 3, 4, 6), ATAC)) == ['act', 'act#2']
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training) for m in model.modules()] == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_errors_of_types(small) -> None:
    x = torch.zeros(1, 1, 8, 8)
    for types in ([nn.ReLU], 'relu', (nn.ReLU, 'relu')):
        with pytest.raises(TypeError, match=r'^types=.*: expected a type or a tuple of types'):
            gate_maps(small, x, types)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match='Conv2d: its gate is not known'):
        gate_maps(small, x, nn.Conv2d)
    with pytest.raises(TypeError, match='NiN has no gate'):
        gate_maps(small, x, (nn.ReLU, NiN))
    with pytest.raises(ValueError, match=r'CifarResNet has no module of types=\(GELU, SEModule\)'):
        gate_maps(small, x, (nn.GELU, SEModule))
    with pytest.raises(ValueError, match='has 1 module of these types, and its forward pass calls none'):
        model = nn.Conv2d(1, 1, 1)
        model.unused = nn.ReLU()  # type: ignore[assignment]
        gate_maps(model, x, nn.ReLU)

"""timm_atac/gates/gate.py, against the definition of a gate: module(x) == G * x."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from timm.layers import (
    ConvMlp,
    EffectiveSEModule,
    SEModule,
    activations,
    activations_me,
    get_act_layer,
    set_exportable,
    set_scriptable,
)
from timm.layers import GatherExcite as TimmGatherExcite

import timm_atac
from timm_atac import ATAC, LocalSE, NiN, SEActivation, Sine, gate, replace_activations
from timm_atac._timm import SqueezeExcite
from timm_atac.inference.fuse import FusedATAC
from timm_atac.models.ge_resnet import GatherExcite
from timm_atac.units.memory_efficient import ATACMe

B, C = 2, 8
SCALE = 1.0507009873554805  # of SELU

# name: module, its gate at 0, at -inf and at inf; None where the module itself has no finite limit there
ELEMENTWISE: dict[str, tuple[Callable[[], nn.Module], float, float | None, float | None]] = {
    'identity': (nn.Identity, 1, 1, 1),
    'relu': (nn.ReLU, 1, 0, 1),
    'relu, inplace': (lambda: nn.ReLU(inplace=True), 1, 0, 1),
    'relu6': (nn.ReLU6, 1, 0, 0),
    'leaky_relu': (lambda: nn.LeakyReLU(0.1), 1, 0.1, 1),
    'prelu': (nn.PReLU, 1, 0.25, 1),
    'prelu of timm': (lambda: activations.PReLU(init=0.5), 1, 0.5, 1),
    'elu': (nn.ELU, 1, 0, 1),
    'elu, 0.5': (lambda: nn.ELU(0.5), 1, 0, 1),
    'celu': (lambda: nn.CELU(2.0), 1, 0, 1),
    'selu': (lambda: nn.SELU(inplace=True), SCALE, 0, SCALE),
    'gelu': (nn.GELU, 0.5, 0, 1),
    'gelu_tanh': (lambda: nn.GELU('tanh'), 0.5, 0, 1),
    'gelu of timm': (activations.GELU, 0.5, 0, 1),
    'gelu_tanh of timm': (activations.GELUTanh, 0.5, 0, 1),
    'quick_gelu': (activations.QuickGELU, 0.5, 0, 1),
    'silu': (lambda: nn.SiLU(inplace=True), 0.5, 0, 1),
    'swish': (lambda: activations.Swish(inplace=True), 0.5, 0, 1),
    'swish_me': (activations_me.SwishMe, 0.5, 0, 1),
    'mish': (nn.Mish, 0.6, 0, 1),
    'mish of timm': (activations.Mish, 0.6, 0, 1),
    'mish_me': (activations_me.MishMe, 0.6, 0, 1),
    'hardswish': (nn.Hardswish, 0.5, 0, 1),
    'hardswish of timm': (lambda: activations.HardSwish(inplace=True), 0.5, 0, 1),
    'hardswish_me': (activations_me.HardSwishMe, 0.5, 0, 1),
    'sine': (Sine, 1, None, None),
    'siren': (lambda: Sine(30.0), 30, None, None),
}
elementwise = pytest.mark.parametrize('name', ELEMENTWISE)


def unit(cls: Any, **kwargs: Any) -> Any:
    """Return a unit whose gates spread from 0 to 1."""
    unit = cls(C, **kwargs).double()
    nn.init.normal_(unit.bn2.weight, 2, 1)
    nn.init.normal_(unit.bn1.running_mean)
    return unit


def gather_excite_of_timm(**kwargs: Any) -> Any:
    """Return timm's Gather-Excite with an MLP, which timm 1.0.31 fails to create."""
    module = TimmGatherExcite(C, use_mlp=False, **kwargs)
    module.mlp = ConvMlp(C, 2 * C, norm_layer=nn.BatchNorm2d)
    return module


# name: module, and the shape of its gate for an input (B, C, 4, 6)
LAYERED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'se': (lambda: SEModule(C, rd_ratio=0.5, norm_layer=nn.BatchNorm2d), (B, C, 1, 1)),
    'se, max': (lambda: SEModule(C, add_maxpool=True), (B, C, 1, 1)),
    'ese': (lambda: EffectiveSEModule(C), (B, C, 1, 1)),
    'se of efficientnet': (lambda: SqueezeExcite(C), (B, C, 1, 1)),
    'ge': (lambda: GatherExcite(C, (4, 6), rd_ratio=0.5), (B, C, 1, 1)),
    'ge of timm': (lambda: gather_excite_of_timm(), (B, C, 1, 1)),
    'ge of timm, extent': (lambda: gather_excite_of_timm(extent=2), (B, C, 4, 6)),
    'atac': (lambda: unit(ATAC), (B, C, 4, 6)),
    'atac_me': (lambda: unit(ATACMe), (B, C, 4, 6)),
    'local_se': (lambda: unit(LocalSE), (B, C, 4, 6)),
    'numbers': (lambda: unit(ATAC, gate_layer=None), (B, C, 4, 6)),
    'fused': (lambda: FusedATAC(unit(ATAC).eval()), (B, C, 4, 6)),
    'se_act': (lambda: unit(SEActivation), (B, C, 1, 1)),
}
layered = pytest.mark.parametrize('name', LAYERED)


def values(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return large and small values of both signs, (2, 4, 5, 5), without 0."""
    size = torch.logspace(-6, 1.2, 100, dtype=torch.float64)
    return torch.cat([size, -size]).reshape(2, 4, 5, 5).to(dtype)


def check(module: nn.Module, x: torch.Tensor, g: torch.Tensor | None = None) -> torch.Tensor:
    """Check the definition of a gate on x without zeros, and return the gate."""
    g = gate(module, x) if g is None else g
    torch.testing.assert_close(g.expand_as(x), module(x.clone()) / x, rtol=1e-9, atol=1e-12)
    return g


@elementwise
def test_elementwise(name) -> None:
    make, at_zero, _, _ = ELEMENTWISE[name]
    module, x = make().double(), values()
    before = x.clone()
    assert check(module, x).shape == x.shape
    assert torch.equal(x, before)
    for zero in (0.0, -0.0):
        found = gate(module, torch.tensor([zero, 1.0], dtype=torch.float64))[0]
        near = torch.full((1,), 1e-8, dtype=torch.float64)
        torch.testing.assert_close(found, (module(near.clone()) / near)[0], rtol=1e-6, atol=0)  # from the right
        assert abs(found - at_zero) < 1e-7
    assert gate(module, torch.empty(0, 4, 3, 3)).shape == (0, 4, 3, 3)


@elementwise
def test_it_is_known_if_a_gate_is_wrong(name) -> None:
    module, x = ELEMENTWISE[name][0]().double(), values()
    g = gate(module, x)
    for wrong in (gate(module, -x), g.flip(0), g + 1e-6, g * (1 + 1e-6)):
        if not torch.equal(wrong, g):  # the gate of the identity is 1 everywhere, and the gate of a sine is even
            with pytest.raises(AssertionError):
                check(module, x, wrong)


@elementwise
def test_elementwise_at_infinity(name) -> None:
    make, _, low, high = ELEMENTWISE[name]
    if low is None:
        return
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        module, largest = make().to(dtype), torch.finfo(dtype).max
        ends = torch.tensor([-torch.inf, torch.inf], dtype=dtype, requires_grad=True)
        found = gate(module, ends)
        torch.testing.assert_close(found, torch.tensor([low, high], dtype=dtype))
        (gradient,) = torch.autograd.grad(found.sum(), ends)
        assert torch.equal(gradient, torch.zeros_like(ends))
        ends = torch.tensor([-largest, largest], dtype=dtype, requires_grad=True)
        found = gate(module, ends)
        torch.testing.assert_close(found, torch.tensor([low, high], dtype=dtype), rtol=0.005, atol=1e-4)
        (gradient,) = torch.autograd.grad(found.sum(), ends)
        assert gradient.abs().max() < 1e-6


@elementwise
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_elementwise_precision(name, dtype) -> None:
    module, x = ELEMENTWISE[name][0](), values(dtype)
    expected = gate(copy.deepcopy(module).double(), x.double())
    found = gate(module.to(dtype), x)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    # the argument of a sine is rounded
    torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=(300 if name == 'siren' else 4) * eps)


@elementwise
def test_elementwise_gradients(name) -> None:
    """The gradients of G * x are those of the module. The gradient of G at 0 is finite."""
    module = ELEMENTWISE[name][0]().double()
    x = values().requires_grad_()
    inputs = [x, *module.parameters()]
    found = torch.autograd.grad((gate(module, x) * x).sum(), inputs)
    expected = torch.autograd.grad(module(x.clone()).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=3e-8)  # PyTorch's hardswish rounds 1 / 6 to float32
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gate(module, zero).sum(), zero)
    assert gradient.isfinite().all()


SMOOTH: list[Callable[[], nn.Module]] = [nn.SiLU, nn.GELU, lambda: nn.GELU('tanh'), nn.Mish, lambda: Sine(3.0)]


@pytest.mark.parametrize('make', SMOOTH)
def test_gradients_of_smooth_gates(make) -> None:
    x = torch.tensor([-3.0, -0.4, 0, 0.7, 5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gate(make(), x), x)


def test_prelu_with_a_slope_for_each_channel() -> None:
    module = nn.PReLU(4).double()
    nn.init.normal_(module.weight)
    for x in (values(), values()[..., 0, 0], values().flatten(2)):
        check(module, x)
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(_Of(module), {'module.weight': weight}, (values()[..., 0, 0],)),
        module.weight,
    )


class _Of(nn.Module):
    """A module that returns the gate of another module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gate(self.module, x)


NAMES = ('relu', 'silu', 'swish', 'selu', 'gelu', 'gelu_tanh', 'prelu', 'leaky_relu', 'mish', 'hard_swish', 'elu')


@pytest.mark.parametrize('context', [lambda: set_exportable(False), lambda: set_exportable(True), None])
def test_names_of_timm(context) -> None:
    with context() if context is not None else set_scriptable(True):
        for name in NAMES:
            check(get_act_layer(name)().double(), values())


@layered
@pytest.mark.parametrize('training', [False, True])
def test_layered(name, training) -> None:
    """The gate is right in both modes, and the module is unchanged."""
    make, shape = LAYERED[name]
    module = make().double().train(training)
    x = torch.randn(B, C, 4, 6, dtype=torch.float64)
    before = x.clone()
    state = {key: value.clone() for key, value in module.state_dict(keep_vars=True).items()}
    buffers = {key: id(value) for key, value in module.named_buffers()}
    g = gate(module, x)
    assert g.shape == shape and torch.equal(x, before)
    assert {key: id(value) for key, value in module.named_buffers()} == buffers
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict(keep_vars=True).items())
    assert all(m.training == training for m in module.modules())
    assert not any(m._forward_hooks for m in module.modules())
    check(module, x, g)
    with pytest.raises(AssertionError):
        check(module, x, gate(module, x.flip(0)))
    with torch.no_grad():  # fused units and ATACMe compute it differently without gradients
        check(module, x)


@layered
def test_layered_gradients(name) -> None:
    module = LAYERED[name][0]().double().train()
    x = torch.randn(B, C, 4, 6, dtype=torch.float64)
    x[0, :, 0, 0] = 0
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    found = torch.autograd.grad((gate(module, x) * x).sin().sum(), inputs)
    expected = torch.autograd.grad(module(x).sin().sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_gradients_of_a_unit() -> None:
    module = ATAC(3, act_layer='silu').double().eval()  # a ReLU has a kink at 0
    x = torch.randn(2, 3, 2, 1, dtype=torch.float64)
    x[0] = 0
    assert torch.autograd.gradcheck(lambda x: gate(module, x), x.requires_grad_())


@pytest.mark.parametrize('cls', [ATAC, SEActivation, LocalSE])
@pytest.mark.parametrize(
    'input_fmt, shape, one',
    [
        ('NCHW', (B, C, 4, 6), (B, C, 1, 1)),
        ('NCL', (B, C, 5), (B, C, 1)),
        ('NCL', (B, C, 2, 3, 4), (B, C, 1, 1, 1)),
        ('NCL', (B, C), (B, C)),
        ('NHWC', (B, 4, 6, C), (B, 1, 1, C)),
        ('NLC', (B, 5, C), (B, 1, C)),
        ('NLC', (B, C), (B, C)),
    ],
)
def test_layouts(cls, input_fmt, shape, one) -> None:
    module, x = unit(cls, input_fmt=input_fmt), torch.randn(shape, dtype=torch.float64)
    g = gate(module.eval(), x)
    assert g.shape == (one if cls is SEActivation else shape)
    check(module, x, g)


def test_dtype_of_a_unit() -> None:
    module = ATAC(C, dtype=torch.bfloat16)
    assert gate(module, torch.randn(B, C, 4, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_in_a_model() -> None:
    """A unit that got its width from the layers around it."""
    model: Any = replace_activations(nn.Sequential(nn.Conv2d(3, C, 1), nn.ReLU()), 'atac')
    x = torch.randn(B, 3, 4, 4)
    torch.testing.assert_close(gate(model[1], model[0](x)) * model[0](x), model(x))


def test_register() -> None:
    class Cube(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x**3

    class Child(Cube):
        pass

    with pytest.raises(TypeError, match=r'^Cube: its gate is not known; expected one of ATAC, .*ReLU, .*gate.register'):
        gate(Cube(), values())
    gate.register(Cube, lambda module, x: x**2)
    check(Cube(), values())
    check(Child(), values())


def test_errors() -> None:
    x = torch.randn(B, C, 4, 6)
    others: list[nn.Module] = [nn.Conv2d(C, C, 1), nn.Sequential(nn.ReLU()), nn.Tanh(), nn.Sigmoid()]
    for module in others:
        with pytest.raises(TypeError, match=f'^{type(module).__name__}: its gate is not known'):
            gate(module, x)
    with pytest.raises(TypeError, match=r'^NiN has no gate: its output is not a product'):
        gate(NiN(C), x)

    class Without(ATAC):
        def activate(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(TypeError, match=r'^Without does not call its layer `gate`'):
        gate(Without(C), x)
    with pytest.raises(ValueError, match='is for 8 channels'):
        gate(ATAC(C), x[:, :3])
    with pytest.raises(ValueError, match='created without `channels`'):
        gate(ATAC(), x)


@pytest.mark.parametrize('module', [torch.relu, nn.ReLU, 'relu', None, torch.zeros(2)])
def test_what_is_no_module(module) -> None:
    with pytest.raises(TypeError, match=r'^module=.*: expected a module, such as nn.ReLU\(\)'):
        gate(module, torch.zeros(2))


@pytest.mark.parametrize('module', [nn.SiLU(), Sine(2.0), SEModule(C)])
@pytest.mark.parametrize(
    'x, given',
    [
        (torch.zeros(2, C, 1, 1, dtype=torch.int64), 'x of torch.int64'),
        (torch.zeros(2) > 0, 'x of torch.bool'),
        (1, 'x=1'),
    ],
)
def test_inputs_of_another_type(module, x, given) -> None:
    with pytest.raises(TypeError, match=f'^{given}: expected a tensor of a floating-point type'):
        gate(module, x)


def test_a_name_that_is_known_elsewhere() -> None:
    from timm.models.senet import SEModule as LegacySEModule

    with pytest.raises(TypeError, match=r'^timm.models.senet.SEModule: its gate is not known'):
        gate(LegacySEModule(C, 2), torch.zeros(1, C, 2, 2))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.compiler, 'set_stance'), reason='since PyTorch 2.6')
def test_a_compiled_module() -> None:
    module, x = unit(ATAC).eval(), torch.randn(B, C, 4, 6, dtype=torch.float64)
    expected = gate(module, x)
    module.compile(backend='eager')
    module(x)
    torch.testing.assert_close(gate(module, x), expected)


def test_the_module_is_as_before_an_error() -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError('as it should')

    unit: Any = ATAC(C)
    unit.bn2.register_forward_hook(fail)
    state = {key: value.clone() for key, value in unit.state_dict().items()}
    with pytest.raises(RuntimeError, match='as it should'):
        gate(unit, torch.randn(B, C, 4, 6))
    assert not unit.gate._forward_hooks and unit.training
    assert all(torch.equal(value, state[key]) for key, value in unit.state_dict().items())


def test_public_names() -> None:
    assert timm_atac.gate is gate and timm_atac.Sine is Sine
    assert {'Sine', 'gate'} <= {*timm_atac.__all__}
    assert repr(Sine(30.0)) == 'Sine(omega=30.0)'

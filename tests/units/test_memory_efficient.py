"""ATACMe against ATAC: the same numbers in all ways to train, and fewer bytes."""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from atac_me import SHAPE, assert_same, everything, is_recomputed, pair
from measuring.timing import bytes_kept
from timm.utils import freeze
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from timm_atac import ATAC, ATACMe
from timm_atac.units import batch_norm


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('input_fmt, shape', [('NCHW', SHAPE), ('NHWC', (3, 7, 5, 14)), ('NLC', (3, 11, 14))])
def test_same_numbers(training, input_fmt, shape) -> None:
    plain, me = pair(input_fmt=input_fmt)
    plain.double().train(training)
    me.double().train(training)
    for _ in range(2):  # the second time with other running statistics
        assert_same(plain, me, torch.randn(shape, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('training', [True, False])
def test_channels_last(training) -> None:
    plain, me = pair()
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    assert_same(plain.train(training), me.train(training), x, rtol=1e-5, atol=1e-5)
    assert me(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('wanted', [['x'], ['conv1.weight'], ['bn2.bias', 'conv2.weight'], ['x', 'bn1.weight']])
def test_some_gradients(wanted) -> None:
    plain, me = pair()
    x = torch.randn(SHAPE, requires_grad='x' in wanted)
    grads = []
    for unit in (plain, me):
        for name, p in unit.named_parameters():
            p.requires_grad_(name in wanted)
        inputs = [x if name == 'x' else unit.get_parameter(name) for name in wanted]
        y = unit(x)
        assert is_recomputed(y) == (unit is me)
        grads.append(torch.autograd.grad(y.square().sum(), inputs))
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_that_nobody_needs(monkeypatch) -> None:
    """On CUDA, PyTorch's backward pass of a norm returns them anyway. A norm without weights must not."""
    compute = torch.ops.aten.native_batch_norm_backward.default

    def all_gradients(*args: Any) -> Any:
        return compute(*args[:-1], [True, True, True])

    fake = SimpleNamespace(native_batch_norm_backward=SimpleNamespace(default=all_gradients))
    plain, me = pair(norm_layer=partial(nn.BatchNorm2d, affine=False))
    x = torch.randn(SHAPE)
    plain.train(), me.train()
    expected = everything(plain, x, torch.ones_like(x), recomputed=False)
    with monkeypatch.context() as context:
        context.setattr(batch_norm, '_aten', fake)
        found = everything(me, x, torch.ones_like(x), recomputed=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False])
def test_gradcheck(training) -> None:
    """First and second derivatives by all inputs, against finite differences."""
    _, unit = pair(6)
    unit.double().train(training)
    names = [name for name, _ in unit.named_parameters()]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        y = functional_call(unit, dict(zip(names, parameters, strict=True)), x)
        assert is_recomputed(y)
        return y

    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    args = (x, *(p.detach().requires_grad_() for p in unit.parameters()))
    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


def test_second_derivative_where_one_input_depends_on_another() -> None:
    plain, me = pair()
    found = []
    for unit in (plain.double(), me.double()):
        w = torch.full((14, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
        x = torch.ones(SHAPE, dtype=torch.float64).cumsum(0).cumsum(2).cumsum(3) * w
        y = functional_call(unit, {'conv1.weight': unit.conv1.weight * w.mean()}, x)
        (grad,) = torch.autograd.grad(y.sin().sum(), w, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), w)))
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('training', [True, False])
def test_bytes_kept(training) -> None:
    plain, me = pair()
    x = torch.randn(8, 14, 16, 16)
    whole = x.numel() * x.element_size()
    per_channel = 4 * 4 * 14  # mean and deviation of two norms at most
    assert 0 <= bytes_kept(partial(me.train(training), x), me) - 1.5 * whole <= per_channel
    assert (
        0 <= bytes_kept(lambda: plain(x), plain.train(training)) - 4 * whole <= per_channel
    )  # the next layer stores the output


@pytest.mark.slow
@pytest.mark.parametrize('model, most', [('atac_resnet50', 1.07), ('atac_resnet50_full', 1.23)])
def test_bytes_kept_of_networks(model, most) -> None:
    """The ratio to `resnet50`, in float32. It does not depend on the batch size."""
    x = torch.randn(2, 3, 64, 64)
    models = [timm.create_model(name) for name in (model, 'resnet50')]
    ours, theirs = (bytes_kept(partial(m, x), m) for m in models)
    ratio = ours / theirs
    assert round(ratio, 2) <= most


def test_autocast() -> None:
    """Errors against float64 are those of ATAC. Gradients have the dtype of the parameters."""
    plain, me = pair(channels=64)
    exact = copy.deepcopy(plain).double()
    x, grad = torch.randn(4, 64, 9, 9), torch.randn(4, 64, 9, 9)
    errors = []
    expected = everything(exact, x.double(), grad.double(), recomputed=False)
    for unit in (plain, me):
        with torch.autocast('cpu', torch.bfloat16):
            found = everything(unit, x, grad, recomputed=unit is me)
        assert all(value.dtype == torch.float32 for value in found.values() if value.is_floating_point())
        errors.append({name: (value.double() - expected[name]).abs().max().item() for name, value in found.items()})
    for name, error in errors[1].items():
        assert error <= 1.5 * errors[0][name] + 1e-6, name


def test_autocast_of_what_comes_in_bfloat16() -> None:
    plain, me = pair()
    x = torch.randn(SHAPE).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        assert_same(plain, me, x, rtol=0.02, atol=0.05)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointing_around_it(use_reentrant) -> None:
    plain, me = pair()
    grads = []
    for unit in (plain.double(), me.double()):
        x = torch.linspace(-1, 1, 14 * 8).view(2, 14, 2, 2).double().requires_grad_()
        checkpoint(unit, x, use_reentrant=use_reentrant).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in unit.parameters()), *unit.buffers()])
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_batched_gradients() -> None:
    """`is_grads_batched`, as a vectorized Jacobian uses it."""
    plain, me = pair()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(3, *SHAPE, dtype=torch.float64)
    grads = [torch.autograd.grad(u.double()(x), x, directions, is_grads_batched=True)[0] for u in (plain, me)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-11)


def test_changed_input_is_an_error() -> None:
    _, me = pair()
    x = torch.randn(SHAPE, requires_grad=True) * 1
    y = me(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


class _TimesOne(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1


def _hook(unit: Any) -> None:
    unit.gate.register_forward_hook(lambda module, args, y: y * 0.5)


def _backward_hook(unit: Any) -> None:
    unit.gate.register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,))


def _parametrization(unit: Any) -> None:
    parametrize.register_parametrization(unit.conv1, 'weight', _TimesOne())


def _pruning(unit: Any) -> None:
    prune.l1_unstructured(unit.conv2, 'weight', 0.5)


def _other_forward(unit: Any) -> None:
    unit.conv1.forward = unit.conv1.forward


def _part(name: str, part: Any) -> Any:
    return lambda unit: setattr(unit, name, part())


@pytest.mark.parametrize(
    'change',
    [
        _hook,
        _backward_hook,
        _parametrization,
        _pruning,
        _other_forward,
        _part('act', nn.GELU),
        _part('gate', nn.Hardsigmoid),
        _part('bn1', nn.Identity),
        _part('bn2', lambda: nn.GroupNorm(2, 14)),
        _part('conv2', lambda: nn.Conv2d(7, 14, 1)),
        _part('conv1', lambda: nn.Conv2d(14, 7, 3, padding=1, bias=False)),
    ],
)
def test_parts_are_run_one_by_one(change) -> None:
    """If hooks, parametrizations or other layers need the values in between."""
    torch.manual_seed(1)
    plain, me = pair()
    for unit in (plain, me):
        torch.manual_seed(2)
        change(unit)
    x = torch.randn(SHAPE)
    for expected, found in zip(*(everything(u, x, x, recomputed=False).values() for u in (plain, me)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_other_formula_of_a_subclass() -> None:
    class Doubled(ATACMe):
        def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
            return super().bottleneck(x) * 2

    assert not is_recomputed(Doubled(14)(torch.randn(SHAPE)))


def test_global_hooks_run_for_the_parts() -> None:
    _, me = pair()
    types = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: types.append(type(module)))
    try:
        me(torch.randn(SHAPE))
    finally:
        handle.remove()
    assert types.count(nn.BatchNorm2d) == 2
    assert is_recomputed(me(torch.randn(SHAPE)))


def test_function_transforms() -> None:
    """torch.func and forward mode, which the custom backward pass does not support."""
    plain, me = pair()
    plain.double().eval()
    me.double().eval()
    x, direction = torch.randn(2, *SHAPE, dtype=torch.float64)
    transforms: tuple[Any, ...] = (
        lambda unit: torch.func.grad(lambda v: unit(v).square().sum())(x),
        lambda unit: torch.func.jvp(unit, (x,), (direction,))[1],
        lambda unit: torch.autograd.functional.jvp(unit, x, direction)[1],
        lambda unit: torch.vmap(torch.func.grad(lambda v: unit(v[None]).sum()))(x),
    )
    for transform in transforms:
        torch.testing.assert_close(transform(me), transform(plain), rtol=1e-9, atol=1e-9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangents = [torch.autograd.forward_ad.unpack_dual(unit(dual)).tangent for unit in (plain, me)]
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-9, atol=1e-9)


def test_tracing_records_the_parts() -> None:
    _, me = pair()
    me.eval()
    x = torch.randn(SHAPE, requires_grad=True)
    expected = me(x)
    assert is_recomputed(expected)
    graphs = [
        torch.fx.symbolic_trace(me),
        torch.jit.script(me),
        torch.jit.trace(me, x),
        torch.export.export(me, (x.detach(),)).module(),
    ]
    for graph in graphs:
        torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-5)
        assert not is_recomputed(graph(x))


def test_without_gradients() -> None:
    plain, me = pair()
    x = torch.randn(SHAPE)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(me.eval()(x), plain.eval()(x))


@pytest.mark.parametrize('name', ['atac_resnet18', 'atac_resnet8_cifar', 'resnet18'])
def test_timm_prefers_it(name) -> None:
    options: dict[str, Any] = {'device': 'meta'} | ({'act_layer': 'atac'} if name == 'resnet18' else {})
    types = {type(m) for m in timm.create_model(name, **options).modules()}
    assert ATACMe in types and ATAC not in types
    for config in ('scriptable', 'exportable'):
        model = timm.create_model(name, **(options | {config: True}))
        types = {type(m) for m in model.modules()}
        assert ATAC in types and ATACMe not in types
        assert list(model.state_dict()) == list(timm.create_model(name, **options).state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('by', ['batch', 'running', 'frozen'])
@pytest.mark.parametrize('affine', [True, False])
def test_on_a_gpu(dtype, memory_format, by, affine) -> None:
    """Errors are those of ATAC, under autocast and with statistics of every type."""
    if by == 'frozen' and (not affine or dtype != torch.float32):
        pytest.skip('a frozen norm has weights, and runs by its parts under autocast')
    plain, me = pair(channels=64, norm_layer=lambda c, **dd: nn.BatchNorm2d(c, affine=affine, **dd))
    for unit in (plain, me):
        unit.train(by == 'batch')
        if by == 'frozen':
            freeze(unit, ['bn1', 'bn2'])
    x, grad = torch.randn(2, 4, 64, 9, 9)
    expected = everything(copy.deepcopy(plain).double(), x.double(), grad.double(), recomputed=False)
    x, grad = x.cuda().to(memory_format=memory_format), grad.cuda()
    errors = []
    for unit in (plain, me):
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            found = everything(unit.cuda(), x, grad, recomputed=unit is me)
        errors.append({n: (v.cpu().double() - expected[n]).abs().max().item() for n, v in found.items()})
    for name, error in errors[1].items():
        assert error <= 1.5 * errors[0][name] + 1e-5, name

"""The memory-efficient unit against the plain one: the same numbers, fewer bytes, in everything one trains with."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.utils import freeze
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from timm_atac import ATAC, ATACMe

# Odd and prime, so that a transposed or flattened axis cannot fit by accident.
SHAPE = (3, 14, 7, 5)


def pair(channels: int = 14, **kwargs: Any) -> tuple[Any, Any]:
    """A plain and a lean unit with the same parameters and statistics, whose norms have something to do."""
    plain: Any = ATAC(channels, **kwargs)
    norms: tuple[Any, Any] = (plain.bn1, plain.bn2)
    for norm in norms:
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    lean = ATACMe(channels, **kwargs)
    lean.load_state_dict(plain.state_dict())
    return plain, lean


def is_lean(y: torch.Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == '_UnitBackward'


def naming(name: str) -> Callable[[str], str]:
    return lambda text: f'{name}: {text}'


def everything(unit: nn.Module, x: torch.Tensor, grad: torch.Tensor, lean: bool) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers after one backward pass."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = unit(x)
    assert is_lean(y) == lean or unit.input_fmt != 'NCHW'  # the other layouts end with a view
    y.backward(grad)
    assert x.grad is not None
    found = {'output': y.detach(), 'input': x.grad, **{f'buffer {n}': b for n, b in unit.named_buffers()}}
    return found | {n: p.grad for n, p in unit.named_parameters() if p.grad is not None}


def assert_same(plain: Any, lean: Any, x: torch.Tensor, rtol: float, atol: float) -> None:
    grad = torch.randn_like(x)
    expected, found = everything(plain, x, grad, lean=False), everything(lean, x, grad, lean=True)
    assert found.keys() == expected.keys()
    assert {name for name, p in lean.named_parameters() if p.requires_grad} <= found.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=naming(name))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('input_fmt, shape', [('NCHW', SHAPE), ('NHWC', (3, 7, 5, 14)), ('NLC', (3, 11, 14))])
def test_same_numbers(training, input_fmt, shape) -> None:
    plain, lean = pair(input_fmt=input_fmt)
    plain.double().train(training)
    lean.double().train(training)
    for _ in range(2):  # the second time with other running statistics
        assert_same(plain, lean, torch.randn(shape, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('training', [True, False])
def test_channels_last(training) -> None:
    plain, lean = pair()
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    assert_same(plain.train(training), lean.train(training), x, rtol=1e-5, atol=1e-5)
    assert lean(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    'options',
    [
        {'momentum': None},
        {'momentum': 0.3, 'eps': 1e-3},
        {'affine': False},
        {'track_running_stats': False},
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_norms(options, training) -> None:
    plain, lean = pair(norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, **options, **dd))
    plain.double().train(training)
    lean.double().train(training)
    for _ in range(2):
        assert_same(plain, lean, torch.randn(SHAPE, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_one_norm_frozen() -> None:
    """As in fine-tuning with some norms in eval mode."""
    plain, lean = pair()
    for unit in (plain.double(), lean.double()):
        unit.bn1.eval().requires_grad_(False)
    assert_same(plain, lean, torch.randn(SHAPE, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_frozen_by_timm() -> None:
    plain, lean = pair()
    for unit in (plain, lean):
        freeze(unit, ['bn1', 'bn2'])
    assert type(lean.bn1).__name__ == 'FrozenBatchNorm2d'
    assert_same(plain, lean, torch.randn(SHAPE), rtol=1e-5, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert not is_lean(lean(torch.randn(SHAPE)))  # a frozen norm returns float32 there


@pytest.mark.parametrize('wanted', [['x'], ['conv1.weight'], ['bn2.bias', 'conv2.weight'], ['x', 'bn1.weight']])
def test_some_gradients(wanted) -> None:
    plain, lean = pair()
    x = torch.randn(SHAPE, requires_grad='x' in wanted)
    grads = []
    for unit in (plain, lean):
        for name, p in unit.named_parameters():
            p.requires_grad_(name in wanted)
        inputs = [x if name == 'x' else unit.get_parameter(name) for name in wanted]
        y = unit(x)
        assert is_lean(y) == (unit is lean)
        grads.append(torch.autograd.grad(y.square().sum(), inputs))
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('training', [True, False])
def test_gradcheck(training) -> None:
    """First and second derivatives by all inputs, against finite differences."""
    _, unit = pair(6)
    unit.double().train(training)
    names = [name for name, _ in unit.named_parameters()]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        y = functional_call(unit, dict(zip(names, parameters, strict=True)), x)
        assert is_lean(y)
        return y

    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    args = (x, *(p.detach().requires_grad_() for p in unit.parameters()))
    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


def test_second_derivative_where_one_input_depends_on_another() -> None:
    plain, lean = pair()
    found = []
    for unit in (plain.double(), lean.double()):
        w = torch.full((14, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
        x = torch.ones(SHAPE, dtype=torch.float64).cumsum(0).cumsum(2).cumsum(3) * w
        y = functional_call(unit, {'conv1.weight': unit.conv1.weight * w.mean()}, x)
        (grad,) = torch.autograd.grad(y.sin().sum(), w, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), w)))
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def kept(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for the backward pass that are not the module's own."""
    tensors: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize('training', [True, False])
def test_bytes_kept(training) -> None:
    plain, lean = pair()
    x = torch.randn(8, 14, 16, 16)
    whole = x.numel() * x.element_size()
    per_channel = 4 * 4 * 14  # mean and deviation of two norms at most
    assert 0 <= kept(lean.train(training), x) - 1.5 * whole <= per_channel
    assert 0 <= kept(plain.train(training), x) - 4 * whole <= per_channel  # the output is kept by who takes it


@pytest.mark.parametrize('model, most', [('atac_resnet50', 1.07), ('atac_resnet50_full', 1.23)])
def test_bytes_kept_of_networks(model, most) -> None:
    """Over `resnet50`, in float32, whose batch has no say in the ratio."""
    x = torch.randn(2, 3, 64, 64)
    ratio = kept(timm.create_model(model), x) / kept(timm.create_model('resnet50'), x)
    assert round(ratio, 2) <= most


def test_statistics_are_taken_once() -> None:
    _, lean = pair()
    lean(torch.randn(SHAPE)).sum().backward()
    before = {name: buffer.clone() for name, buffer in lean.named_buffers()}
    assert before['bn1.num_batches_tracked'] == before['bn2.num_batches_tracked'] == 1
    lean(torch.randn(SHAPE)).backward(torch.randn(SHAPE))
    after = dict(lean.named_buffers())
    assert after['bn2.num_batches_tracked'] == 2
    assert not torch.equal(before['bn2.running_var'], after['bn2.running_var'])


def test_autocast() -> None:
    """As exact as the plain unit, against float64; gradients of parameters in their own dtype."""
    plain, lean = pair(channels=64)
    exact = copy.deepcopy(plain).double()
    x, grad = torch.randn(4, 64, 9, 9), torch.randn(4, 64, 9, 9)
    errors = []
    expected = everything(exact, x.double(), grad.double(), lean=False)
    for unit in (plain, lean):
        with torch.autocast('cpu', torch.bfloat16):
            found = everything(unit, x, grad, lean=unit is lean)
        assert all(value.dtype == torch.float32 for value in found.values() if value.is_floating_point())
        errors.append({name: (value.double() - expected[name]).abs().max().item() for name, value in found.items()})
    for name, error in errors[1].items():
        assert error <= 1.5 * errors[0][name] + 1e-6, name


def test_autocast_of_what_comes_in_bfloat16() -> None:
    plain, lean = pair()
    x = torch.randn(SHAPE).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        assert_same(plain, lean, x, rtol=0.02, atol=0.05)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointing_around_it(use_reentrant) -> None:
    plain, lean = pair()
    grads = []
    for unit in (plain.double(), lean.double()):
        x = torch.linspace(-1, 1, 14 * 8).view(2, 14, 2, 2).double().requires_grad_()
        checkpoint(unit, x, use_reentrant=use_reentrant).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in unit.parameters()), *unit.buffers()])
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_batched_gradients() -> None:
    """`is_grads_batched`, as a vectorized Jacobian uses it."""
    plain, lean = pair()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(3, *SHAPE, dtype=torch.float64)
    grads = [torch.autograd.grad(u.double()(x), x, directions, is_grads_batched=True)[0] for u in (plain, lean)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-11)


def test_statistics_that_change_before_the_backward_pass() -> None:
    """Evaluated by running statistics, which a training pass then updates: the gradients are those of that moment."""
    plain, lean = pair()
    x, grad = torch.randn(2, *SHAPE, dtype=torch.float64)
    expected = everything(plain.double().eval(), x, grad, lean=False)
    x.requires_grad_()
    y = lean.double().eval()(x)
    lean.train()(x.detach() * 3)
    y.backward(grad)
    for name, p in lean.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, expected['input'], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('frozen', [[], ['bn1'], ['bn1', 'bn2']])
@pytest.mark.parametrize('shape', [(0, 14, 4, 4), (1, 14, 1, 1)])
def test_nothing_to_take_statistics_of(frozen, shape) -> None:
    """Both forms do the same, errors and running statistics included."""
    found: list[Any] = []
    for unit in pair():
        if frozen:
            freeze(unit, frozen)
        for other in {'bn1', 'bn2'} - set(frozen):
            setattr(unit, other, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(unit, other)))
        x = torch.ones(shape, requires_grad=True)
        try:
            unit(x).sum().backward()
            found.append([x.grad, *unit.buffers()])
        except (RuntimeError, ValueError) as error:
            found.append([type(error), *unit.buffers()])
    for a, b in zip(*found, strict=True):
        assert a is b if isinstance(a, type) else torch.equal(a, b)


def test_changed_input_is_an_error() -> None:
    _, lean = pair()
    x = torch.randn(SHAPE, requires_grad=True) * 1
    y = lean(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


def test_one_value_a_channel_is_an_error() -> None:
    _, lean = pair()
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        lean(torch.randn(1, 14, 1, 1, requires_grad=True))


class _Watched(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1


def _hook(unit: Any) -> None:
    unit.gate.register_forward_hook(lambda module, args, y: y * 0.5)


def _backward_hook(unit: Any) -> None:
    unit.gate.register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,))


def _parametrization(unit: Any) -> None:
    parametrize.register_parametrization(unit.conv1, 'weight', _Watched())


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
    """Where something is to be seen or changed in between."""
    torch.manual_seed(1)
    plain, lean = pair()
    for unit in (plain, lean):
        torch.manual_seed(2)
        change(unit)
    x = torch.randn(SHAPE)
    for expected, found in zip(*(everything(u, x, x, lean=False).values() for u in (plain, lean)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_other_formula_of_a_subclass() -> None:
    class Doubled(ATACMe):
        def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
            return super().bottleneck(x) * 2

    assert not is_lean(Doubled(14)(torch.randn(SHAPE)))


def test_global_hooks_see_the_parts() -> None:
    _, lean = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        lean(torch.randn(SHAPE))
    finally:
        handle.remove()
    assert seen.count(nn.BatchNorm2d) == 2
    assert is_lean(lean(torch.randn(SHAPE)))


def test_function_transforms() -> None:
    """torch.func and forward mode, which a custom backward pass does not have."""
    plain, lean = pair()
    plain.double().eval()
    lean.double().eval()
    x, direction = torch.randn(2, *SHAPE, dtype=torch.float64)
    transforms: tuple[Any, ...] = (
        lambda unit: torch.func.grad(lambda v: unit(v).square().sum())(x),
        lambda unit: torch.func.jvp(unit, (x,), (direction,))[1],
        lambda unit: torch.autograd.functional.jvp(unit, x, direction)[1],
        lambda unit: torch.vmap(torch.func.grad(lambda v: unit(v[None]).sum()))(x),
    )
    for transform in transforms:
        torch.testing.assert_close(transform(lean), transform(plain), rtol=1e-9, atol=1e-9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangents = [torch.autograd.forward_ad.unpack_dual(unit(dual)).tangent for unit in (plain, lean)]
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-9, atol=1e-9)


def test_tracing_sees_the_parts() -> None:
    _, lean = pair()
    lean.eval()
    x = torch.randn(SHAPE, requires_grad=True)
    expected = lean(x)
    assert is_lean(expected)
    graphs = [
        torch.fx.symbolic_trace(lean),
        torch.jit.script(lean),
        torch.jit.trace(lean, x),
        torch.export.export(lean, (x.detach(),)).module(),
    ]
    for graph in graphs:
        torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-5)
        assert not is_lean(graph(x))


def test_without_gradients() -> None:
    plain, lean = pair()
    with torch.no_grad():
        y = lean(torch.randn(SHAPE))
    assert y.grad_fn is None
    with torch.inference_mode():
        x = torch.randn(SHAPE)
        torch.testing.assert_close(lean.eval()(x), plain.eval()(x), rtol=0, atol=1)  # statistics of one batch apart


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


def _sync(rank: int, folder: str, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    try:
        unit, x, grad = torch.load(f'{folder}/given.pt', weights_only=False)
        unit = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
        x, grad = x.split(sizes)[rank], grad.split(sizes)[rank]
        single = copy.deepcopy(unit).float()
        torch.save(everything(unit, x, grad, lean=True), f'{folder}/{rank}.pt')
        with torch.autocast('cpu', torch.bfloat16):
            torch.save(everything(single, x.float(), grad.float(), lean=True), f'{folder}/{rank}-bf16.pt')
        with pytest.raises(RuntimeError, match='A SyncBatchNorm has no second derivative'):
            torch.autograd.grad(unit(x.requires_grad_()).sum(), x, create_graph=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('sizes, affine', [((3, 1), True), ((4, 0), False)])
def test_synchronized_norms(tmp_path, sizes, affine) -> None:
    """Two processes with parts of a batch, one of them perhaps without images, against one with all of it."""
    plain, lean = pair(norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, affine=affine, **dd))
    del lean._norm_layer
    x, grad = torch.randn(2, 4, 14, 25, 23).double()
    grad += 1  # what is rounded in the same way at every position then adds up
    torch.save((lean.double(), x, grad), tmp_path / 'given.pt')
    torch.multiprocessing.spawn(_sync, args=(str(tmp_path), sizes), nprocs=2)
    expected = everything(plain.double(), x, grad, lean=False)
    parts = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1)]
    for name, value in expected.items():
        if name in ('output', 'input'):
            found = torch.cat([part[name] for part in parts])
        elif name.startswith('buffer'):
            found = parts[0][name]
            torch.testing.assert_close(parts[1][name], found)
        else:
            found = parts[0][name] + parts[1][name]  # DDP takes the mean, of losses that are means
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-9, msg=naming(name))

    halves = [torch.load(tmp_path / f'{rank}-bf16.pt', weights_only=True) for rank in (0, 1)]
    for name in ('conv1.weight', 'conv2.weight'):
        error = (halves[0][name] + halves[1][name] - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('by', ['batch', 'running', 'frozen'])
@pytest.mark.parametrize('affine', [True, False])
def test_on_a_gpu(dtype, memory_format, by, affine) -> None:
    """As exact as the plain unit, under autocast and with statistics of every kind."""
    if by == 'frozen' and (not affine or dtype != torch.float32):
        pytest.skip('a frozen norm has weights, and runs by its parts under autocast')
    plain, lean = pair(channels=64, norm_layer=lambda c, **dd: nn.BatchNorm2d(c, affine=affine, **dd))
    del plain._norm_layer, lean._norm_layer
    for unit in (plain, lean):
        unit.train(by == 'batch')
        if by == 'frozen':
            freeze(unit, ['bn1', 'bn2'])
    x, grad = torch.randn(2, 4, 64, 9, 9)
    expected = everything(copy.deepcopy(plain).double(), x.double(), grad.double(), lean=False)
    x, grad = x.cuda().to(memory_format=memory_format), grad.cuda()
    errors = []
    for unit in (plain, lean):
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            found = everything(unit.cuda(), x, grad, lean=unit is lean)
        errors.append({n: (v.cpu().double() - expected[n]).abs().max().item() for n, v in found.items()})
    for name, error in errors[1].items():
        assert error <= 1.5 * errors[0][name] + 1e-5, name

"""The Triton kernels against their formulas in float64: on a GPU, or interpreted (test_kernels_interpreted.py)."""

import copy
from typing import Any
from unittest import mock

import kernel_tiles
import kernels
import pytest
import speed
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from fused_models import images, lived_in
from kernel_units import DEVICE, LAYOUTS, error, guarded, poisoned
from lean_units import everything, is_lean, naming, pair

import timm_atac
from timm_atac import fuse
from timm_atac.fused import FusedATAC
from timm_atac.kernels import atac, norm_gate
from timm_atac.kernels.atac import Tile
from timm_atac.kernels.switch import IS_INTERPRETED, can_run

if not can_run(DEVICE):
    pytest.skip('no GPU: test_kernels_interpreted.py runs these in a process of their own', allow_module_level=True)

# largest errors over all values together: the result is rounded once and, where the products are of a narrow type, so
# are the hidden values; the interpreter cuts bfloat16 off instead of rounding it
ERRORS = {torch.float32: 5e-7, torch.float16: 4e-4, torch.bfloat16: 6e-3 if IS_INTERPRETED else 2.4e-3}
SHAPES = [(16, 8), (3, 1), (24, 12), (70, 35), (20, 20)]  # channels and hidden ones
PLACES = [(2, 7, 5), (1, 1, 1), (3, 9, 8)]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    yield
    timm_atac.use_kernels(None)


def parameters(channels: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    return [guarded(torch.randn(shape).mul(3 / shape[-1] ** 0.5).to(dtype)) for shape in shapes]


def maps(count: int, channels: int, place: tuple[int, int, int], layout: str, dtype: torch.dtype) -> list[Any]:
    batch, *size = place
    shape = (batch, channels, *size)
    return [guarded(torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])) for _ in range(count)]


def exact(function, *args: torch.Tensor) -> torch.Tensor:
    return function(*(arg.double().cpu() for arg in args))


@pytest.mark.parametrize('dtype', ERRORS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('channels, hidden', SHAPES)
def test_atac(channels, hidden, layout, dtype) -> None:
    for place in PLACES:
        with poisoned():
            x, weights = maps(1, channels, place, layout, dtype)[0], parameters(channels, hidden, dtype)
            y = atac.atac(x, *weights)
        assert y.dtype == dtype and y.stride() == x.stride()
        assert error(y, exact(atac.formula, x, *weights)) < ERRORS[dtype]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_atac_of_float32_by_narrow_weights(dtype) -> None:
    """Under autocast: the result is not rounded to the narrow type."""
    (x,) = maps(1, 24, (2, 7, 5), 'channels_last', torch.float32)
    weights = parameters(24, 12, dtype)
    y = atac.atac(x, *weights)
    assert y.dtype == torch.float32
    assert error(y, exact(atac.formula, x, *weights)) < ERRORS[dtype]


@pytest.mark.parametrize('tile', [Tile(16, 16, 16, 16, 4), Tile(32, 16, 16, 32, 4), Tile(64, 64, 64, 64, 4)])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_atac_by_tiles(tile, layout) -> None:
    """In fewer hidden channels at a time than there are, and in tiles of which the map fills a part."""
    with poisoned():
        x, weights = maps(1, 70, (2, 7, 5), layout, torch.float32)[0], parameters(70, 35, torch.float32)
        y = atac.launch(x, *weights, tile=tile)
    assert error(y, exact(atac.formula, x, *weights)) < ERRORS[torch.float32]


@pytest.mark.filterwarnings('ignore:invalid value encountered:RuntimeWarning')  # of the interpreter
def test_atac_of_nothing_and_of_what_is_not_finite() -> None:
    weights = parameters(24, 12, torch.float32)
    assert atac.atac(torch.zeros(0, 24, 3, 3, device=DEVICE), *weights).shape == (0, 24, 3, 3)
    x = torch.randn(4, 24, 3, 1)
    x[0, 3, 1], x[1, 5, 2], x[2, 7, 0] = torch.nan, torch.inf, -torch.inf
    found = atac.atac(x.to(DEVICE), *weights).double().cpu()
    torch.testing.assert_close(found, exact(atac.formula, x, *weights), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found.isfinite().all(1).sum() == 9


def test_weights_that_lie_otherwise() -> None:
    weight1, bias1, weight2, bias2 = parameters(24, 12, torch.float32)
    (x,) = maps(1, 24, (2, 7, 5), 'channels_last', torch.float32)
    found = atac.atac(x, weight1.t().contiguous().t(), bias1.repeat(2).view(2, -1)[1], weight2, bias2[::1])
    assert torch.equal(found, atac.atac(x, weight1, bias1, weight2, bias2))


def test_offsets_of_more_than_32_bits() -> None:
    """Where the last position of a map of 2 ** 31 values and more is."""
    import offsets_kernel

    area, channels = 300_000, 1000
    for channels_last in (True, False):
        out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        offsets_kernel.write[(1,)](out, 50 * area + 299_999, area, 999, CHANNELS=channels, CHANNELS_LAST=channels_last)
        first = (50 * area + 299_999) * channels if channels_last else 50 * area * channels + 299_999
        assert out.tolist() == [first, 999 if channels_last else 999 * area]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_atac_of_more_than_32_bits() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 14e9:
        pytest.skip('needs 14 GB')
    weights = parameters(64, 32, torch.bfloat16)
    x = torch.zeros(33, 64, 1024, 1024, dtype=torch.bfloat16, device=DEVICE)
    x = x.as_strided(x.shape, (64 * 1024 * 1024, 1, 64 * 1024, 64))
    x[-1, :, -1, -3:] = torch.randn(64, 3).to(x)
    y = atac.atac(x, *weights)
    small = x[-1:, :, -1:, -3:].contiguous(memory_format=torch.channels_last)
    assert torch.equal(y[-1:, :, -1:, -3:], atac.atac(small, *weights))
    assert y[:-1].count_nonzero() == 0


@pytest.mark.parametrize('dtypes', [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('channels', [5, 16, 130])
def test_norm_gate(channels, layout, dtypes) -> None:
    """Result and gradients against those that autograd has of a BatchNorm, a sigmoid and a product."""
    place = (3, 9, 8)
    with poisoned():
        (x,), (z,) = (maps(1, channels, place, layout, dtype) for dtype in dtypes)
        (grad,) = maps(1, channels, place, layout, torch.promote_types(*dtypes))
        norm = nn.BatchNorm2d(channels).double()
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        var, mean = torch.var_mean(z.float(), (0, 2, 3), correction=0)
        rows = [mean, (var + norm.eps).rsqrt(), *(p.detach().float() for p in norm.parameters())]
        rows = [guarded(row) for row in rows]
        y = norm_gate.norm_gate(x, z, *rows)
        sums = norm_gate.norm_gate_sums(grad, x, z, *rows)
        grad_x, grad_z = norm_gate.norm_gate_backward(grad, x, z, *rows, sums / (3 * 9 * 8))
    inputs = [t.double().cpu().requires_grad_() for t in (x, z)]
    expected = inputs[0] * norm(inputs[1]).sigmoid()
    expected.backward(grad.double().cpu())
    found = {'result': y, 'x': grad_x, 'z': grad_z, 'bias': sums[0], 'weight': sums[1]}
    wanted = [expected.detach(), inputs[0].grad, inputs[1].grad, norm.bias.grad, norm.weight.grad]
    types = [grad.dtype, *dtypes, torch.float32, torch.float32]
    for (name, value), reference, dtype in zip(found.items(), wanted, types, strict=True):
        assert reference is not None and value.dtype == dtype
        assert error(value, reference) < (2e-6 if dtype == torch.float32 else 5e-3), name


def test_norm_gate_of_nothing() -> None:
    """As a process without images has it."""
    grad, x, z = maps(3, 5, (0, 9, 8), 'channels_last', torch.float32)
    rows = [torch.ones(5, device=DEVICE)] * 4
    assert norm_gate.norm_gate(x, z, *rows).shape == x.shape
    assert torch.equal(norm_gate.norm_gate_sums(grad, x, z, *rows).cpu(), torch.zeros(2, 5))
    grads = norm_gate.norm_gate_backward(grad, x, z, *rows, torch.zeros(2, 5, device=DEVICE))
    assert [g.shape for g in grads] == [x.shape] * 2


def test_sums_of_many_programs() -> None:
    """One result however the positions are shared out."""
    grad, x, z = maps(3, 5, (3, 9, 8), 'channels_last', torch.float32)
    rows = torch.tensor([[0.0], [1], [1], [0]], device=DEVICE).repeat(1, 5).unbind()
    with mock.patch.object(norm_gate, '_TILE', 128):  # 16 positions
        expected = norm_gate.norm_gate_sums(grad, x, z, *rows)
        for programs in (1, 3, 5):
            with mock.patch.object(norm_gate, '_PROGRAMS', programs):
                torch.testing.assert_close(norm_gate.norm_gate_sums(grad, x, z, *rows), expected)


def spied(module: Any, *names: str) -> Any:
    """Counts calls of operations."""
    spies = {name: mock.Mock(wraps=getattr(module, name)) for name in names}
    return mock.patch.multiple(module, **spies)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_fused_network(layout) -> None:
    model = lived_in(timm.create_model('atac_resnet8_cifar'), dtype=torch.float32).to(DEVICE)
    x = images(model).float().to(DEVICE)[..., :12, :12].contiguous(memory_format=LAYOUTS[layout])
    fused, plain = fuse(model, kernel=True), fuse(model, kernel=False)
    units = [m for m in fused.modules() if isinstance(m, FusedATAC)]
    assert 'one kernel' in repr(units[0]) and 'two products' in repr(plain)
    with spied(atac, 'atac'), torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
        assert atac.atac.call_count == len(units)
        plain(x)
        assert atac.atac.call_count == len(units)
    grads = []
    for m in (fused, plain):
        m(x).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for found, expected in zip(*grads, strict=True):
        assert error(found, expected) < 1e-3


@pytest.mark.parametrize('input_fmt, shape', [('NCHW', (3, 14, 7, 5)), ('NHWC', (3, 7, 5, 14)), ('NLC', (3, 11, 14))])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
def test_fused_unit(input_fmt, shape, dtype) -> None:
    """In every layout, under autocast and not."""
    unit = pair(input_fmt=input_fmt)[0].to(DEVICE).eval()
    x = torch.randn(shape, device=DEVICE)
    fused = fuse(unit, example_input=x, kernel=True)
    with torch.no_grad():
        expected = unit(x)
        with spied(atac, 'atac'), torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            found = fused(x)
            assert atac.atac.call_count == 1
    assert found.dtype == torch.float32 and found.stride() == expected.stride()
    assert error(found, expected) < (1e-5 if dtype is None else 1e-2)


def test_where_the_kernel_does_not_fit() -> None:
    """Strides, types and changed parts that it cannot do are computed by the two products."""
    unit = pair()[0].to(DEVICE).eval()
    x = torch.randn(3, 28, 7, 5, device=DEVICE)[:, ::2]
    fused: Any = fuse(unit, example_input=x, kernel=True)
    with spied(atac, 'atac'), torch.no_grad():
        torch.testing.assert_close(fused(x), unit(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused.double()(x.double()), unit.double()(x.double()))
        fused.float()
        with pytest.raises(RuntimeError):
            fused(x.contiguous().half())
        called: list[int] = []
        fused.conv1.register_forward_hook(lambda *args: called.append(1))
        fused(x.contiguous())
        assert atac.atac.call_count == 0 and called == [1]


OPERATIONS = ('norm_gate', 'norm_gate_sums', 'norm_gate_backward')
NORMS: dict[str, dict[str, Any]] = {
    'plain': {},
    'affine=False': {'affine': False},
    'momentum=None': {'momentum': None},
    'no running statistics': {'track_running_stats': False},
}


@pytest.mark.parametrize('norm, layout', [*((norm, 'channels_last') for norm in NORMS), ('plain', 'contiguous')])
@pytest.mark.parametrize('training', [True, False])
def test_training(norm, training, layout) -> None:
    """Outputs, gradients and running statistics of the lean unit, with and without the kernels."""
    units = pair(norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, **NORMS[norm], **dd))
    plain, lean = (unit.to(DEVICE).train(training) for unit in units)
    for _ in range(2):
        x, grad = maps(2, 14, (3, 7, 5), layout, torch.float32)
        for unit, enable in ((plain, False), (lean, True)):
            timm_atac.use_kernels(enable)
            unit.x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            with spied(norm_gate, *OPERATIONS):
                unit.y = unit(unit.x)
                unit.y.backward(grad)
                counts = [getattr(norm_gate, name).call_count for name in OPERATIONS]
            needs_sums = training or norm != 'affine=False' or norm == 'no running statistics'
            assert counts == ([1, needs_sums, 1] if enable else [0, 0, 0])
        assert is_lean(lean.y)
        torch.testing.assert_close(lean.y, plain.y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lean.x.grad, plain.x.grad, rtol=1e-3, atol=1e-4)
        for (name, found), expected in zip(lean.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=naming(name))
        for found, expected in zip(lean.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_training_under_autocast() -> None:
    """No further from float64 than without the kernels, in bfloat16 with an input of either type."""
    plain, lean = pair(24)
    x, grad = torch.randn(2, 4, 24, 9, 8)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    exact_x = x.double().requires_grad_()
    reference = plain.double()(exact_x)
    reference.backward(grad.double())
    expected = {'y': reference.detach(), 'x': exact_x.grad} | {n: p.grad for n, p in plain.named_parameters()}
    lean.to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        errors = []
        for enable in (False, True):
            timm_atac.use_kernels(enable)
            given = x.to(DEVICE, dtype, copy=True).requires_grad_()
            lean.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16):
                y = lean(given)
            y.backward(grad.to(y))
            found = {'y': y, 'x': given.grad} | {n: p.grad for n, p in lean.named_parameters()}
            assert y.dtype == dtype and given.grad is not None and given.grad.dtype == dtype
            errors.append({name: error(value, expected[name]) for name, value in found.items()})
        for name in expected:
            assert errors[1][name] < 1.5 * errors[0][name] + 1e-3, (name, errors)


def test_some_gradients() -> None:
    for wanted in (['x'], ['bn2.bias'], ['conv1.weight'], ['conv2.weight', 'bn2.weight']):
        grads = []
        plain, lean = pair()
        x = torch.randn(3, 14, 7, 5, device=DEVICE, requires_grad='x' in wanted)
        for unit, enable in ((plain.to(DEVICE), False), (lean.to(DEVICE), True)):
            timm_atac.use_kernels(enable)
            for name, p in unit.named_parameters():
                p.requires_grad_(name in wanted)
            y = unit(x)
            inputs = [x if name == 'x' else unit.get_parameter(name) for name in wanted]
            grads.append(torch.autograd.grad(y.square().sum(), inputs))
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_what_the_kernels_of_training_leave_alone() -> None:
    """Float64 and mixed norms: by PyTorch's operations, as without kernels."""
    timm_atac.use_kernels(True)
    for dtype, norm_dtype in ((torch.float64, torch.float64), (torch.float32, torch.float64)):
        _, lean = pair()
        lean.to(DEVICE, dtype)
        lean.bn2.to(dtype=norm_dtype)
        x = torch.randn(3, 14, 7, 5, device=DEVICE, dtype=dtype)
        with spied(norm_gate, *OPERATIONS):
            try:
                lean(x).sum().backward()
            except RuntimeError:  # PyTorch's own, of types that do not go together
                assert dtype != norm_dtype
            assert [getattr(norm_gate, name).call_count for name in OPERATIONS] == [0, 0, 0]
    _, lean = pair()
    x = torch.randn(3, 14, 7, 5, device=DEVICE, requires_grad=True)
    grad = torch.randn(3, 14, 7, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with spied(norm_gate, *OPERATIONS):
        lean.to(DEVICE)(x).backward(grad)
        assert [getattr(norm_gate, name).call_count for name in OPERATIONS] == [1, 0, 0]


def test_rows_that_lie_otherwise() -> None:
    """Weights and biases of a norm as columns of one table."""
    timm_atac.use_kernels(True)
    _, lean = pair()
    lean.to(DEVICE)
    x = torch.randn(3, 14, 7, 5, device=DEVICE)
    expected = lean(x)
    table = torch.stack((lean.bn2.weight.detach(), lean.bn2.bias.detach()), 1)
    lean.bn2.weight, lean.bn2.bias = nn.Parameter(table[:, 0]), nn.Parameter(table[:, 1])
    assert lean.bn2.weight.stride() == (2,)
    torch.testing.assert_close(lean(x), expected)


def test_running_statistics_of_other_types() -> None:
    """Of a model in bfloat16 whose norms have no weights: no further from float32 than without the kernels."""
    plain, lean = pair(norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, affine=False, **dd))
    x = torch.randn(3, 14, 7, 5, device=DEVICE).bfloat16()
    errors = []
    exact = copy.deepcopy(plain).to(DEVICE)
    exact(x.float())
    for enable in (False, True):
        unit = copy.deepcopy(lean).to(DEVICE, torch.bfloat16)
        timm_atac.use_kernels(enable)
        with spied(norm_gate, *OPERATIONS):
            unit(x)
            assert norm_gate.norm_gate.call_count == enable
        errors.append(error(unit.bn2.running_var, exact.bn2.running_var))
    assert errors[1] < 1.5 * errors[0] + 1e-3 and errors[0] < 0.02


def test_precision_of_float32(monkeypatch) -> None:
    """As in convolutions."""
    for allowed, expected in ((True, 'tf32'), (False, 'ieee')):
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', allowed)
        with mock.patch.object(atac, 'run_kernel') as run:
            atac.atac(*maps(1, 16, (1, 2, 2), 'contiguous', torch.float32), *parameters(16, 8, torch.float32))
        assert run.call_args.kwargs['PRECISION'] == expected


def test_types_that_stay_as_they_are() -> None:
    """Float64 is computed by the formula, and types that do not go together are PyTorch's error."""
    x = torch.randn(2, 14, 3, 3, dtype=torch.float64, device=DEVICE)
    weights = [w.double() for w in parameters(14, 7, torch.float32)]
    torch.testing.assert_close(atac.atac(x, *weights), atac.formula(x, *weights), rtol=1e-12, atol=1e-12)
    y = norm_gate.norm_gate(x.half(), x.bfloat16(), *(torch.ones(14, device=DEVICE) for _ in range(4)))
    assert y.dtype == torch.float32
    unit: Any = fuse(pair()[0], example_input=torch.randn(2, 14, 3, 3), kernel=True).to(DEVICE, torch.bfloat16)
    with spied(atac, 'atac'), pytest.raises(RuntimeError):
        unit(x.float())


def test_gradient_that_lies_otherwise() -> None:
    """A backward pass that the kernels cannot do is that of PyTorch's operations."""
    plain, lean = pair()
    timm_atac.use_kernels(True)
    x = torch.randn(3, 14, 7, 5, device=DEVICE)
    grads = []
    for unit in (plain.to(DEVICE), lean.to(DEVICE)):
        given = x.clone().requires_grad_()
        with spied(norm_gate, *OPERATIONS):
            unit(given).sum().backward()  # a gradient with strides of zero
            assert norm_gate.norm_gate.call_count == (unit is lean)
            assert norm_gate.norm_gate_backward.call_count == 0
        grads.append(given.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


def _synchronized(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timm_atac.use_kernels(rank == 0)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    try:
        unit, x, grad = torch.load(f'{folder}/given.pt', weights_only=False)
        unit = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
        with spied(norm_gate, *OPERATIONS):
            found = everything(unit, x.split((3, 1))[rank], grad.split((3, 1))[rank], lean=True)
            assert norm_gate.norm_gate.call_count == norm_gate.norm_gate_backward.call_count == (rank == 0)
        torch.save(found, f'{folder}/{rank}.pt')
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != 'cpu', reason='gloo gathers on a CPU')
def test_synchronized(tmp_path) -> None:
    """Two processes with parts of a batch, one of them without the kernels, against one with all of it."""
    plain, lean = pair()
    x, grad = torch.randn(2, 4, 14, 7, 5)
    torch.save((lean, x, grad), tmp_path / 'given.pt')
    torch.multiprocessing.spawn(_synchronized, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1)]
    for name, expected in everything(plain, x, grad, lean=False).items():
        first, second = (part[name] for part in parts)
        if name in ('output', 'input'):
            found = torch.cat((first, second))
        else:
            found = first if name.startswith('buffer') else first + second
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=naming(name))


def rows(capsys) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ') and '---' not in line]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def test_benchmark_of_units(monkeypatch, capsys, tmp_path) -> None:
    pytest.importorskip('matplotlib')
    where = f'--device {DEVICE.type} --batch-size 2 --rounds 1 --shapes 16x3x2'.split()
    picture = tmp_path / 'kernels.png'
    options = ['--forms', 'eager', 'folded', 'kernel', '--trained', 'ATACMe', 'ATACMe, kernels', '--plot', str(picture)]
    monkeypatch.setattr('sys.argv', ['kernels.py', *where, *options])
    kernels.main()
    table = rows(capsys)
    assert [row[0] for row in table] == ['C x H x W', '16 x 3 x 2'] * 2 + ['C', '16', '16', '16']
    for row, (name, dtype) in zip(table[-3:], kernels.DTYPES.items(), strict=True):
        assert row[1] == name
        assert all(0 < float(cell) < 2 * ERRORS[dtype] for cell in row[2:])
    assert picture.stat().st_size > 10_000


def test_benchmark_of_tiles(monkeypatch, capsys) -> None:
    where = f'--device {DEVICE.type} --batch-size 2 --rounds 1 --shapes 32x3x2 --best 1'.split()
    monkeypatch.setattr(kernel_tiles, 'SIZES', {name: sizes[:2] for name, sizes in kernel_tiles.SIZES.items()})
    monkeypatch.setattr('sys.argv', ['kernel_tiles.py', *where])
    kernel_tiles.main()
    x = torch.empty(2, 32, 3, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    in_use = ', '.join(map(str, atac.tile_for(x, torch.empty(16, 32, dtype=x.dtype))))
    assert {row[0] for row in rows(capsys)} & {f'{in_use} (in use)'}


def test_benchmark_of_networks() -> None:
    names = {'tiny': lambda: timm.create_model('atac_resnet8_cifar')}
    mode = speed.Mode(*speed.MODES['half'], device=DEVICE)
    with mock.patch.multiple(speed, MODELS=names, FUSED=names):
        infer = speed.inference(mode, ['tiny'], 1, 8, 1, kernels=True)
        train = speed.training(speed.Mode(*speed.MODES['bf16'], device=DEVICE), ['tiny'], 2, 8, 1, kernels=True)
    assert [row.name for row in infer] == ['tiny', 'tiny, fused', 'tiny, fused, kernels']
    assert [row.name for row in train] == ['tiny', 'tiny, kernels']

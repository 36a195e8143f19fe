"""The Triton kernels for training against PyTorch's operations, on a GPU or interpreted."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from atac_me import everything, is_recomputed, pair, with_name
from kernel_units import (
    DEVICE,
    LAYOUTS,
    error,
    guarded,
    maps,
    poisoned,
    skip_without_kernels,
    spied,
)

import timm_atac
from timm_atac.kernels import norm_gate

skip_without_kernels()
pytestmark = pytest.mark.usefixtures('kernels_as_before')

OPERATIONS = ('norm_gate', 'norm_gate_sums', 'norm_gate_backward')
NORMS: dict[str, dict[str, Any]] = {
    'plain': {},
    'affine=False': {'affine': False},
    'momentum=None': {'momentum': None},
    'no running statistics': {'track_running_stats': False},
}


@pytest.mark.parametrize('dtypes', [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('channels', [5, 16, 130])
def test_norm_gate(channels, layout, dtypes) -> None:
    """Result and gradients against autograd for a BatchNorm, a sigmoid and a product."""
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
    """An empty batch, as in a process without images."""
    grad, x, z = maps(3, 5, (0, 9, 8), 'channels_last', torch.float32)
    rows = [torch.ones(5, device=DEVICE)] * 4
    assert norm_gate.norm_gate(x, z, *rows).shape == x.shape
    assert torch.equal(norm_gate.norm_gate_sums(grad, x, z, *rows).cpu(), torch.zeros(2, 5))
    grads = norm_gate.norm_gate_backward(grad, x, z, *rows, torch.zeros(2, 5, device=DEVICE))
    assert [g.shape for g in grads] == [x.shape] * 2


def test_sums_of_many_programs() -> None:
    """The result does not depend on the number of programs."""
    grad, x, z = maps(3, 5, (3, 9, 8), 'channels_last', torch.float32)
    rows = torch.tensor([[0.0], [1], [1], [0]], device=DEVICE).repeat(1, 5).unbind()
    with mock.patch.object(norm_gate, '_TILE', 128):  # 16 positions
        expected = norm_gate.norm_gate_sums(grad, x, z, *rows)
        for programs in (1, 3, 5):
            with mock.patch.object(norm_gate, '_PROGRAMS', programs):
                torch.testing.assert_close(norm_gate.norm_gate_sums(grad, x, z, *rows), expected)


@pytest.mark.parametrize('norm, layout', [*((norm, 'channels_last') for norm in NORMS), ('plain', 'contiguous')])
@pytest.mark.parametrize('training', [True, False])
def test_training(norm, training, layout) -> None:
    """Outputs, gradients and running statistics of ATACMe, with and without the kernels."""
    units = pair(norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, **NORMS[norm], **dd))
    plain, me = (unit.to(DEVICE).train(training) for unit in units)
    for _ in range(2):
        x, grad = maps(2, 14, (3, 7, 5), layout, torch.float32)
        for unit, enable in ((plain, False), (me, True)):
            timm_atac.use_kernels(enable)
            unit.x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            with spied(norm_gate, *OPERATIONS):
                unit.y = unit(unit.x)
                unit.y.backward(grad)
                counts = [getattr(norm_gate, name).call_count for name in OPERATIONS]
            needs_sums = training or norm != 'affine=False' or norm == 'no running statistics'
            assert counts == ([1, needs_sums, 1] if enable else [0, 0, 0])
        assert is_recomputed(me.y)
        torch.testing.assert_close(me.y, plain.y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(me.x.grad, plain.x.grad, rtol=1e-3, atol=1e-4)
        for (name, found), expected in zip(me.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=with_name(name))
        for found, expected in zip(me.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_training_under_autocast() -> None:
    """Errors against float64 are those without the kernels, in bfloat16 with an input of either type."""
    plain, me = pair(24)
    x, grad = torch.randn(2, 4, 24, 9, 8)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    exact_x = x.double().requires_grad_()
    reference = plain.double()(exact_x)
    reference.backward(grad.double())
    expected = {'y': reference.detach(), 'x': exact_x.grad} | {n: p.grad for n, p in plain.named_parameters()}
    me.to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        errors = []
        for enable in (False, True):
            timm_atac.use_kernels(enable)
            given = x.to(DEVICE, dtype, copy=True).requires_grad_()
            me.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16):
                y = me(given)
            y.backward(grad.to(y))
            found = {'y': y, 'x': given.grad} | {n: p.grad for n, p in me.named_parameters()}
            assert y.dtype == dtype and given.grad is not None and given.grad.dtype == dtype
            errors.append({name: error(value, expected[name]) for name, value in found.items()})
        for name in expected:
            assert errors[1][name] < 1.5 * errors[0][name] + 1e-3, (name, errors)


def test_some_gradients() -> None:
    for wanted in (['x'], ['bn2.bias'], ['conv1.weight'], ['conv2.weight', 'bn2.weight']):
        grads = []
        plain, me = pair()
        x = torch.randn(3, 14, 7, 5, device=DEVICE, requires_grad='x' in wanted)
        for unit, enable in ((plain.to(DEVICE), False), (me.to(DEVICE), True)):
            timm_atac.use_kernels(enable)
            for name, p in unit.named_parameters():
                p.requires_grad_(name in wanted)
            y = unit(x)
            inputs = [x if name == 'x' else unit.get_parameter(name) for name in wanted]
            grads.append(torch.autograd.grad(y.square().sum(), inputs))
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_unsupported_dtypes_and_strides() -> None:
    """PyTorch's operations run for float64, mixed norms and other strides of the gradient."""
    timm_atac.use_kernels(True)
    for dtype, norm_dtype in ((torch.float64, torch.float64), (torch.float32, torch.float64)):
        _, me = pair()
        me.to(DEVICE, dtype)
        me.bn2.to(dtype=norm_dtype)
        x = torch.randn(3, 14, 7, 5, device=DEVICE, dtype=dtype)
        with spied(norm_gate, *OPERATIONS):
            try:
                me(x).sum().backward()
            except RuntimeError:  # PyTorch raises it for types that do not match
                assert dtype != norm_dtype
            assert [getattr(norm_gate, name).call_count for name in OPERATIONS] == [0, 0, 0]
    _, me = pair()
    x = torch.randn(3, 14, 7, 5, device=DEVICE, requires_grad=True)
    grad = torch.randn(3, 14, 7, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with spied(norm_gate, *OPERATIONS):
        me.to(DEVICE)(x).backward(grad)
        assert [getattr(norm_gate, name).call_count for name in OPERATIONS] == [1, 0, 0]


def test_rows_that_are_not_contiguous() -> None:
    """Weight and bias of a norm are columns of one table."""
    timm_atac.use_kernels(True)
    _, me = pair()
    me.to(DEVICE)
    x = torch.randn(3, 14, 7, 5, device=DEVICE)
    expected = me(x)
    table = torch.stack((me.bn2.weight.detach(), me.bn2.bias.detach()), 1)
    me.bn2.weight, me.bn2.bias = nn.Parameter(table[:, 0]), nn.Parameter(table[:, 1])
    assert me.bn2.weight.stride() == (2,)
    torch.testing.assert_close(me(x), expected)


def test_running_statistics_of_other_types() -> None:
    """A model in bfloat16 whose norms have no weights: errors against float32 are those without the kernels."""
    plain, me = pair(norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, affine=False, **dd))
    x = torch.randn(3, 14, 7, 5, device=DEVICE).bfloat16()
    errors = []
    exact = copy.deepcopy(plain).to(DEVICE)
    exact(x.float())
    for enable in (False, True):
        unit = copy.deepcopy(me).to(DEVICE, torch.bfloat16)
        timm_atac.use_kernels(enable)
        with spied(norm_gate, *OPERATIONS):
            unit(x)
            assert norm_gate.norm_gate.call_count == enable
        errors.append(error(unit.bn2.running_var, exact.bn2.running_var))
    assert errors[1] < 1.5 * errors[0] + 1e-3 and errors[0] < 0.02


def test_gradient_that_is_not_dense() -> None:
    """If the kernels do not support the gradient, PyTorch's operations run in the backward pass."""
    plain, me = pair()
    timm_atac.use_kernels(True)
    x = torch.randn(3, 14, 7, 5, device=DEVICE)
    grads = []
    for unit in (plain.to(DEVICE), me.to(DEVICE)):
        given = x.clone().requires_grad_()
        with spied(norm_gate, *OPERATIONS):
            unit(given).sum().backward()  # a gradient with strides of zero
            assert norm_gate.norm_gate.call_count == (unit is me)
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
            found = everything(unit, x.split((3, 1))[rank], grad.split((3, 1))[rank], recomputed=True)
            assert norm_gate.norm_gate.call_count == norm_gate.norm_gate_backward.call_count == (rank == 0)
        torch.save(found, f'{folder}/{rank}.pt')
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != 'cpu', reason='gloo gathers on a CPU')
def test_synchronized(tmp_path) -> None:
    """Two processes with a part of a batch each, one of them without the kernels, against one with the whole batch."""
    plain, me = pair()
    x, grad = torch.randn(2, 4, 14, 7, 5)
    torch.save((me, x, grad), tmp_path / 'given.pt')
    torch.multiprocessing.spawn(_synchronized, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1)]
    for name, expected in everything(plain, x, grad, recomputed=False).items():
        first, second = (part[name] for part in parts)
        if name in ('output', 'input'):
            found = torch.cat((first, second))
        else:
            found = first if name.startswith('buffer') else first + second
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=with_name(name))

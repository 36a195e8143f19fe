"""The units against their formula, and in all ways in which PyTorch runs a module."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn

from timm_atac import ATAC, LocalSE, NiN, SEActivation
from timm_atac.units.atac import get_rd_channels, init_weight_

UNITS = [ATAC, SEActivation, NiN, LocalSE]
# Odd and prime, so that a transposed or flattened axis cannot fit by accident.
SHAPE = (3, 14, 7, 5)


def make(unit, channels: int = 14, **kwargs) -> Any:
    """A unit whose norms are not the identity."""
    module = unit(channels, **kwargs)
    for norm in (module.bn1, module.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module


def reference(unit: Any, x: torch.Tensor) -> torch.Tensor:
    """The definition in elementary operations, inference statistics."""

    def norm(bn, v):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (v - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]

    pooled = x.mean((2, 3), keepdim=True) if isinstance(unit, SEActivation) else x
    hidden = norm(unit.bn1, torch.einsum('oi,bihw->bohw', unit.conv1.weight[:, :, 0, 0], pooled)).clamp(min=0)
    out = norm(unit.bn2, torch.einsum('oi,bihw->bohw', unit.conv2.weight[:, :, 0, 0], hidden))
    return out if isinstance(unit, NiN) else x / (1 + torch.exp(-out))


@pytest.mark.parametrize('unit', UNITS)
def test_formula(unit) -> None:
    module = make(unit).double().eval()
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(module(x), reference(module, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('training', [True, False])
def test_input_is_never_changed(unit, training) -> None:
    module = make(unit, inplace=True).train(training)
    x = torch.randn(SHAPE)
    before = x.clone()
    y = module(x)
    assert y.shape == x.shape
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


def test_parameters() -> None:
    assert list(dict(ATAC(16).named_parameters())) == [
        'conv1.weight',
        'bn1.weight',
        'bn1.bias',
        'conv2.weight',
        'bn2.weight',
        'bn2.bias',
    ]
    counts = {unit: sum(p.numel() for p in unit(16).parameters()) for unit in UNITS}
    assert set(counts.values()) == {2 * 16 * 16 // 2 + 2 * 16 * 3 // 2}


@pytest.mark.parametrize(
    'channels, rd_ratio, expected',
    [
        (64, 0.5, 32),
        (1, 0.5, 1),
        (3, 0.5, 1),
        (7, 0.5, 3),
        (64, 1, 64),
        (64, 1 / 3, 21),
        (98, 1 / 49, 2),
        (5, 0.01, 1),
    ],
)
def test_rd_channels(channels, rd_ratio, expected) -> None:
    assert get_rd_channels(channels, rd_ratio) == expected
    assert ATAC(channels, rd_ratio).conv1.out_channels == expected


@pytest.mark.parametrize('channels', [0, -4, 2.5, '64'])
def test_wrong_channels(channels) -> None:
    with pytest.raises(ValueError, match=f'channels={channels!r}: expected an integer >= 1'):
        ATAC(channels)


@pytest.mark.parametrize('rd_ratio', [0, -0.5, 2, 1.01, math.nan, math.inf, '0.5', None])
def test_wrong_rd_ratio(rd_ratio) -> None:
    with pytest.raises(ValueError, match=rf'rd_ratio={rd_ratio!r}: expected a number in \(0, 1\]'):
        ATAC(64, rd_ratio)


def test_options() -> None:
    unit = ATAC(8, act_layer=None, norm_layer=None, gate_layer='hard_sigmoid')
    assert [name for name, _ in unit.named_parameters()] == ['conv1.weight', 'conv2.weight']
    x = torch.randn(2, 8, 3, 3)
    out = unit.conv2(unit.conv1(x))
    torch.testing.assert_close(unit(x), x * (out / 6 + 0.5).clamp(0, 1))
    assert isinstance(ATAC(64, norm_layer='groupnorm').bn1, nn.GroupNorm)
    assert isinstance(ATAC(8, act_layer='silu').act, nn.SiLU)


def test_init_is_the_authors() -> None:
    weight = torch.empty(200, 100, 3, 3)
    init_weight_(weight)
    expected = math.sqrt(2 / (1 + 0.25**2) / ((100 + 200) * 9 / 2))  # MXNet's MSRAPrelu(factor_type='avg', slope=0.25)
    assert weight.std().item() == pytest.approx(expected, rel=0.02)
    assert weight.mean().abs().item() < 0.01 * expected


def test_seactivation_batch_of_one() -> None:
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        SEActivation(8)(torch.randn(1, 8, 5, 5))


@pytest.mark.parametrize('unit', UNITS)
def test_batch_of_one_in_eval(unit) -> None:
    module = make(unit).eval()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(module(x[:1]), module(x)[:1])


@pytest.mark.parametrize('unit', UNITS)
def test_double_backward(unit) -> None:
    module = make(unit, 4, rd_ratio=0.75).double()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    assert torch.autograd.gradgradcheck(module, (x,))


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(unit, dtype) -> None:
    module = make(unit)
    x = torch.randn(SHAPE, requires_grad=True)
    expected = module(x)
    with torch.autocast('cpu', dtype):
        y = module(x)
        low = module(x.to(dtype))
    assert low.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *module.parameters()))


@pytest.mark.parametrize('unit', UNITS)
def test_channels_last(unit) -> None:
    module = make(unit).eval()
    x = torch.randn(SHAPE)
    y = module.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, module(x))


@pytest.mark.parametrize('unit', UNITS)
def test_not_contiguous(unit) -> None:
    module = make(unit).eval()
    x = torch.randn(5, 14, 3, 7).transpose(0, 2)
    torch.testing.assert_close(module(x), module(x.contiguous()))


@pytest.mark.slow
@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('training', [True, False])
def test_compile_without_graph_break(unit, training) -> None:
    module = make(unit).train(training)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend='aot_eager')
    x = torch.randn(SHAPE)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize('unit', UNITS)
def test_export(unit) -> None:
    module = make(unit).eval()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


@pytest.mark.parametrize('unit', UNITS)
def test_torchscript(unit) -> None:
    module = make(unit).eval()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


@pytest.mark.parametrize('unit', UNITS)
def test_fx(unit) -> None:
    module = make(unit).eval()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # the exporter's own
@pytest.mark.parametrize('unit', UNITS)
def test_onnx(unit, run_onnx) -> None:
    module = make(unit).eval()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(run_onnx(module, x), module(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('unit', UNITS)
def test_meta(unit) -> None:
    module = unit(14, device='meta', dtype=torch.bfloat16)
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floating} == {('meta', torch.bfloat16)}
    assert module(torch.empty(SHAPE, device='meta', dtype=torch.bfloat16)).shape == SHAPE


@pytest.mark.parametrize('unit', UNITS)
def test_sync_batchnorm_conversion(unit) -> None:
    module = make(unit).eval()
    x = torch.randn(SHAPE)
    expected = module(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    assert isinstance(converted.bn1, nn.SyncBatchNorm)
    assert isinstance(converted.bn2, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected)


def test_partial_keeps_its_options() -> None:
    assert partial(ATAC, rd_ratio=0.25)(16, inplace=True).conv1.out_channels == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_gpu(unit, dtype, tolerance) -> None:
    module = make(unit).eval()
    x = torch.randn(SHAPE)
    with torch.autocast('cuda', dtype, enabled=dtype is not torch.float32):
        y = copy.deepcopy(module).cuda()(x.cuda())
    torch.testing.assert_close(y.float().cpu(), module(x), rtol=tolerance, atol=tolerance)

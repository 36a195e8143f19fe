"""The Triton kernel for inference against its formula in float64, on a GPU or interpreted."""

from typing import Any
from unittest import mock

import pytest
import timm
import torch
from atac_me import pair
from fused_models import images, with_random_norms
from kernel_units import DEVICE, ERRORS, LAYOUTS, error, exact, maps, parameters, poisoned, skip_without_kernels, spied

from timm_atac import fuse
from timm_atac.inference.fuse import FusedATAC
from timm_atac.kernels import atac, norm_gate
from timm_atac.kernels.atac import Tile

skip_without_kernels()
pytestmark = pytest.mark.usefixtures('kernels_as_before')

SHAPES = [(16, 8), (3, 1), (24, 12), (70, 35), (20, 20)]  # channels and hidden ones
PLACES = [(2, 7, 5), (1, 1, 1), (3, 9, 8)]


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
    """As under autocast: the result is not rounded to half precision."""
    (x,) = maps(1, 24, (2, 7, 5), 'channels_last', torch.float32)
    weights = parameters(24, 12, dtype)
    y = atac.atac(x, *weights)
    assert y.dtype == torch.float32
    assert error(y, exact(atac.formula, x, *weights)) < ERRORS[dtype]


@pytest.mark.parametrize('tile', [Tile(16, 16, 16, 16, 4), Tile(32, 16, 16, 32, 4), Tile(64, 64, 64, 64, 4)])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_atac_by_tiles(tile, layout) -> None:
    """Tiles with fewer hidden channels than there are, and tiles that the map fills only partly."""
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


def test_weights_that_are_not_contiguous() -> None:
    weight1, bias1, weight2, bias2 = parameters(24, 12, torch.float32)
    (x,) = maps(1, 24, (2, 7, 5), 'channels_last', torch.float32)
    found = atac.atac(x, weight1.t().contiguous().t(), bias1.repeat(2).view(2, -1)[1], weight2, bias2[::1])
    assert torch.equal(found, atac.atac(x, weight1, bias1, weight2, bias2))


def test_offsets_of_more_than_32_bits() -> None:
    """The offset of the last position of a map of more than 2 ** 31 values."""
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


@pytest.mark.parametrize('layout', LAYOUTS)
def test_fused_network(layout) -> None:
    model = with_random_norms(timm.create_model('atac_resnet8_cifar'), dtype=torch.float32).to(DEVICE)
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
    """In every layout, with and without autocast."""
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
    """For strides, types and changed parts that the kernel does not support, the two products run."""
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


def test_precision_of_float32(monkeypatch) -> None:
    """The precision is that of convolutions."""
    for allowed, expected in ((True, 'tf32'), (False, 'ieee')):
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', allowed)
        with mock.patch.object(atac, 'run_kernel') as run:
            atac.atac(*maps(1, 16, (1, 2, 2), 'contiguous', torch.float32), *parameters(16, 8, torch.float32))
        assert run.call_args.kwargs['PRECISION'] == expected


def test_types_that_stay_as_they_are() -> None:
    """Float64 uses the formula. For types that do not match, PyTorch raises."""
    x = torch.randn(2, 14, 3, 3, dtype=torch.float64, device=DEVICE)
    weights = [w.double() for w in parameters(14, 7, torch.float32)]
    torch.testing.assert_close(atac.atac(x, *weights), atac.formula(x, *weights), rtol=1e-12, atol=1e-12)
    y = norm_gate.norm_gate(x.half(), x.bfloat16(), *(torch.ones(14, device=DEVICE) for _ in range(4)))
    assert y.dtype == torch.float32
    unit: Any = fuse(pair()[0], example_input=torch.randn(2, 14, 3, 3), kernel=True).to(DEVICE, torch.bfloat16)
    with spied(atac, 'atac'), pytest.raises(RuntimeError):
        unit(x.float())

"""A linear layer with bias and ReLU, against float64."""

import pytest
import torch

from timm_atac.kernels import linear as module
from timm_atac.kernels.linear import linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize('rows', [0, 1, 7, 64])
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('dtype', TOLERANCE)
@torch.inference_mode()
def test_agrees_with_float64(dtype: torch.dtype, relu: bool, rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 20), (10, 20), (10,)))
    expected = x.double() @ weight.double().t() + bias.double()
    y = linear(x, weight, bias, relu)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), expected.relu() if relu else expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize('relu', [False, True])
@torch.inference_mode()
def test_without_onednn(relu: bool, monkeypatch) -> None:
    """A processor for which oneDNN has no half precision gets the same values."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((7, 20), (10, 20), (10,)))
    first = linear(x, weight, bias, relu)
    monkeypatch.setattr(module, '_has_onednn', lambda dtype: False)
    torch.testing.assert_close(linear(x, weight, bias, relu), first, atol=3e-2, rtol=3e-2)

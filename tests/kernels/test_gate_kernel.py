"""timm_atac/kernels/gate.py"""

import pytest
import torch

from timm_atac.kernels.gate import gate_


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gate(dtype) -> None:
    """All sizes of z, also infinite ones, with other strides than x."""
    ends = [
        -torch.inf,
        -1e4,
        -100,
        -88.5,
        -20,
        -1e-3,
        0,
        1,
        11,
        17,
        49.75,
        50,
        50.25,
        89,
        710,
        1e4,
        torch.inf,
        torch.nan,
    ]
    z = torch.tensor(ends, dtype=dtype).repeat(7, 1).t()
    x = torch.randn(z.shape).to(dtype)
    expected = x.double() * z.double().sigmoid()
    out = gate_(x, z)
    assert out is z
    torch.testing.assert_close(
        out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny, equal_nan=True
    )

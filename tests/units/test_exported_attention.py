"""timm_atac/units/exported_attention.py: the forms for export compute what the other forms do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from timm_atac.models.fa_resnet import MixedConv2d
from timm_atac.units.exported_attention import (
    CeilAvgPool2d,
    CeilMaxPool2d,
    attention_by_neighbours,
    attention_in_unfolded_tiles,
    convolution_of_mixtures,
)
from timm_atac.units.local_attention import local_attention, tile_attention

CLOSE: Any = dict(rtol=1e-12, atol=1e-12)


def randn(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize(
    ('shape', 'heads', 'window'),
    [((2, 8, 1, 1), 2, 7), ((1, 4, 3, 5), 1, 7), ((1, 12, 9, 15), 3, 5), ((2, 8, 16, 2), 2, 3)],
)
def test_attention_by_neighbours(shape, heads, window) -> None:
    q, k, v = randn(3, *shape)
    row_embed, col_embed = randn(2, shape[1] // heads // 2, window)
    expected = local_attention(q, k, v, row_embed, col_embed, heads)
    torch.testing.assert_close(attention_by_neighbours(q, k, v, row_embed, col_embed, heads), expected, **CLOSE)


@pytest.mark.parametrize('size', [(8, 12), (13, 10), (7, 5), (3, 1)])
def test_attention_in_unfolded_tiles(size) -> None:
    q, k, v = randn(3, 2, 6, *size)
    expected = tile_attention(q, k, v, num_heads=2, tile=4)
    torch.testing.assert_close(attention_in_unfolded_tiles(q, k, v, 2, 4), expected, **CLOSE)


@pytest.mark.parametrize('size', [(8, 4), (6, 9), (1, 3)])
def test_convolution_of_mixtures(size) -> None:
    conv = MixedConv2d(3, 5, tile=4, mixtures=3, embed_dim=2).double()
    share = ((conv.row_embed + conv.col_embed) @ conv.mix_embed).softmax(dim=-1)
    x = randn(2, 3, *size)
    torch.testing.assert_close(convolution_of_mixtures(x, conv.weight, share), conv(x), **CLOSE)


@pytest.mark.parametrize('size', [(8, 4), (6, 9), (1, 3), (7, 11)])
def test_pools(size, monkeypatch) -> None:
    x = randn(2, 3, *size)
    pools = [
        (CeilMaxPool2d(4), F.max_pool2d(x, 4, ceil_mode=True)),
        (CeilAvgPool2d(), F.avg_pool2d(x, 2, ceil_mode=True)),
    ]
    for dynamic in (False, True):
        monkeypatch.setattr('timm_atac.units.exported_attention.is_dynamic', lambda x, dynamic=dynamic: dynamic)
        for pool, expected in pools:
            torch.testing.assert_close(pool(x), expected, **CLOSE)

"""timm_atac/units/local_attention.py: against the definition, position by position."""

import itertools
from typing import cast

import local_attention as benchmark
import pytest
import torch
from measuring.timing import bytes_kept

from timm_atac.units.local_attention import local_attention, tile_attention

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# (B, C, H, W), heads, window: maps smaller than a tile, of its size, larger with a remainder, larger than the window
CASES = [
    ((2, 8, 1, 1), 2, 7),
    ((1, 4, 3, 5), 1, 7),
    ((2, 8, 7, 7), 2, 7),
    ((1, 12, 9, 15), 3, 5),
    ((2, 8, 16, 2), 2, 3),
]


def inputs(shape: tuple[int, ...], heads: int, window: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Queries, keys, values, embeddings of rows and columns."""
    torch.manual_seed(0)
    embedding = (shape[1] // heads // 2, window)
    sizes = [shape, shape, shape, embedding, embedding]
    return cast(Inputs, tuple(torch.randn(size, dtype=dtype).requires_grad_() for size in sizes))


def attend(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """softmax(q k) v of one query (B, heads, D) over keys (B, heads, D)."""
    shares = torch.stack([(q * k).sum(2) for k in keys]).softmax(0)
    return torch.stack([share.unsqueeze(2) * v for share, v in zip(shares, values, strict=True)]).sum(0)


def by_definition(q, k, v, row_embed, col_embed, heads: int) -> torch.Tensor:
    batch, channels, height, width = q.shape
    window = row_embed.shape[1]
    q, k, v = (t.view(batch, heads, channels // heads, height, width) for t in (q, k, v))
    reach = range(-(window // 2), window // 2 + 1)
    out = torch.zeros_like(q)
    for i, j in itertools.product(range(height), range(width)):
        near = [(a, b) for a, b in itertools.product(reach, reach) if 0 <= i + a < height and 0 <= j + b < width]
        embedded = [torch.cat([row_embed[:, a + window // 2], col_embed[:, b + window // 2]]) for a, b in near]
        keys = [k[..., i + a, j + b] + r for (a, b), r in zip(near, embedded, strict=True)]
        out[..., i, j] = attend(q[..., i, j], keys, [v[..., i + a, j + b] for a, b in near])
    return out.view(batch, channels, height, width)


@pytest.mark.slow
@pytest.mark.parametrize(('shape', 'heads', 'window'), CASES)
@pytest.mark.parametrize('tile', [7, 4])
def test_definition(shape, heads, window, tile) -> None:
    tensors = inputs(shape, heads, window)
    expected = by_definition(*tensors, heads)
    found = local_attention(*tensors, num_heads=heads, tile=tile)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, grad)
    for one, other in zip(torch.autograd.grad(found, tensors, grad), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
def test_other_forms_of_the_benchmark() -> None:
    """All forms in benchmarks/local_attention.py compute the same."""
    tensors = inputs((2, 32, 9, 11), benchmark.HEADS, benchmark.WINDOW, torch.float32)
    expected = local_attention(*tensors, num_heads=benchmark.HEADS)
    flex = benchmark.flex(9, 11, torch.device('cpu'), compiled=False)
    for form in (benchmark.unfold, benchmark.unfold_recomputed):
        torch.testing.assert_close(form(*tensors, benchmark.HEADS), expected)
    with torch.no_grad():
        torch.testing.assert_close(flex(*(t.detach() for t in tensors), benchmark.HEADS), expected)


@pytest.mark.parametrize('layout', ['channels_last', 'part of another', 'transposed'])
def test_strides(layout) -> None:
    q, k, v, row_embed, col_embed = inputs((2, 8, 9, 5), 2, 7)
    expected = local_attention(q, k, v, row_embed, col_embed, num_heads=2)
    strided = []
    for t in (q, k, v):
        if layout == 'channels_last':
            strided.append(t.contiguous(memory_format=torch.channels_last))
        elif layout == 'transposed':
            strided.append(t.transpose(2, 3).contiguous().transpose(2, 3))
        else:
            strided.append(torch.cat([t, t, t], dim=1).chunk(3, dim=1)[1])
    assert not all(t.is_contiguous() for t in strided)
    q, k, v = strided
    torch.testing.assert_close(local_attention(q, k, v, row_embed, col_embed, num_heads=2), expected)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_dtypes(dtype, tolerance) -> None:
    """A key outside the window has no weight in any dtype."""
    tensors = inputs((2, 8, 9, 15), 2, 7)
    expected = local_attention(*tensors, num_heads=2)
    found = local_attention(*cast(Inputs, [t.to(dtype) for t in tensors]), num_heads=2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('size', [1e5, -1e5])
def test_large_logits(dtype, size) -> None:
    """Keys outside the window and padding get no weight, also if their logits are large or those of others low."""
    q, k = torch.full((1, 4, 9, 9), 10.0, dtype=dtype), torch.zeros(1, 4, 9, 9, dtype=dtype)
    k[..., :3] = size / 40
    v = torch.ones_like(k)
    v[..., :3] = 2
    embedding = torch.zeros(2, 3, dtype=dtype)
    found = local_attention(q, k, v, embedding, embedding, num_heads=1)
    expected = torch.ones_like(v)
    if size > 0:
        expected[..., :4] = 2  # columns whose window has one of the three
    else:
        expected[..., :2] = 2  # columns whose window has no others
    torch.testing.assert_close(found, expected)


def test_nothing_of_the_neighbourhoods_is_kept() -> None:
    tensors = inputs((2, 16, 28, 28), 2, 7, torch.float32)
    owner = torch.nn.ParameterList(tensors)
    assert bytes_kept(lambda: local_attention(*tensors, num_heads=2).sum(), torch.nn.Module()) == sum(
        t.numel() * t.element_size() for t in tensors
    )
    assert bytes_kept(lambda: local_attention(*tensors, num_heads=2).sum(), owner) == 0


@pytest.mark.slow
def test_compiled_and_scripted() -> None:
    tensors = inputs((1, 8, 9, 5), 2, 7, torch.float32)
    expected = local_attention(*tensors, num_heads=2)
    torch.testing.assert_close(torch.jit.script(local_attention)(*tensors, num_heads=2), expected)
    compiled = torch.compile(local_attention, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(*tensors, num_heads=2), expected)


@pytest.mark.parametrize('size', [(8, 12), (7, 5), (1, 4)])
def test_tiles(size) -> None:
    q, k, v, *_ = inputs((2, 6, *size), 2, 7)
    height, width = size
    heads = [t.view(2, 2, 3, height, width) for t in (q, k, v)]
    expected = torch.zeros_like(heads[0])
    for i, j in itertools.product(range(height), range(width)):
        rows, cols = (range(at - at % 4, min(at - at % 4 + 4, side)) for at, side in ((i, height), (j, width)))
        keys, values = ([t[..., a, b] for a in rows for b in cols] for t in heads[1:])
        expected[..., i, j] = attend(heads[0][..., i, j], keys, values)
    found = tile_attention(q, k, v, num_heads=2, tile=4)
    torch.testing.assert_close(found, expected.view_as(q), rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))

"""timm_atac/models/aa_resnet.py: the layer against its formula, the network against the paper's figures."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import wild

import timm_atac
from timm_atac.models.aa_resnet import AAResNet, AugmentedConv2d


def attention(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute the attention by its definition, the paper's equations 1 to 4, with loops."""
    attn = layer.attn
    batch, _, height, width = x.shape
    heads, dim, dim_v = attn.num_heads, attn.dim_head_qk, attn.dim_head_v
    qkv = torch.einsum('oi,bihw->bohw', attn.qkv.weight[..., 0, 0], x)
    q, k, v = qkv.split([heads * dim, heads * dim, heads * dim_v], dim=1)
    out = torch.zeros(batch, heads * dim_v, height, width, dtype=x.dtype)
    places = [(i, j) for i in range(height) for j in range(width)]
    for head in range(heads):
        channels, channels_v = slice(head * dim, (head + 1) * dim), slice(head * dim_v, (head + 1) * dim_v)
        for i, j in places:
            query = q[:, channels, i, j]
            logits = []
            for a, b in places:
                row, col = attn.pos_embed.height_rel[a - i + height - 1], attn.pos_embed.width_rel[b - j + width - 1]
                logits.append((query * (k[:, channels, a, b] + row + col)).sum(1) / dim**0.5)
            shares = torch.stack(logits).softmax(0)
            out[:, channels_v, i, j] = sum(
                s[:, None] * v[:, channels_v, a, b] for s, (a, b) in zip(shares, places, strict=True)
            )
    return torch.einsum('oi,bihw->bohw', layer.proj.weight[..., 0, 0], out)


@pytest.mark.parametrize(('stride', 'pooled'), [(1, False), (2, False), (1, True), (2, True)])
def test_formula(stride, pooled) -> None:
    layer: Any = AugmentedConv2d(
        6, 10, feat_size=(5, 3), stride=stride, num_heads=2, v_ratio=0.4, min_dim_head=3, pooled=pooled
    ).double()
    assert layer.attn.dim_head_qk == 3 and layer.attn.dim_out_v == 4
    x = torch.randn(2, 6, 5 * stride - 1 * (stride == 2), 3 * stride, dtype=torch.float64)
    seen = x
    for _ in range((stride == 2) + pooled):
        seen = F.avg_pool2d(seen, 3, 2, padding=1, count_include_pad=False)
    attended = attention(layer, seen)
    if pooled:
        attended = F.interpolate(attended, size=(5, 3), mode='bilinear', align_corners=False)
    expected = torch.cat([F.conv2d(x, layer.conv.weight, stride=stride, padding=1), attended], dim=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_parameters_part_by_part() -> None:
    """The paper has 25.8 M. Only the 3x3 convolutions differ from ResNet-50; their parameters are counted here."""
    model = timm.create_model('aa_resnet50', device='meta')
    changed = 0
    for blocks, width, value, attended in ((4, 128, 16, 14), (6, 256, 24, 14), (3, 512, 48, 7)):
        projection = width * (2 * 160 + value) + value * value
        embeddings = 2 * (2 * attended - 1) * 20
        changed += blocks * (projection + embeddings - 9 * width * value)
    params = sum(p.numel() for p in model.parameters())
    assert params == 25_557_032 + changed
    assert params / 1e6 == pytest.approx(25.8, rel=0.01)


@pytest.mark.slow
def test_placement() -> None:
    model: Any = timm.create_model('aa_resnet50', device='meta')
    found = {name: module for name, module in model.named_modules() if isinstance(module, AugmentedConv2d)}
    assert list(found) == [f'layer{s}.{b}.conv2' for s, depth in ((2, 4), (3, 6), (4, 3)) for b in range(depth)]
    for name, layer in found.items():
        embed = layer.attn.pos_embed
        assert (embed.height, embed.width) == ((7, 7) if name.startswith('layer4') else (14, 14))
        assert (layer.attn.num_heads, layer.attn.dim_head_qk) == (8, 20)
    other: Any = timm.create_model('aa_resnet50', aa_stages=(4,), pooled_stages=(), output_stride=16, device='meta')
    assert [name for name, module in other.named_modules() if isinstance(module, AugmentedConv2d)] == [
        f'layer4.{block}.conv2' for block in range(3)
    ]
    assert other.layer4[0].conv2.attn.pos_embed.height == 14


@pytest.mark.slow
def test_another_image_size_is_an_error() -> None:
    model = timm.create_model('aa_resnet50', img_size=96).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)
        with pytest.raises(
            ValueError,
            match=r'AugmentedConv2d is for feature maps of 12 x 12 \(of images of 96 x 96\) and got .*img_size=',
        ):
            model(torch.zeros(1, 3, 224, 96))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r'aa_layer=.*: expected None'):
        timm.create_model('aa_resnet50', aa_layer='blurpool')
    for name in ('aa_stages', 'pooled_stages'):
        for stages in ((5,), (0,), ('2',), 4):
            with pytest.raises(ValueError, match=f'^{name}=.*: expected a tuple of different stage numbers'):
                AAResNet((3, 4, 6, 3), **{name: stages})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='cardinality=32: expected 1'):
        timm.create_model('aa_resnet50', cardinality=32, base_width=4)
    with pytest.raises(ValueError, match='stride=4: expected 1 or 2'):
        AugmentedConv2d(16, 160, (7, 7), stride=4)


@pytest.mark.slow
def test_fused() -> None:
    model = wild('aa_resnet50', img_size=64)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(timm_atac.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)

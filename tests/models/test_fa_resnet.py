"""timm_atac/models/fa_resnet.py: layers against their formulas, the network against the paper's figures."""

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from measuring.timing import bytes_kept, peak_memory
from networks import wild
from timm.layers import set_fused_attn

import timm_atac
from timm_atac.models.fa_resnet import AttentionStem, LocalAttention2d, MixedConv2d
from timm_atac.units.exported_attention import CeilMaxPool2d
from timm_atac.units.local_attention import local_attention, tile_attention


def test_local_attention_of_a_layer() -> None:
    layer = LocalAttention2d(6, 8, stride=2, num_heads=2, window=5).double()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    q, k, v = torch.einsum('oi,bihw->bohw', layer.qkv.weight[..., 0, 0], x).chunk(3, dim=1)
    attended = local_attention(q, k, v, layer.row_embed, layer.col_embed, num_heads=2)
    found = layer(x)
    assert found.shape == (2, 8, 4, 3)
    torch.testing.assert_close(found[..., 0, 0], attended[..., :2, :2].mean((2, 3)))
    torch.testing.assert_close(found[..., 3, 2], attended[..., 6, 4])  # the average at the border has no padding


def test_values_of_the_stem() -> None:
    conv: Any = MixedConv2d(3, 5, tile=4, mixtures=3, embed_dim=2).double()
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    weights = conv.weight.view(3, 5, 3)
    expected = torch.empty(2, 5, 6, 9, dtype=torch.float64)
    for i, j in itertools.product(range(6), range(9)):
        place = conv.row_embed[i % 4, 0] + conv.col_embed[0, j % 4]
        shares = (place @ conv.mix_embed).exp() / (place @ conv.mix_embed).exp().sum()
        expected[..., i, j] = (
            x[..., i, j] @ sum(share * weight for share, weight in zip(shares, weights, strict=True)).T
        )
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


def test_stem() -> None:
    stem = AttentionStem(3, 16, num_heads=2, tile=4).double()
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    q, k = F.conv2d(x, stem.qk.weight).chunk(2, dim=1)
    torch.testing.assert_close(stem(x), tile_attention(q, k, stem.value(x), 2, 4))


def test_parameters_part_by_part() -> None:
    """The paper has 18.0 M: queries, keys and values of all channels in place of each 3x3 convolution."""
    model = timm.create_model('fa_resnet50', device='meta')
    widths = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    convolutions = sum(9 * width * width for width in widths) + 3 * 64 * 49
    attention = sum(3 * width * width + 7 * width // 8 for width in widths)
    stem = 3 * 64 * (2 + 4) + 4 * 8 * 3
    params = sum(p.numel() for p in model.parameters())
    assert params == 25_557_032 - convolutions + attention + stem
    assert params / 1e6 == pytest.approx(18.0, rel=0.01)


def test_placement() -> None:
    model: Any = timm.create_model('fa_resnet50', device='meta')
    assert isinstance(model.conv1, AttentionStem) and model.maxpool.kernel_size == 4
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for number, block in enumerate(stage):
            assert isinstance(block.conv2, LocalAttention2d)
            assert isinstance(block.conv2.pool, nn.AvgPool2d) == (number == 0 and stage is not model.layer1)
    assert not any(max(m.kernel_size) > 1 for m in model.modules() if isinstance(m, nn.Conv2d))  # type: ignore[type-var]
    other: Any = timm.create_model('fa_resnet50', attention_stem=False, stem_type='deep', device='meta')
    assert not any(isinstance(module, AttentionStem) for module in other.modules())


def test_logits_start_of_order_one() -> None:
    model: Any = timm.create_model('fa_resnet50')
    for layer in (model.layer1[0].conv2, model.layer4[2].conv2):
        x = torch.randn(2, layer.qkv.in_channels, 7, 7).relu()
        q, k, _ = layer.qkv(x).view(2, 3, 8, -1, 7, 7).unbind(1)
        assert 0.3 < (q * k).sum(2).std().item() < 3


@pytest.mark.slow
@pytest.mark.parametrize('size', [(33, 50), (4, 1)])
def test_any_image_size(size) -> None:
    model, x = wild('fa_resnet50', layers=(1, 1, 1, 1)), torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = model(x)
        assert expected.isfinite().all()
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model.to(memory_format=torch.channels_last)(last), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        traced = torch.jit.trace(model, torch.randn(2, 3, 64, 32))
        torch.testing.assert_close(traced(x), expected)


@pytest.mark.slow
def test_a_training_step_at_224_fits_the_card() -> None:
    """A training step of 32 images in float32 fits 16 GB: 32 times the memory of one image."""
    model = timm.create_model('fa_resnet50')
    x = torch.randn(1, 3, 224, 224)
    kept = bytes_kept(lambda: model(x), model)
    peak = peak_memory(lambda: model(x).sum().backward(), torch.device('cpu'))
    assert kept < peak < 16e9 / 32
    unfolded = 49 * 2 * 64 * 56 * 56 * 4  # keys and values of the neighbours, of one of the 16 layers
    assert kept < 3 * unfolded


@pytest.mark.slow
def test_gradients_with_autocast_and_checkpointing() -> None:
    model = wild('fa_resnet50', num_classes=5)
    x = torch.randn(2, 3, 64, 64)  # the last maps have several positions
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(x).float().square().sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*grads, strict=True):
        assert one.isfinite().all() and one.any()
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize('fused', [False, True])
def test_second_derivatives(fused) -> None:
    """A gradient penalty works; with timm's fused attention off, if the fused kernels have no second derivative."""
    set_fused_attn(fused)
    try:
        stem = AttentionStem(3, 16, num_heads=2).double()
    finally:
        set_fused_attn(True)
    layer = LocalAttention2d(16, 16, num_heads=2, window=3).double()
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(stem(x)).sum(), x, create_graph=True)
    if not fused:
        grad.square().sum().backward()
        assert torch.autograd.gradgradcheck(lambda x: layer(stem(x)), x, atol=1e-4)
    other = copy.deepcopy(stem)
    other.fused_attn = not fused
    torch.testing.assert_close(stem(x), other(x))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'output_stride': 16}, 'dilation=2: expected stride 1 or 2, and dilation 1. .*output_stride=32'),
        ({'stem_type': 'deep'}, "{'stem_type': 'deep'} together with attention_stem=True"),
        ({'replace_stem_pool': True}, "{'replace_stem_pool': True} together with attention_stem=True"),
        ({'aa_layer': 'blurpool'}, "{'aa_layer': 'blurpool'} together with attention_stem=True"),
        ({'cardinality': 32, 'base_width': 4}, 'cardinality=32: expected 1'),
        ({'base_width': 9}, 'out_channels=9, num_heads=8: expected out_channels a multiple of 16'),
    ],
)
def test_errors(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model('fa_resnet50', **kwargs)
    with pytest.raises(ValueError, match='window=4: expected an odd number'):
        LocalAttention2d(16, 16, window=4)


@pytest.mark.slow
def test_fused() -> None:
    model = wild('fa_resnet50')
    x = torch.randn(2, 3, 33, 64)
    with torch.no_grad():
        torch.testing.assert_close(timm_atac.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_exported() -> None:
    model = wild('fa_resnet50', num_classes=5, layers=(1, 1, 1, 1))
    x = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (x,), dynamic_shapes=[{0: torch.export.Dim('batch', max=512)}]).module()
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(exported(x), model(x))


def _three_layers() -> nn.Module:
    """Layers whose export takes a few seconds. The export of a network with dynamic sizes takes minutes."""
    layers = AttentionStem(3, 16, num_heads=2), CeilMaxPool2d(4), LocalAttention2d(16, 16, stride=2, num_heads=2)
    return nn.Sequential(*layers).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # warnings of the exporters
@pytest.mark.parametrize(
    ('route', 'of_network'),
    [('torch.export', False), ('dynamo=False', False), ('dynamo=True', False), ('dynamo=False', True)],
)
def test_exported_with_dynamic_sizes(route, of_network, tmp_path) -> None:
    model, x = wild('fa_resnet50', layers=(1, 1, 1, 1)) if of_network else _three_layers(), torch.randn(2, 3, 40, 64)
    path = str(tmp_path / 'model.onnx')
    height, width = (torch.export.Dim(name, min=9, max=512) for name in ('height', 'width'))
    sizes: Any = {'dynamic_shapes': ({2: height, 3: width},)}
    run: Any
    if route == 'torch.export':
        run = torch.export.export(model, (x,), strict=False, **sizes).module()
    else:
        onnxruntime = pytest.importorskip('onnxruntime')
        if route == 'dynamo=False':
            sizes = {'dynamic_axes': {'x': {2: 'height', 3: 'width'}}, 'input_names': ['x']}
        torch.onnx.export(model, (x,), path, dynamo=route == 'dynamo=True', **sizes)
        session = onnxruntime.InferenceSession(path)

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    for size in ((40, 64), (65, 71), (9, 33)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-4, atol=1e-5)

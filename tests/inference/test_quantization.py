"""PyTorch's int8 quantisers take fused networks whose norms stay alone. They fail, or are wrong, without `fuse`."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from fused_models import norms, scale

from timm_atac import fuse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
]

NETWORKS: list[tuple[str, dict[str, Any], float, float]] = [  # largest differences of FX and of PT2E
    ('resnet8_cifar', {}, 0.2, 0.1),
    ('atac_resnet8_cifar', {}, 0.4, 0.25),
    ('resnetv2_50', {'layers': (1, 1, 1, 1), 'norm_layer': 'batchnorm2d'}, 0.2, 0.15),
]


def trained_a_few_steps(name: str, **options: Any) -> Any:
    model = timm.create_model(name, num_classes=10, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.randint(0, 10, (16,))).backward()
        optimizer.step()
    return model.eval()


def check(model: Any, quantized: Any, limit: float) -> None:
    x = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        assert (quantized(x) - expected).abs().max() < limit * scale(expected)


@pytest.mark.parametrize('name, options, limit', [(name, options, fx) for name, options, fx, _ in NETWORKS])
def test_fx(name, options, limit) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    model = trained_a_few_steps(name, **options)
    x = torch.randn(16, 3, 32, 32)
    fused = fuse(model, example_input=x)
    assert not norms(fused)
    prepared: Any = quantize_fx.prepare_fx(copy.deepcopy(fused), get_default_qconfig_mapping('x86'), (x,))
    with torch.no_grad():
        for _ in range(4):
            prepared(torch.randn(16, 3, 32, 32))
    quantized: Any = quantize_fx.convert_fx(prepared)
    assert any('quantized' in type(m).__module__ for m in quantized.modules())
    check(model, quantized, limit)


@pytest.mark.parametrize('name, options, limit', [(name, options, pt2e) for name, options, _, pt2e in NETWORKS])
def test_pt2e(name, options, limit) -> None:
    quantize: Any = pytest.importorskip('torchao.quantization.pt2e.quantize_pt2e')
    x86: Any = pytest.importorskip('torchao.quantization.pt2e.quantizer.x86_inductor_quantizer')
    model = trained_a_few_steps(name, **options)
    x = torch.randn(16, 3, 32, 32)
    exported: Any = torch.export.export(fuse(model, example_input=x), (x,)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize.prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for _ in range(4):
            prepared(torch.randn(16, 3, 32, 32))
    quantized = quantize.convert_pt2e(prepared)
    assert any('quantize_per' in str(node.target) for node in quantized.graph.nodes)
    check(model, quantized, limit)

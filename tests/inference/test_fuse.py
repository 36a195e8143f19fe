"""`fuse` returns a model of the same function, in every way to run it. It has no state dict."""

import copy
from collections import Counter
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from fused_models import images, norms, scale, with_random_norms
from timm.layers import convert_sync_batchnorm
from timm.models import save_for_hf
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel

from timm_atac import ATAC, ATACMe, LocalSE, fuse, replace_activations
from timm_atac.gates.pictures import gate_maps
from timm_atac.inference.fuse import FusedATAC
from timm_atac.inference.norms import ScaleShift


def units(model: nn.Module) -> list[FusedATAC]:
    return [m for m in model.modules() if isinstance(m, FusedATAC)]


def alone(model: nn.Module) -> list[ScaleShift]:
    return [m for m in model.modules() if isinstance(m, ScaleShift)]


MODELS: dict[str, tuple[Any, int]] = {  # what creates it, and how many norms are not folded
    'atac_resnet18': (lambda: timm.create_model('atac_resnet18'), 0),
    'atac_resnet50_full': (lambda: timm.create_model('atac_resnet50_full', layers=(1, 1, 1, 1)), 0),
    'atac_resnet8_cifar': (lambda: timm.create_model('atac_resnet8_cifar'), 5),  # behind additions and the stem
    'local_se': (lambda: timm.create_model('resnet8_cifar', attn_layer='local_se'), 5),
    'se_act': (lambda: timm.create_model('resnet8_cifar', act_layer='se_act'), 5),
    'nin': (lambda: timm.create_model('resnet8_cifar', act_layer='nin'), 5),
    'seresnet18': (lambda: timm.create_model('seresnet18'), 0),
    'norm and act': (lambda: timm.create_model('test_efficientnet', act_layer='atac', num_classes=7), 0),
    'tokens': (lambda: timm.create_model('test_vit', act_layer='atac', img_size=32), 0),
    'channels last': (lambda: timm.create_model('test_convnext', act_layer='atac'), 0),
    'replaced': (lambda: replace_activations(timm.create_model('dla46_c')), 0),
    'dense': (lambda: timm.create_model('densenet121', block_config=(2, 2), growth_rate=8), 6),
    'reparameterized by timm': (lambda: timm.create_model('repvgg_a0'), 0),
    'features': (lambda: timm.create_model('atac_resnet18', features_only=True), 0),
    'synchronized': (lambda: convert_sync_batchnorm(timm.create_model('atac_resnet18')), 0),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_same_function(name) -> None:
    create, stay = MODELS[name]
    model: Any = create()
    if name == 'synchronized':
        sync, model = model, timm.create_model('atac_resnet18')
    model = with_random_norms(model)
    if name == 'synchronized':
        sync.load_state_dict(model.state_dict())
        model = sync.double().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model.train())
    assert model.training and not fused.training
    model.eval()
    assert not norms(fused) and len(alone(fused)) == stay
    assert len(units(fused)) == sum(type(m) in (ATACMe, LocalSE) for m in model.modules())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(model).to(memory_format=memory_format)
        given = x.clone()
        with torch.no_grad():
            expected, found = model(x), fused(x)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * scale(expected))
        torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12 * scale(expected))  # with autograd
        assert torch.equal(x, given)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in own for p in fused.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['atac_resnet18', 'atac_resnet8_cifar'])
def test_intermediates(name) -> None:
    model = with_random_norms(timm.create_model(name))
    fused: Any = fuse(model)
    x = images(model)
    for expected, found in zip(model.forward_intermediates(x)[1], fused.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(fused.forward_features(x), model.forward_features(x), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize('unit', [ATAC, ATACMe, LocalSE])
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'act_layer': 'silu'},
        {'act_layer': None},
        {'gate_layer': 'hard_sigmoid'},
        {'norm_layer': None},
        {'norm_layer': 'groupnorm', 'channels': 64},
        {'norm_layer': lambda c, **dd: nn.BatchNorm2d(c, affine=False, **dd)},
        {'input_fmt': 'NHWC'},
        {'input_fmt': 'NLC'},
    ],
)
def test_unit(unit, options) -> None:
    channels = options.get('channels', 14)
    module = unit(**({'channels': channels} | options)).double()
    fmt = options.get('input_fmt', 'NCHW')
    shape = {'NCHW': (3, channels, 7, 5), 'NHWC': (3, 7, 5, channels), 'NLC': (3, 11, channels)}[fmt]
    module(torch.randn(shape, dtype=torch.float64))
    fused = fuse(module.eval(), example_input=torch.zeros(shape, dtype=torch.float64))
    assert isinstance(fused, FusedATAC)
    for x in (torch.randn(shape).double(), torch.randn(shape[::-1]).double().permute(*range(len(shape))[::-1])):
        with torch.no_grad():
            torch.testing.assert_close(fused(x), module(x), rtol=1e-12, atol=1e-12)
        x.requires_grad_()
        grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (module, fused)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-11)


def test_empty_batch_and_one_position() -> None:
    unit = ATAC(6).eval()
    fused = fuse(unit, example_input=torch.zeros(1, 6, 2, 2))
    with torch.no_grad():
        for shape in ((0, 6, 3, 2), (1, 6, 1, 1)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape).to(memory_format=memory_format)
                torch.testing.assert_close(fused(x), unit(x))


def test_wrong_input_is_an_error() -> None:
    fused = fuse(ATAC(6), example_input=torch.zeros(2, 6, 2, 2))
    with torch.no_grad(), pytest.raises(ValueError, match='for 6 channels'):
        fused(torch.zeros(2, 5, 2, 2))
    with torch.no_grad(), pytest.raises(RuntimeError):
        fused(torch.zeros(2, 6, 2, 2).double())
    with pytest.raises(ValueError, match=r'AtacResNet does not run on \(\(2, 7\),\)'):
        fuse(timm.create_model('atac_resnet18'), example_input=torch.zeros(2, 7))


class OwnFormula(ATAC):
    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate(self.bottleneck(x))


def test_subclass_keeps_its_formula() -> None:
    model = with_random_norms(nn.Sequential(nn.Conv2d(3, 6, 1), OwnFormula(6)))
    fused: Any = fuse(model, example_input=images(model))
    assert not norms(fused) and isinstance(fused[1], OwnFormula)
    x = images(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


class Ensemble(nn.Module):
    """Has an attribute `module` like a wrapper, and is none: it computes more than its `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) + self.module(x.flip(3))


def _with_a_hook(model: Any) -> None:
    model.layer4[0].act1.register_forward_hook(lambda module, args, y: y * 2)


def _with_a_forward(model: Any) -> None:
    model.layer4[0].act1.forward = lambda x: x * 2


def _by_lists(model: Any) -> None:
    block = model.layer4[0]
    layers = [block.conv1, block.bn1, block.act1, block.conv2, block.bn2, block.act2, block.downsample]
    block.layers = layers
    model.layer4[0] = Listed(layers)


class Listed(nn.Module):
    """Calls its layers from a plain list. They are also registered."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = layers
        self.named = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv1, bn1, act1, conv2, bn2, act2, downsample = self.layers
        return act2(bn2(conv2(act1(bn1(conv1(x))))) + downsample(x))


@pytest.mark.slow
@pytest.mark.parametrize('change', [_with_a_hook, _with_a_forward, _by_lists])
def test_whatever_was_done_to_a_unit(change) -> None:
    model = with_random_norms(timm.create_model('atac_resnet18'))
    change(model)
    x = images(model)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-12, atol=1e-11)


@pytest.mark.slow
def test_units_in_a_plain_list_are_fused() -> None:
    model = with_random_norms(timm.create_model('atac_resnet18'))
    _by_lists(model)
    fused: Any = fuse(model)
    assert FusedATAC in [type(layer) for layer in fused.layer4[0].layers]


@pytest.mark.slow
def test_features_by_hooks() -> None:
    model = with_random_norms(timm.create_model('resnet18', act_layer='atac', features_only=True, feature_cls='hook'))
    x = images(model)
    expected, found = model(x), fuse(model)(x)
    assert [y.shape for y in found] == [y.shape for y in expected]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.slow
def test_no_wrapper() -> None:
    model = Ensemble(with_random_norms(timm.create_model('atac_resnet8_cifar')))
    x = images(model)
    torch.testing.assert_close(fuse(model, example_input=x)(x), model(x), rtol=1e-12, atol=1e-11)


@pytest.mark.slow
def test_blocks_of_timm_in_float64() -> None:
    """RepViT has methods `fuse`, which return float32 layers for any type. They must not be called."""
    model = with_random_norms(timm.create_model('repvit_m0_9'), size=64)
    x = images(model, 64)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_autocast(memory_format) -> None:
    """The error is at most twice that of the plain model, because folded weights are rounded with their norm."""
    model = with_random_norms(timm.create_model('atac_resnet18'), dtype=torch.float32)
    fused = fuse(model)
    x = images(model).to(memory_format=memory_format)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        errors = [(m(x).double() - exact).abs().mean().item() for m in (model, fused)]
        assert fused(x).dtype == model(x).dtype
    assert errors[1] < 2 * errors[0]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The TorchScript type system:UserWarning')
@pytest.mark.parametrize('name', ['atac_resnet8_cifar'])
def test_exports(name, run_onnx) -> None:
    model = with_random_norms(timm.create_model(name), dtype=torch.float32)
    fused = fuse(model)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    tolerance: dict[str, Any] = {'rtol': 1e-4, 'atol': 1e-5 * scale(expected)}
    exported = torch.export.export(fused, (x,))
    plain = torch.export.export(model, (x,))
    ops = [Counter(str(node.target) for node in program.graph.nodes) for program in (plain, exported)]
    assert sum(ops[1].values()) < 0.7 * sum(ops[0].values())
    assert not ops[1]['aten.batch_norm.default'] and len(alone(fused)) == 5
    compiled: Any = torch.compile(fused, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for run in (
            exported.module(),
            compiled,
            torch.jit.script(fused),
            torch.jit.trace(fused, x, check_tolerance=1e-3),
        ):
            torch.testing.assert_close(run(x), expected, **tolerance)
    torch.testing.assert_close(run_onnx(fused, x), expected, **tolerance)


def test_hooks_on_parts_are_called() -> None:
    fused: Any = fuse(ATAC(6), example_input=torch.zeros(2, 6, 2, 2))
    gates: list[torch.Tensor] = []
    handle = fused.gate.register_forward_hook(lambda module, args, y: gates.append(y.clone()))
    x = torch.randn(2, 6, 2, 2)
    with torch.no_grad():
        y = fused(x)
        handle.remove()
        assert len(gates) == 1
        torch.testing.assert_close(y, x * gates[0])
        torch.testing.assert_close(fused(x), y)


def test_gates_can_be_looked_at() -> None:
    model = with_random_norms(timm.create_model('atac_resnet8_cifar'), dtype=torch.float32)
    x = images(model)
    expected, found = gate_maps(model, x), gate_maps(fuse(model), x)
    assert found.keys() == expected.keys()
    for name, gate in found.items():
        torch.testing.assert_close(gate, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_nothing_to_save_or_load(tmp_path) -> None:
    model: Any = timm.create_model('atac_resnet18')
    fused: Any = fuse(model)
    inside: Any = nn.ModuleDict({'student': fused})
    for owner in (fused, fused.layer1, fused.layer4[0].act1, inside, copy.deepcopy(fused)):
        with pytest.raises(RuntimeError, match=r'fused for inference and has no state dict.*save model.state_dict\(\)'):
            owner.state_dict()
    with pytest.raises(RuntimeError, match='fused for inference and loads no state dict'):
        fused.layer1.load_state_dict(model.layer1.state_dict())
    with pytest.raises(RuntimeError, match='fused for inference and loads no state dict'):
        fused.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match='fused for inference'):
        save_for_hf(fused, tmp_path, safe_serialization=True)
    assert not list(tmp_path.iterdir())
    assert model.state_dict().keys() == timm.create_model('atac_resnet18', device='meta').state_dict().keys()


@pytest.mark.slow
def test_what_is_inside_of_wrappers() -> None:
    model = with_random_norms(timm.create_model('atac_resnet8_cifar'))
    x = images(model)
    wrappers: list[Any] = [
        torch.compile(model, backend='eager'),
        nn.DataParallel(model),
        torch.compile(nn.DataParallel(model), backend='eager'),
        nn.DataParallel(torch.compile(model, backend='eager')),
        AveragedModel(model),
        ModelEmaV2(model),
        ModelEmaV3(model),
    ]
    for wrapped in wrappers:
        fused = fuse(wrapped)
        assert type(fused) is type(model)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-11)


@pytest.mark.slow
def test_fused_twice() -> None:
    model = with_random_norms(timm.create_model('atac_resnet8_cifar'))
    x = images(model)
    torch.testing.assert_close(fuse(fuse(model))(x), model(x), rtol=1e-12, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu(dtype, memory_format) -> None:
    model = with_random_norms(timm.create_model('atac_resnet18'), dtype=torch.float32)
    x = images(model)
    exact = copy.deepcopy(model).double()(x.double())
    model.cuda()
    fused = fuse(model)
    x = x.cuda().to(memory_format=memory_format)
    with torch.no_grad(), torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        errors = [(m(x).cpu().double() - exact).abs().mean().item() for m in (model, fused)]
    assert errors[1] < 2 * errors[0] + 1e-6

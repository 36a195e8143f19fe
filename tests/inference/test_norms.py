"""`FoldedNorm` and `ScaleShift`: in every way to run a model, and an error in training."""

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from fused_models import images, norms, scale, with_random_norms
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNormAct

from timm_atac import ATAC, fuse
from timm_atac.inference.fold_norms import make_scale_shift
from timm_atac.inference.fuse import FusedATAC
from timm_atac.inference.norms import FoldedNorm, ScaleShift

TRAINS = r'fused for inference and cannot train.*eval\(\).*the model that was given to timm_atac.fuse'


def both(dtype: torch.dtype = torch.float32) -> Any:
    """One norm that is folded and one that stays alone, with activations."""
    layers = [nn.Conv2d(3, 4, 3), BatchNormAct2d(4), BatchNormAct2d(4, act_layer=nn.SiLU), nn.Conv2d(4, 2, 3)]
    return with_random_norms(nn.Sequential(*layers), size=8, dtype=dtype)


def fused_both(dtype: torch.dtype = torch.float32) -> tuple[Any, Any, torch.Tensor]:
    model = both(dtype)
    x = images(model, 8)
    fused: Any = fuse(model, example_input=x)
    assert [type(m) for m in fused] == [nn.Conv2d, FoldedNorm, ScaleShift, nn.Conv2d]
    return model, fused, x


def test_training_is_an_error_when_it_runs() -> None:
    _, fused, x = fused_both()
    expected = fused(x)
    with pytest.raises(RuntimeError, match=TRAINS):
        fused.train()(x)
    torch.testing.assert_close(fused.eval()(x), expected)
    for part in (fused[1], fused[2]):
        with pytest.raises(RuntimeError, match=TRAINS):
            part.train()(torch.zeros(2, 4, 3, 3))
    for broken in (fused, torch.jit.script(fused)):
        with pytest.raises(Exception, match='fused for inference and cannot train'):
            broken(x)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_units_in_training_are_an_error(grad, memory_format) -> None:
    fused = fuse(ATAC(6), example_input=torch.zeros(2, 6, 2, 2)).train()
    x = torch.randn(2, 6, 2, 2).to(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match=TRAINS):
            fused(x)
        fused.eval()(x)
    unit: Any = fuse(ATAC(6, norm_layer=None), example_input=x).train()
    assert isinstance(unit, FusedATAC) and unit(x).shape == x.shape


def test_nothing_changed_is_no_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fuse(model, example_input=x).train()(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The TorchScript type system:UserWarning')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_every_way_to_run(dtype) -> None:
    model, fused, x = fused_both(dtype)
    with torch.no_grad():
        expected = model(x)
        runs: list[Any] = [
            torch.jit.script(fused),
            torch.jit.freeze(torch.jit.script(fused)),
            torch.jit.trace(fused, x, check_trace=False),
            torch.fx.symbolic_trace(fused),
            torch.export.export(fused, (x,)).module(),
            torch.compile(fused, fullgraph=True, backend='aot_eager'),
            pickle.loads(pickle.dumps(fused)),
            copy.deepcopy(fused),
            torch.func.vmap(fused, in_dims=1, out_dims=1),
        ]
        for run in runs[:-1]:
            y = run(x)
            assert y.dtype == dtype
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * scale(expected))
        torch.testing.assert_close(runs[-1](x[:, None]), fused(x)[:, None], rtol=0, atol=3e-2 * scale(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The TorchScript type system:UserWarning')
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('dynamo', [False, True])
def test_onnx(tmp_path, dynamo) -> None:
    onnxruntime = pytest.importorskip('onnxruntime')
    if dynamo:
        pytest.importorskip('onnxscript')
    model, fused, x = fused_both()
    path = str(tmp_path / 'model.onnx')
    torch.onnx.export(fused, (x,), path, dynamo=dynamo)
    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


def test_graphs_have_one_product_and_one_sum() -> None:
    fused: Any = fuse(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), example_input=torch.zeros(2, 3, 4, 4))
    calls = [node.name for node in torch.fx.symbolic_trace(fused).graph.nodes if node.op.startswith('call_')]
    assert calls == ['_0', 'mul', 'add']
    program = torch.export.export(fused, (torch.zeros(2, 3, 4, 4),))
    ops = Counter(str(node.target) for node in program.graph.nodes if node.op == 'call_function')
    assert ops == {'aten.relu.default': 1, 'aten.mul.Tensor': 1, 'aten.add.Tensor': 1}


@pytest.mark.parametrize(
    'norm, shape',
    [
        (nn.BatchNorm1d(5), (7, 5)),
        (nn.BatchNorm1d(5, affine=False), (4, 5, 5)),
        (nn.BatchNorm2d(5, eps=0.1), (4, 5, 3, 2)),
        (nn.BatchNorm3d(5), (4, 5, 3, 2, 2)),
        (nn.SyncBatchNorm(5), (4, 5, 3, 2)),
        (BatchNormAct2d(5, drop_layer=nn.Dropout), (4, 5, 3, 2)),
        (SyncBatchNormAct(5), (4, 5, 3, 2)),
        (FrozenBatchNorm2d(5), (4, 5, 3, 2)),
        (FrozenBatchNormAct2d(5), (4, 5, 3, 2)),
    ],
)
def test_types_of_norms(norm, shape) -> None:
    model = nn.Sequential(nn.ReLU(), norm).double()
    with torch.no_grad():
        for value in (*norm.parameters(), *norm.buffers()):
            if value.is_floating_point():
                nn.init.uniform_(value, 0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64)
    model.eval()
    fused: Any = fuse(model, example_input=x)
    assert isinstance(fused[1], ScaleShift)
    for run in (fused, torch.fx.symbolic_trace(fused)):
        torch.testing.assert_close(run(x), model(x), rtol=1e-12, atol=1e-12)


def test_rounded_once() -> None:
    norm = nn.BatchNorm2d(64).eval().bfloat16()
    for value in (norm.weight, norm.running_var, norm.running_mean):
        nn.init.uniform_(value, 0.5, 1.5)  # type: ignore[arg-type]
    exact: Any = copy.deepcopy(norm).double()
    make_scale_shift(exact, 4)
    found: Any = norm
    make_scale_shift(found, 4)
    assert found.scale.shape == (64, 1, 1)
    assert torch.equal(found.scale, exact.scale.bfloat16()) and torch.equal(found.shift, exact.shift.bfloat16())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('compiled', [False, True])
def test_dtype_under_autocast(dtype, compiled) -> None:
    """Of half-precision inputs, a BatchNorm with float32 weights returns half precision."""
    model: Any = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval()
    fused: Any = fuse(model, example_input=torch.zeros(2, 3, 4, 4))
    run: Any = torch.compile(fused, backend='eager') if compiled else fused
    x = torch.randn(2, 3, 4, 4).to(dtype)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert run(x).dtype == model(x).dtype == dtype


def test_another_number_of_dimensions_or_channels() -> None:
    model = nn.BatchNorm1d(5).eval()
    fused = fuse(model, example_input=torch.zeros(4, 5, 5))
    x = torch.randn(5, 5)
    torch.testing.assert_close(fused(x), model(x))  # in eager mode
    with pytest.raises(ValueError, match='fused for inputs of 3 dimensions, not 2'):
        torch.jit.trace(fused, x)
    with pytest.raises(RuntimeError, match='5'):
        fused(torch.zeros(4, 1, 5))


class TwoWays(nn.Module):
    """Uses its norm in a given way."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.bn, self.run = nn.BatchNorm2d(3), run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


@pytest.mark.parametrize(
    'changed, run',
    [
        (True, lambda net, x: net.bn(net.bn(x).relu())),
        (False, lambda net, x: net.bn(x) * net.bn.weight.sum()),
        (False, lambda net, x: net.bn(x.to(net.bn.running_mean.dtype))),
        (False, lambda net, x: (net.bn(x), net.bn.bias)),
        (False, lambda net, x: net.bn.train()(x)),
        (False, lambda net, x: net.bn(input=x)),
        (False, lambda net, x: x),
    ],
)
def test_only_norms_that_nothing_else_uses(changed, run) -> None:
    model = with_random_norms(TwoWays(run)) if changed else TwoWays(run).double().eval()
    if not changed and run(model, torch.zeros(2, 3, 4, 4).double()) is not None:
        model.bn.reset_running_stats()
        model.eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused: Any = fuse(model, example_input=x)
    assert isinstance(fused.bn, ScaleShift) == changed
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnetv2_50', 'densenet121', 'resnet8_cifar'])
def test_networks(name) -> None:
    options: dict[str, Any] = {'resnetv2_50': {'layers': (1, 1, 1, 1)}, 'densenet121': {'block_config': (2, 2)}}
    model = with_random_norms(timm.create_model(name, **options.get(name, {})))
    if name == 'resnetv2_50':
        model = with_random_norms(timm.create_model(name, norm_layer=BatchNormAct2d, **options[name]))
    fused = fuse(model)
    assert not norms(fused) and any(isinstance(m, ScaleShift) for m in fused.modules())
    x = images(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11 * scale(model(x)))

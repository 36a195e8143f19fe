"""Models with several ways through their code: `fuse` keeps the function, or raises an error."""

import copy
import random
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from fused_models import images, with_random_norms

from timm_atac import fuse
from timm_atac.inference.comparison import Comparison, with_other_shapes
from timm_atac.inference.norms import FoldedNorm, ScaleShift

DOUBLE: Any = torch.float64


class Net(nn.Module):
    """A layer and a norm, put together in a given way."""

    def __init__(self, run: Any, layer: Any = None, norm: Any = None) -> None:
        super().__init__()
        self.conv, self.bn = layer or nn.Conv2d(3, 3, 3, padding=1), norm or nn.BatchNorm2d(3)
        self.run = run
        self.cache: Any = None

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def net(run: Any) -> Any:
    return with_random_norms(Net(run), size=8)


def check(fused: nn.Module, model: nn.Module, *args: Any) -> None:
    torch.testing.assert_close(fused(*args), model(*args), rtol=1e-12, atol=1e-12)


def _relu_if_large(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = model.conv(x)
    if y.shape[-1] > 8:
        y = F.relu(y)
    return model.bn(y)


@pytest.mark.parametrize('size', [5, 8, 9, 16, 30])
@pytest.mark.parametrize('given', [torch.zeros, torch.randn])
def test_another_way_at_another_size(size, given) -> None:
    model = net(_relu_if_large)
    fused: Any = fuse(model, example_input=given(2, 3, size, size, dtype=DOUBLE))
    assert isinstance(fused.bn, ScaleShift)
    for size in (4, 8, 9, 64):
        check(fused, model, images(model, size))


@pytest.mark.parametrize(
    'run',
    [
        lambda m, x: m.bn(m.conv(x) if x.shape[0] > 1 else m.conv(x).relu()),  # for one image
        lambda m, x: m.bn(m.conv(x)) if x.shape[-1] > 8 else m.conv(x),
        lambda m, x: m.bn(m.conv(x)) * (1 if x.shape[-1] > 8 else m.bn.bias.mean()),
        lambda m, x: m.bn(m.conv(x) if x.shape[-1] > 8 else x),
    ],
)
def test_ways_that_exclude_each_other(run) -> None:
    model = net(run)
    fused: Any = fuse(model, example_input=images(model, 16))
    assert not isinstance(fused.bn, FoldedNorm)
    for x in (images(model, 4), images(model, 16), images(model, 4)[:1]):
        check(fused, model, x)


def test_unused_at_another_size_is_no_reason() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)) if x.shape[-1] > 8 else x)
    fused: Any = fuse(model, example_input=images(model, 16))
    assert isinstance(fused.bn, FoldedNorm)
    check(fused, model, images(model, 4))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_sequences_and_rows(dtype) -> None:
    layers = [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5)]
    model: Any = nn.Sequential(*layers, nn.BatchNorm1d(5)).to(dtype).eval()
    fused: Any = fuse(model, example_input=torch.randn(2, 3, 9, dtype=dtype))
    assert isinstance(fused[1], FoldedNorm) and isinstance(fused[5], FoldedNorm)


def test_other_shapes() -> None:
    tokens = torch.zeros(2, 7, dtype=torch.long)
    given = (torch.zeros(4, 3, 8, 12), {'tokens': tokens, 'rows': torch.zeros(2, 5), 'signal': [torch.zeros(2, 3, 6)]})
    found: Any = [(x.shape, named['signal'][0].shape) for x, named in with_other_shapes(given)]
    assert found == [((4, 3, 2, 3), (2, 3, 1)), ((1, 3, 4, 6), (1, 3, 3)), ((4, 3, 16, 24), (2, 3, 12))]
    assert all(named['tokens'] is tokens for _, named in with_other_shapes(given))
    assert not list(with_other_shapes((tokens, torch.zeros(2, 5))))


def _asks_for_the_type(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = model.bn(model.conv(x))
    return y.relu() if isinstance(model.bn, nn.BatchNorm2d) else y


def _asks_for_meta(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = model.conv(x)
    return model.bn(y if x.is_meta else y.relu())


@pytest.mark.parametrize('run', [_asks_for_the_type, _asks_for_meta])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('given', [torch.zeros, torch.ones, torch.randn])
def test_another_function_is_an_error(run, dtype, given) -> None:
    model = with_random_norms(Net(run), size=8).to(dtype)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r'fused copy of Net computes another function: .* differ by [\d.]+ of the'):
        fuse(model, example_input=given(2, 3, 8, 8, dtype=dtype))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    'run',
    [
        lambda m, x: m.bn(m.conv(x)) + (0 if m.bn.affine else 1) * m.bn.running_mean.ndim,
        lambda m, x: m.bn(m.conv(x)) + (m.bn.weight is None),
    ],
)
def test_a_copy_that_does_not_run_is_an_error(run) -> None:
    """Whether a norm has a weight cannot be observed."""
    model = net(run)
    x = images(model, 8)
    try:
        fused = fuse(model, example_input=x)
    except RuntimeError as error:
        assert 'the fused copy of Net does not run: AttributeError' in str(error)
    else:
        check(fused, model, x)


def _output(kind: Any) -> Any:
    return lambda m, *args: kind(m.bn(m.conv(args[0])), isinstance(m.bn, nn.BatchNorm2d))


@pytest.mark.parametrize(
    'kind',
    [
        lambda y, other: {'a': [y], 'b': (y.sum() if other else y.mean(),)},
        lambda y, other: [y, y] if other else [y],
        lambda y, other: y if other else y[:1],
        lambda y, other: y if other else y.float(),
        lambda y, other: (y, (y > 0) if other else (y <= 0)),
        lambda y, other: (y, (y[0, 0, 0] * 1e6).long() + other),
        lambda y, other: torch.complex(y, y if other else -y),
    ],
)
def test_outputs_of_any_structure(kind) -> None:
    model = net(_output(kind))
    with pytest.raises(RuntimeError, match='another function'):
        fuse(model, example_input=images(model, 8))


@pytest.mark.parametrize(
    'kind',
    [
        lambda y, other: {'a': [y], 'b': (y.sum(), None, 3, 'text')},
        lambda y, other: y / 0 * 0,  # NaN
        lambda y, other: y * 0,
        lambda y, other: y[:0],
        lambda y, other: y * float('inf'),
        lambda y, other: (y, torch.zeros(2, 2).to_sparse()),
        lambda y, other: y > 1e9,
    ],
)
def test_outputs_without_differences(kind) -> None:
    model = net(_output(kind))
    assert isinstance(fuse(model, example_input=images(model, 8)).bn, FoldedNorm)


@pytest.mark.parametrize(
    'run',
    [
        lambda m, x: F.dropout(m.bn(m.conv(x)), training=True),
        lambda m, x: m.bn(m.conv(x)) + torch.randn(3, 8, 8, dtype=x.dtype),
        lambda m, x: m.bn(m.conv(x)) * random.random(),  # not of PyTorch
    ],
)
def test_random_models(run) -> None:
    model = net(run)
    x = torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    state = torch.get_rng_state()
    assert isinstance(fuse(model, example_input=x).bn, FoldedNorm)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_state_does_not_matter() -> None:
    model = net(_asks_for_the_type)
    messages = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        with pytest.raises(RuntimeError, match=r'differ by 0\.\d+') as info:
            fuse(model, example_input=torch.zeros(2, 3, 8, 8, dtype=DOUBLE))
        messages.add(str(info.value))
    assert len(messages) == 1


def _keeps(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = model.conv(x)
    if not x.is_meta:
        model.cache = y.mean()
        model.seen += 1
    return model.bn(y)


def test_passes_leave_nothing_behind() -> None:
    model = Net(_keeps).double().eval()
    model.register_buffer('seen', torch.zeros(()))
    x = torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    given = x.clone()
    fused: Any = fuse(model, example_input=(x,))
    assert fused.cache is None and model.cache is None and fused.seen == model.seen == 0
    assert torch.equal(x, given)


def test_inputs_in_place_are_cloned() -> None:
    model = net(lambda m, x: m.bn(m.conv(x.mul_(2))))
    x = images(model, 8)
    given = x.clone()
    fuse(model, example_input=x)
    assert torch.equal(x, given)


@pytest.mark.slow
def test_weights_on_meta_are_not_compared(caplog) -> None:
    model = timm.create_model('atac_resnet8_cifar', device='meta')
    fused: Any = fuse(model)
    assert any(isinstance(m, FoldedNorm) for m in fused.modules()) and not caplog.records
    assert all(t.is_meta for t in (*fused.parameters(), *fused.buffers()))


def test_example_on_meta_is_compared() -> None:
    model = net(_asks_for_the_type)
    with pytest.raises(RuntimeError, match='another function'):
        fuse(model, example_input=torch.empty(2, 3, 8, 8, device='meta', dtype=DOUBLE))


def test_a_model_that_only_runs_on_meta(caplog) -> None:
    model: Any = Net(lambda m, x: m.bn(m.conv(x)) if x.is_meta else x.this_is_missing).eval()
    fused: Any = fuse(model, example_input=torch.randn(2, 3, 8, 8))
    assert isinstance(fused.bn, FoldedNorm)
    assert 'not compared, because the model does not run on cpu' in caplog.text


def test_several_arguments() -> None:
    model = Net(lambda m, x, named: m.bn(m.conv(x)) + named['bias']).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    args = (x, {'bias': torch.ones(3, 1, 1, dtype=DOUBLE)})
    fused: Any = fuse(model, example_input=args)
    assert isinstance(fused.bn, FoldedNorm)
    check(fused, model, *args)


def test_rounding_is_no_difference() -> None:
    """One step of float32 is nothing, a hundredth is."""
    model: Any = nn.Linear(3, 3)
    comparison = Comparison(model, (torch.randn(2, 3),))
    for factor, error in ((1 + 1e-4, False), (1.1, True)):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.weight *= factor
            changed.bias *= factor
        if error:
            with pytest.raises(
                RuntimeError, match=r'differ by 0\.1 of the largest output, and rounding explains 0\.01'
            ):
                comparison.check(changed, model)
        else:
            comparison.check(changed, model)


@pytest.mark.parametrize('state', ['inference_mode', 'autocast', 'default dtype', 'grad'])
def test_global_state(monkeypatch, state) -> None:
    model = with_random_norms(Net(lambda m, x: m.bn(m.conv(x))), size=8, dtype=torch.float32)
    contexts: dict[str, Any] = {'inference_mode': torch.inference_mode(), 'autocast': torch.autocast('cpu')}
    x = torch.zeros(2, 3, 8, 8)
    with contexts.get(state, torch.enable_grad()):
        if state == 'default dtype':
            torch.set_default_dtype(torch.float64)
        try:
            fused: Any = fuse(model, example_input=x)
        finally:
            torch.set_default_dtype(torch.float32)
    assert isinstance(fused.bn, FoldedNorm)
    x = images(model, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


class Amplifies(nn.Module):
    """Makes rounding errors of a layer large."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x)) * self.factor
        return y.sin()


@pytest.mark.parametrize('factor, warns', [(1e5, False), (1e7, True)])
def test_a_model_that_amplifies_rounding_is_not_refused(caplog, factor, warns) -> None:
    model = with_random_norms(Amplifies(factor), size=8, dtype=torch.float32)
    fused: Any = fuse(model, example_input=images(model, 8))
    assert isinstance(fused.bn, FoldedNorm)
    x = images(model, 8)
    assert (fused(x) - model(x)).abs().max() > 0.01
    assert ('rounding alone changes them by' in caplog.text) == warns

"""What `fuse` refuses, and what it warns of."""

import copy
import io
import logging
import re
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from fused_models import images, norms, with_random_norms
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_atac import fuse
from timm_atac.inference.norms import FoldedNorm

OLD = pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning')


def small(dtype: torch.dtype = torch.float64) -> Any:
    """Two convolutions, two norms and a classifier, whose last pass was one with gradients."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten()]
    return with_random_norms(nn.Sequential(*layers, nn.Linear(80, 3)), size=8, dtype=dtype)


def one_pass(model: Any) -> None:
    model.eval()(images(model, 8))


def _prune_two(model: Any) -> None:
    prune.random_unstructured(model[0], 'weight', 0.5)
    prune.random_unstructured(model[3], 'bias', 0.5)


def _prune_twice(model: Any) -> None:
    prune.random_unstructured(model[0], 'weight', 0.5)
    prune.l1_unstructured(model[0], 'weight', 0.5)


def _keep_activation(model: Any) -> None:
    model[2].last = {'output': [model[0](images(model, 8))]}


REFUSED: list[tuple[Any, list[str]]] = [  # what is done, what the message says
    (
        _prune_two,
        [
            r"0\.weight: pruned; call torch\.nn\.utils\.prune\.remove\(module, 'weight'\)",
            r"3\.bias: pruned; call torch\.nn\.utils\.prune\.remove\(module, 'bias'\)",
        ],
    ),
    (_prune_twice, [r'0\.weight: pruned; call torch\.nn\.utils\.prune\.remove']),
    (
        lambda m: weight_norm(m[0]),
        [r'0\.weight: with weight_norm; .*remove_weight_norm\(module\)'],
    ),
    (lambda m: spectral_norm(m[3]), [r'3\.weight: with spectral_norm; .*remove_spectral_norm\(module\)']),
    (_keep_activation, [r'2\.last: kept from a forward pass with gradients; set it to None']),
]


@OLD
@pytest.mark.parametrize('change, messages', REFUSED)
def test_tensors_of_autograd_are_refused(change, messages) -> None:
    model = small()
    change(model)
    one_pass(model)
    for message in messages:
        with pytest.raises(ValueError, match=f'fuse: Sequential cannot be copied.*{message}'):
            fuse(model, example_input=images(model, 8))
    with pytest.raises(ValueError, match='fuse: Sequential cannot be copied'):
        fuse(nn.DataParallel(model), example_input=images(model, 8))


def test_only_five_places_are_named() -> None:
    model = timm.create_model('resnet8_cifar')
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.identity(module, 'weight')
    with pytest.raises(ValueError, match=r'cannot be copied.*conv.*weight and \d+ more: pruned; call .* before fuse\.'):
        fuse(model)


def test_a_root_has_no_name() -> None:
    layer = prune.identity(nn.Linear(3, 3), 'weight')
    with pytest.raises(ValueError, match=r'fuse: Linear cannot be copied.* weight: pruned'):
        fuse(layer, example_input=torch.zeros(2, 3))


@OLD
@pytest.mark.parametrize('change', [_prune_two, lambda m: weight_norm(m[0]), lambda m: spectral_norm(m[3])])
@pytest.mark.parametrize('by', ['no_grad', 'loading'])
def test_what_can_be_copied_is_not_refused(change, by) -> None:
    model = small()
    change(model)
    one_pass(model)
    x = images(model, 8)
    with torch.no_grad():
        if by == 'loading':
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            model = torch.load(file, weights_only=False)
        expected = model(x)
        torch.testing.assert_close(fuse(model, example_input=x)(x), expected, rtol=1e-12, atol=1e-12)


@OLD
def test_after_removal_everything_is_folded() -> None:
    model = small()
    _prune_two(model)
    prune.remove(model[0], 'weight')
    prune.remove(model[3], 'bias')
    x = images(model, 8)
    fused: Any = fuse(model, example_input=x)
    assert [type(fused[i]) for i in (1, 4)] == [FoldedNorm, FoldedNorm]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('by', [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(by) -> None:
    model = small()
    by(model[0])
    one_pass(model)
    x = images(model, 8)
    fused: Any = fuse(model, example_input=x)
    assert isinstance(fused[4], FoldedNorm) and not norms(fused)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


def _watch(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, y: None)


@pytest.mark.parametrize(
    'watched, names',
    [
        ([], ''),
        ([0], r'1 norms are not folded.*: 1\. Remove'),
        ([4], r'1 norms are not folded.*: 4\. Remove'),
        ([0, 1, 4], r'2 norms are not folded.*: 1, 4\. Remove the hooks before fuse'),
        ([2, 6], ''),
    ],
)
def test_hooks_are_reported(caplog, watched, names) -> None:
    model = small()
    for i in watched:
        _watch(model[i])
    x = images(model, 8)
    fused: Any = fuse(model, example_input=x)
    assert [type(m) for m in fused].count(FoldedNorm) == 2 - len({1, 4} & {i + (i in (0, 3)) for i in watched})
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == bool(names)
    if names:
        assert re.search(names, warnings[0])
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


def test_norms_alone_with_hooks_are_reported(caplog) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval()
    _watch(model[0])
    fused: Any = fuse(model, example_input=torch.zeros(2, 3, 4, 4))
    assert type(fused[0]) is nn.BatchNorm2d and 'Sequential: 1 norms are not folded' in caplog.text


@pytest.mark.slow
def test_many_hooks(caplog) -> None:
    model = timm.create_model('atac_resnet18')
    for norm in norms(model):
        _watch(norm)
    fuse(model)
    assert 'AtacResNet: 28 norms are not folded' in caplog.text and 'and 23 more. Remove the hooks' in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, message', [('atac_resnet8_cifar', 'has no effect on cpu: each unit'), ('', 'no ATAC units')]
)
def test_kernel_without_effect(monkeypatch, caplog, name, message) -> None:
    from timm_atac.inference import fuse as module

    monkeypatch.setattr(module, 'check_choice', lambda *args: None)  # also without Triton
    model: Any = timm.create_model(name) if name else nn.Sequential(nn.Conv2d(3, 3, 1))
    for kernel, expected in ((True, 1), (False, 0), (None, 0)):
        caplog.clear()
        fuse(model, kernel=kernel)
        assert caplog.text.count(message) == expected
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == expected


def test_kernel_on_meta_is_no_warning(monkeypatch, caplog) -> None:
    """Weights on `meta` are moved before the model runs."""
    from timm_atac.inference import fuse as module

    monkeypatch.setattr(module, 'check_choice', lambda *args: None)
    fuse(timm.create_model('atac_resnet8_cifar', device='meta'), kernel=True)
    assert not caplog.records


def test_the_given_model_is_not_changed() -> None:
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    fuse(model, example_input=images(model, 8))
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

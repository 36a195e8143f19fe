"""Full backward hooks on every module of a network, as Opacus, Captum and viewers of gradients register them."""

import copy
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn as nn
from measuring.timing import bytes_kept
from timm.models.resnet import BasicBlock, Bottleneck
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])


def assert_hooks_work(model: nn.Module, x: torch.Tensor, expected: tuple[torch.Tensor, ...]) -> None:
    called = []
    for module in model.modules():
        module.register_full_backward_hook(lambda module, grads_in, grads_out: called.append(module))
    found = gradients(model, x)
    assert {id(module) for module in called} == {id(module) for module in model.modules()}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('resnet8_cifar', {}),
        ('atac_resnet8_cifar', {}),
        ('resnet14_cifar', dict(act_layer='atac', atac_stages=(2,), drop_path_rate=0.1)),
        ('resnet8_cifar', dict(act_layer='silu')),
        ('resnet8_cifar', dict(act_layer='xunit')),
        ('resnet8_cifar', dict(act_layer='se_act', norm_layer='groupnorm1', data_norm_layer='groupnorm1')),
        ('resnet8_cifar', dict(attn_layer='local_se')),
    ],
)
def test_cifar_networks(name, kwargs) -> None:
    model = timm.create_model(name, **kwargs).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    expected = gradients(copy.deepcopy(model), x)
    torch.manual_seed(1)  # of stochastic depth
    assert_hooks_work(model, x, expected)


def test_cifar_network_stores_no_more_than_with_activations_in_place() -> None:
    model: Any = timm.create_model('resnet8_cifar')
    x = torch.randn(2, 3, 16, 16)
    found = []
    for inplace in (False, True):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                assert module.inplace is False or inplace
                module.inplace = inplace
        found.append(bytes_kept(lambda: model(x), model))
    assert found[0] == found[1]


def _work_out_of_place(model: nn.Module) -> None:
    """The way out in the docstring of AtacResNet."""
    for module in model.modules():
        if hasattr(module, 'inplace'):
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, (BasicBlock, Bottleneck)):
            module.drop_path = torch.clone  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('atac_resnet18', {}),
        ('atac_resnet50', dict(layers=(1, 1, 1, 1))),
        ('resnet18', dict(act_layer='atac')),
        ('aa_resnet50', dict(layers=(1, 1, 1, 1), img_size=64)),
        ('fa_resnet50', dict(layers=(1, 1, 1, 1))),
        ('ge_plus_resnet50', dict(layers=(1, 1, 1, 1), img_size=64)),
    ],
)
def test_resnets_of_timm(name, kwargs) -> None:
    """The blocks of timm's ResNet add and apply activations in place, which PyTorch forbids beside such hooks."""
    model: Any = timm.create_model(name, **kwargs).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    expected = gradients(copy.deepcopy(model), x)
    with pytest.raises(RuntimeError, match='is a view and is being modified inplace'):
        assert_hooks_work(copy.deepcopy(model), x, expected)
    _work_out_of_place(model)
    assert_hooks_work(model, x, expected)


def gradients_per_image(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients that each image alone gives, (images, *shape) for each parameter."""
    gradients = []
    for image in images:
        model.zero_grad()
        model(image[None]).square().sum().backward()
        gradients.append([cast(torch.Tensor, p.grad).clone() for p in model.parameters()])
    model.zero_grad()
    return [torch.stack(of_images) for of_images in zip(*gradients, strict=True)]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of Opacus
@pytest.mark.parametrize(
    'data_norm_layer, mode, exact',
    [
        ('', 'hooks', True),
        ('', 'functorch', True),
        ('', 'ew', True),
        ('groupnorm1', 'hooks', True),
        ('batchnorm2d', 'hooks', False),
    ],
)
def test_gradients_per_image_by_opacus(data_norm_layer, mode, exact) -> None:
    grad_sample = pytest.importorskip('opacus.grad_sample', reason='needs pip install opacus')
    kwargs: Any = dict(norm_layer='groupnorm1', data_norm_layer=data_norm_layer)
    model = timm.create_model('atac_resnet8_cifar', **kwargs).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = gradients_per_image(model, images)
    strict = {} if mode == 'ew' else {'strict': False}
    wrapped = grad_sample.wrap_model(model, grad_sample_mode=mode, loss_reduction='sum', **strict)
    wrapped(images).square().sum().backward()
    found = [cast(Any, p).grad_sample for p in model.parameters()]
    assert all(torch.allclose(x, y, rtol=1e-7, atol=1e-9) for x, y in zip(expected, found, strict=True)) == exact


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('atac_resnet8_cifar', {'data_norm_layer': ''}),
        ('resnet8_cifar', {'data_norm_layer': '', 'act_layer': 'se_act_groupnorm1'}),
        ('resnet8_cifar', {'data_norm_layer': '', 'act_layer': 'nin_groupnorm1'}),
        ('resnet8_cifar', {'data_norm_layer': '', 'act_layer': 'xunit_groupnorm1'}),
        ('resnet8_cifar', {'data_norm_layer': '', 'attn_layer': 'local_se'}),
        ('atac_resnet18', {'layers': (1, 1, 1, 1), 'zero_init_last': False}),
    ],
)
def test_gradients_per_image_by_expanded_weights(name: str, kwargs: dict[str, Any]) -> None:
    """As by Opacus with `grad_sample_mode='ew'`. Of an expanded weight, a unit can read only the shape."""
    model = timm.create_model(name, norm_layer='groupnorm1', **kwargs).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = gradients_per_image(model, images)
    expanded = call_for_per_sample_grads(model, loss_reduction='sum', batch_size=3)
    expanded(images).square().sum().backward()
    found = [cast(Any, p).grad_sample for p in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)

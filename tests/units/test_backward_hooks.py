"""Full backward hooks on every module, as Opacus, Captum and viewers of gradients register them."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn
from measuring.timing import bytes_kept, peak_memory

from timm_atac import ATAC, ATACMe, LocalSE, NiN, SEActivation, XUnit, replace_activations
from timm_atac.units.create import create_activation
from timm_atac.units.gather_excite import GatherExcite
from timm_atac.units.sine import Sine

UNITS: dict[str, Any] = {
    'ATAC': ATAC,
    'ATACMe': ATACMe,
    'SEActivation': SEActivation,
    'NiN': NiN,
    'LocalSE': LocalSE,
    'XUnit': XUnit,
    'ATACMe, NHWC': partial(ATACMe, input_fmt='NHWC'),
    'ATAC of SiLU': partial(ATAC, act_layer='silu'),
    'ATAC of PReLU, GroupNorm': partial(ATAC, act_layer='prelu', norm_layer='groupnorm1', gate_layer='hard_sigmoid'),
    'GatherExcite': partial(GatherExcite, feat_size=(6, 6), rd_ratio=0.5),
    'Sine': lambda channels: Sine(),
    **{name: partial(create_activation, name) for name in ('relu', 'silu', 'hard_swish', 'leaky_relu')},
}


def gradients(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = module(x)
    return torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', UNITS)
def test_gradients(name, training) -> None:
    unit = UNITS[name](6).double().train(training)
    x = torch.randn(5, 6, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = gradients(copy.deepcopy(unit), x)
    called = []
    for module in unit.modules():
        module.register_full_backward_pre_hook(lambda module, grads: called.append(module))
        module.register_full_backward_hook(lambda module, grads_in, grads_out: called.append(module))
    found = gradients(unit, x)
    assert sorted(map(id, called)) == sorted(2 * [id(module) for module in unit.modules()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('unit', [ATAC, ATACMe])
def test_gradients_per_image(unit) -> None:
    """Inputs by forward hooks and gradients by backward hooks give the gradients of each image, as in Opacus."""
    module = unit(6, norm_layer='groupnorm1').double()
    x = torch.randn(4, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = [torch.autograd.grad(module(image[None]).square().sum(), module.conv1.weight)[0] for image in x]
    inputs: list[torch.Tensor] = []
    grads: list[Any] = []
    for part in module.modules():
        part.register_forward_hook(lambda part, args, y: inputs.append(args[0]) if part is module.conv1 else None)
        part.register_full_backward_hook(
            lambda part, grads_in, grads_out: grads.extend(grads_out) if part is module.conv1 else None
        )
    module(x).square().sum().backward()
    found = torch.einsum('bohw,bihw->boi', grads[0], inputs[0])
    torch.testing.assert_close(found, torch.stack(expected)[..., 0, 0], rtol=1e-9, atol=1e-12)


def test_a_hook_of_the_unit_itself_leaves_it_memory_efficient() -> None:
    unit = ATACMe(6)
    grads: list[Any] = []
    unit.register_full_backward_hook(lambda module, grads_in, grads_out: grads.extend(grads_in))
    y = unit(torch.randn(5, 6, 6, 6, requires_grad=True))
    y.sum().backward()
    assert y.grad_fn is not None and y.grad_fn.next_functions[0][0].name() == '_RecomputedATACBackward'
    assert len(grads) == 1


@pytest.mark.parametrize('name', ['atac', 'se_act', 'nin'])
def test_units_in_a_finished_model(name) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1), nn.SiLU(inplace=True))
    replace_activations(model, name, example_input=torch.randn(2, 3, 5, 5))
    called = []
    for module in model.modules():
        module.register_full_backward_hook(lambda module, grads_in, grads_out: called.append(module))
    model(torch.randn(2, 3, 5, 5, requires_grad=True)).sum().backward()
    assert len(called) == len(list(model.modules()))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ATAC', 'ATACMe', 'SEActivation', 'NiN', 'ATAC of SiLU'])
def test_memory_is_that_of_an_activation_in_place(name) -> None:
    """Autograd stores the output of the ReLU in either way. For the SiLU in place, it stores a copy of its input."""
    found = []
    for inplace in (False, True):
        unit = UNITS[name](16)
        assert not unit.act.inplace
        unit.act.inplace = inplace
        x = torch.randn(4, 16, 17, 13, requires_grad=True)
        peak = peak_memory(partial(gradients, unit, x), torch.device('cpu'))
        found.append((bytes_kept(partial(unit, x), unit), peak))
    assert found[0] == found[1]

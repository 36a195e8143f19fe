"""Units that start as the activations of a trained model."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

from timm_atac import ATAC, replace_activations

CHANNELS = 24


def trained_norm(channels: int = CHANNELS, cls: Any = nn.BatchNorm2d) -> Any:
    """A norm with weights, biases and statistics of a trained network."""
    norm = cls(channels)
    nn.init.uniform_(norm.weight, 0.3, 1.5)
    nn.init.normal_(norm.bias, -0.2, 0.5)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def network(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 1), trained_norm(), activation, nn.Conv2d(CHANNELS, 5, 1))


def inputs_of(norm: Any, count: int = 400) -> torch.Tensor:
    """Maps with the statistics of a norm, (count, C, 3, 3)."""
    mean, std = norm.running_mean, norm.running_var.sqrt()
    return torch.randn(count, len(mean), 3, 3) * std[:, None, None] + mean[:, None, None]


def error(unit: nn.Module, activation: Any, norm: nn.Module) -> float:
    """Mean squared difference of unit and activation after a norm, over the mean square of the activation."""
    x = inputs_of(norm)
    with torch.inference_mode():
        h = norm.eval()(x)
        expected = activation(h.clone())
        return float((unit(h) - expected).square().mean() / expected.square().mean())


@pytest.mark.parametrize(
    'activation',
    [
        nn.ReLU(inplace=True),
        nn.SiLU(),
        nn.GELU(),
        nn.Hardswish(inplace=True),
        nn.LeakyReLU(0.2),
        nn.PReLU(CHANNELS),
        nn.ReLU6(),
    ],
    ids=lambda activation: type(activation).__name__,
)
@pytest.mark.parametrize('rd_ratio', [0.5, 1])
def test_a_unit_comes_close_to_what_it_replaces(activation: Any, rd_ratio: float) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 4, 4)
    models = [network(copy.deepcopy(activation)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, imitate in zip(models, (True, False), strict=True):
        replace_activations(model, example_input=example, rd_ratio=rd_ratio, imitate=imitate)
    close, random = (error(model[2].eval(), activation, model[1]) for model in models)
    in_training = error(models[0][2].train(), activation, models[0][1])
    limit = 0.02 if rd_ratio == 1 else 0.12
    assert close < limit and in_training < 1.5 * limit
    assert random > 2 * close


def test_half_of_the_channels_are_the_ones_that_gain_most() -> None:
    torch.manual_seed(0)
    model = network(nn.ReLU())
    norm: Any = model[1]
    with torch.no_grad():
        norm.bias[:12] = 6 * norm.weight[:12]  # always positive: a constant gate does as well
        norm.bias[12:] = 0
    unit: Any = replace_activations(model, example_input=torch.randn(2, 3, 4, 4))[2]  # type: ignore[index]
    assert sorted(unit.conv1.weight.argmax(1).flatten().tolist()) == list(range(12, 24))
    x = norm.eval()(inputs_of(norm))
    gates = unit.eval().gate(unit.bottleneck(x))
    assert gates[:, :12].min() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'efficientnet_b0', 'resnet8_cifar'])
def test_outputs_of_a_trained_network_stay(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    x = torch.randn(16, 3, 32, 32)
    model.train()
    with torch.no_grad():
        for _ in range(40):
            model(x)
        expected = model.eval()(x)
        for rd_ratio, imitate, least, most in [(1, True, 0.97, 1), (0.5, True, 0.85, 1), (0.5, False, -1, 0.85)]:
            changed = replace_activations(copy.deepcopy(model), where='paper', rd_ratio=rd_ratio, imitate=imitate)
            y = changed.eval()(x)
            correlation = float(torch.corrcoef(torch.stack([y.flatten(), expected.flatten()]))[0, 1])
            assert least < correlation <= most, (rd_ratio, imitate, correlation)


def test_all_weights_learn() -> None:
    torch.manual_seed(0)
    model = replace_activations(network(nn.ReLU()), example_input=torch.randn(2, 3, 4, 4)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    unit: Any = model[2]  # type: ignore[index]
    for _ in range(3):  # in the first step, the random rows of conv2 have no gradient
        optimizer.zero_grad()
        model(torch.randn(64, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    for name, parameter in unit.named_parameters():
        gradients = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]
        assert (gradients != 0).any(1).all() and parameter.isfinite().all(), name


def test_an_untrained_model_starts_at_random() -> None:
    models = [timm.create_model('resnet8_cifar') for _ in range(2)]
    for model, imitate in zip(models, (True, False), strict=True):
        torch.manual_seed(1)
        replace_activations(model, imitate=imitate)
    report: Any = models[0].replaced_activations
    assert not report.start.is_trained and report.start.imitating == 0 and 'trained' not in str(report)
    units = [[m.state_dict() for m in model.modules() if isinstance(m, ATAC)] for model in models]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*units, strict=True) for k in a)


def test_report_and_dry_run() -> None:
    model = network(nn.ReLU())
    before = copy.deepcopy(model)
    example = torch.randn(2, 3, 4, 4)
    report = replace_activations(model, example_input=example, dry_run=True)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert report.start == (True, 1, 1, 24, 12)
    text = '\n'.join(str(report).splitlines()[-2:])
    assert text == (
        '  start: all units start close to the activations that they replace, with 12 of 24 gates that follow the sign '
        'of their channel (rd_ratio=1: all)\n'
        '  the model is trained: fine-tune it, or train it again. Until then, its accuracy is lower or lost'
    )
    changed: Any = replace_activations(model, example_input=example)
    assert changed.replaced_activations == report and 'the model is trained' in report.caveats()


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, CHANNELS, 1), trained_norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(F.dropout(self.norm(self.conv(x)), training=False))


def test_functions_norms_with_activation_and_low_precision() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 4, 4)
    functions: Any = replace_activations(Functions(), example_input=example)
    assert functions.replaced_activations.start.imitating == 1
    assert error(functions.silu.eval(), F.silu, functions.norm) < 0.12

    norm_act: Any = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), trained_norm(cls=BatchNormAct2d)).bfloat16()
    replace_activations(norm_act, example_input=example.bfloat16())
    assert norm_act.replaced_activations.start.imitating == 1
    assert norm_act[1].act.conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize('act', ['atac_layernorm2d', 'nin', 'se_act', 'xunit'])
def test_other_units_start_at_random_and_the_report_warns(act: str) -> None:
    report: Any = replace_activations(
        network(nn.ReLU()), act, example_input=torch.randn(2, 3, 4, 4)
    ).replaced_activations
    assert report.start.imitating == 0 and 'the model is trained' in report.caveats()


def test_no_norm_or_a_sum_before_the_activation() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu, self.relu2 = nn.Conv2d(3, 3, 1), trained_norm(3), nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu2(self.conv(self.relu(self.norm(self.conv(x)) + x)))

    report: Any = replace_activations(Sum(), example_input=torch.randn(2, 3, 4, 4)).replaced_activations
    assert report.start.is_trained and report.start.imitating == 0


@pytest.mark.parametrize(
    'change',
    [
        lambda x: x * 2,
        lambda x: x + 1,
        lambda x: x.flip(1),
        lambda x: x.unflatten(1, (2, 12)).transpose(1, 2).flatten(1, 2),
    ],
    ids=['scaled', 'shifted', 'flipped', 'shuffled'],
)
def test_what_changes_the_channels_of_a_norm_is_not_imitated(change: Any) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, CHANNELS, 1), trained_norm(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(change(self.norm(self.conv(x))))

    report: Any = replace_activations(Changed(), example_input=torch.randn(2, 3, 4, 4)).replaced_activations
    assert report.start.is_trained and report.start.imitating == 0


class Threshold(nn.Module):
    """An activation that only takes maps of the size that it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.zeros(CHANNELS, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x, self.levels.view(x.shape[1:]))


def test_an_activation_that_needs_other_inputs_is_not_imitated() -> None:
    model: Any = replace_activations(network(Threshold()), where=Threshold, example_input=torch.randn(2, 3, 4, 4))
    assert isinstance(model[2], ATAC) and model.replaced_activations.start.imitating == 0

"""The price of units before and after they are there."""

import copy
import random
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn

from timm_atac import ATAC, replace_activations

X = torch.randn(2, 3, 5, 7)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 40, 1), nn.GELU())


def test_the_price_is_that_of_the_changed_model() -> None:
    model = small()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    report: Any = replace_activations(model, where=['1', '5'], example_input=X, dry_run=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(model) == repr(before) and not hasattr(model, 'replaced_activations')
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))

    changed: Any = replace_activations(model, where=['1', '5'], example_input=X)
    assert changed.replaced_activations == report
    assert str(changed.replaced_activations) == str(report)
    counts = [sum(p.numel() for p in m.parameters()) for m in (before, changed)]
    assert report.parameters == tuple(counts)
    assert [r.parameters for r in report.replaced] == [sum(p.numel() for p in changed[i].parameters()) for i in (1, 5)]
    # two products of C x C/2 at each of 35 positions
    assert [r.gmacs for r in report.replaced] == pytest.approx([8 * 8 * 35 / 1e9, 40 * 40 * 35 / 1e9])
    assert report.gmacs[0] == pytest.approx((3 * 8 + 8 * 6 + 6 * 40) * 35 / 1e9)
    assert report.gmacs[1] - report.gmacs[0] == pytest.approx(sum(r.gmacs for r in report.replaced))


def test_dry_run_of_a_model_that_cannot_run_on_meta() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 8, 1), nn.ReLU()

        def forward(self, x):
            x = self.conv(x)
            return self.relu(x) if x.mean() < 100 else x

    model = Branches()
    state = torch.get_rng_state(), random.getstate()
    report = replace_activations(model, example_input=X, dry_run=True)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert type(model.relu) is nn.ReLU
    assert report.parameters[1] - report.parameters[0] == sum(p.numel() for p in ATAC(8).parameters())


def test_text() -> None:
    report = replace_activations(small(), example_input=X, where='all', dry_run=True)
    lines = str(report).splitlines()
    assert lines[0] == '3 units (atac)'
    assert lines[1].split() == ['unit', 'was', 'channels', 'layout', 'places', 'parameters', 'GMACs']
    assert lines[2].split() == ['1', 'PReLU', '8', 'NCHW', '1', '88', '0.0000']
    assert '  parameters: 374 before, 2,228 after (+495.7%)' in lines
    assert '<tr><td>1</td><td>PReLU</td><td>8</td><td>NCHW</td><td>1</td><td>88</td><td>0.0000</td></tr>' in (
        report._repr_html_()
    )
    assert '<p>parameters: 374 before' in report._repr_html_()


@pytest.mark.parametrize('budget', [300, 700, 10_000, 700.0])
def test_a_budget(budget) -> None:
    report = replace_activations(small(), example_input=X, rd_ratio=budget, dry_run=True)

    def added(rd_ratio):
        return sum(sum(p.numel() for p in ATAC(c, rd_ratio=rd_ratio).parameters()) for c in (8, 6, 40))

    assert report.rd_ratio is not None
    r = round(1 / report.rd_ratio)
    assert report.rd_ratio == 1 / r
    assert added(1 / r) <= budget
    assert r == 2 or added(1 / (r - 1)) > budget
    assert f'is 1 / {r}: the units may add at most {int(budget):,} parameters' in str(report)


@pytest.mark.slow
@pytest.mark.parametrize('name, ratio', [('resnet50', 1 / 2), ('vit_tiny_patch16_224', 1 / 5)])
def test_auto(name, ratio) -> None:
    """At most 10 % more parameters. The paper's network has 9.3 % more."""
    with torch.device('meta'):
        model = timm.create_model(name)
    report: Any = replace_activations(model, where='paper', rd_ratio='auto', dry_run=True)
    assert report.rd_ratio == ratio
    assert report.parameters[1] <= 1.1 * report.parameters[0]


def test_config_json_has_the_chosen_number() -> None:
    model: Any = timm.create_model('test_resnet', device='meta')
    replace_activations(model, where='paper', rd_ratio=2000)
    report = model.replaced_activations
    assert report.model_args['rd_ratio'] == report.rd_ratio == 1 / round(1 / report.rd_ratio)


@pytest.mark.parametrize(
    'rd_ratio, message',
    [
        (5, r'rd_ratio=5: at most 5 parameters may be added, and 3 units add \d+ even with one channel'),
        ('aut', r"rd_ratio='aut': expected a ratio in \(0, 1\], a number of parameters, or 'auto'"),
        (2.5, r'rd_ratio=2.5: expected a number in \(0, 1\]'),
        (True, r'rd_ratio=True'),
    ],
)
def test_wrong_budgets(rd_ratio, message) -> None:
    model = small()
    if rd_ratio is True:  # one channel of bottleneck for each channel, as the number 1
        assert replace_activations(model, example_input=X, rd_ratio=rd_ratio, dry_run=True).rd_ratio == 1
        return
    with pytest.raises(ValueError, match=message):
        replace_activations(model, example_input=X, rd_ratio=rd_ratio)
    assert not hasattr(model, 'replaced_activations')


def test_a_unit_without_a_bottleneck() -> None:
    with pytest.raises(ValueError, match="rd_ratio='auto' was given with act='xunit', which has no bottleneck"):
        replace_activations(small(), 'xunit', example_input=X, rd_ratio='auto')

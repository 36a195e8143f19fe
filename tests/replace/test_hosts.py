"""docs/coverage.md agrees with tools/host_coverage.py and with timm's models."""

import math
import re
from collections.abc import Iterator
from typing import Any

import host_coverage
import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version

FEW = 2  # modules with at most 2 models: the smallest is determined in every run
SMALL = 0.5  # models with at most 0.5 million parameters are tested in every run, all others with --all-hosts
QUICK = {'By `act_layer`': SMALL, 'By `replace_activations`': 0.4}  # the same, with -m 'not slow'
WAYS = {'By `act_layer`': host_coverage.by_act_layer, 'By `replace_activations`': host_coverage.by_replacing}
PAGE = host_coverage.PAGE.read_text()
TIMM = PAGE.splitlines()[0].split()[-1]

pytestmark = pytest.mark.skipif(
    Version(timm.__version__) < Version(TIMM), reason=f'docs/coverage.md is for timm {TIMM}, which is newer'
)


def table() -> dict[tuple[str, str], str]:
    """Return the rows of the page by title and module."""
    rows, title = {}, ''
    for line in PAGE.splitlines():
        if line == host_coverage.EVERY_MODEL:
            break
        if line.startswith('## '):
            title = line.removeprefix('## ')
        elif title and line.startswith('| ') and not line.startswith(('| module ', '| --- ')):
            rows[title, line.split(' | ')[0].removeprefix('| ')] = line
    return rows


def millions(row: str) -> float:
    """Return the host's parameters in millions; infinity if the row does not have them."""
    found = re.match(r'([\d.]+) M \+', row.split(' | ')[5])
    return float(found[1]) if found else math.inf


def cases() -> Iterator:
    for (title, module), row in table().items():
        marks = []
        if millions(row) > QUICK[title]:
            marks.append(pytest.mark.slow)
        if millions(row) > SMALL:
            marks.append(pytest.mark.all_hosts)
        yield pytest.param(title, module, marks=marks, id=f'{WAYS[title].__name__}-{module}')


@pytest.mark.slow
@pytest.mark.parametrize('title, module', list(cases()))
@pytest.mark.timeout(1800)
def test_row(title, module) -> None:
    row = table()[title, module]
    model = row.split(' | ')[1]
    assert str(WAYS[title](module, model)) == row, 'run python tools/host_coverage.py'


def modules() -> Iterator:
    """Yield all modules. Those with many models are slow, since all are built to find the smallest."""
    for module in host_coverage.host_modules():
        few = len(timm.list_models(module=module)) <= FEW
        yield pytest.param(module, marks=[] if few else [pytest.mark.slow, pytest.mark.all_hosts])


@pytest.mark.slow
@pytest.mark.parametrize('module', list(modules()))
def test_row_is_of_the_smallest_model(module) -> None:
    rows = table()
    names = host_coverage.by_size(module)
    smallest = next((name for name in names if host_coverage.takes_act_layer(name)), names[0])
    assert rows['By `act_layer`', module].split(' | ')[1] == smallest
    assert rows['By `replace_activations`', module].split(' | ')[1] == names[0]


def test_text_of_the_page() -> None:
    """The page without its last section is what `page_text` returns for its rows."""
    rows = [host_coverage.Row(*row.strip('| ').split(' | ')) for row in table().values()]
    assert PAGE.startswith(host_coverage.page_text(rows, TIMM))


def test_every_module_has_rows() -> None:
    rows = table()
    for title in WAYS:
        missing = [module for module in host_coverage.host_modules() if (title, module) not in rows]
        assert not missing, 'run python tools/host_coverage.py'
    assert sum(millions(row) <= SMALL for row in rows.values()) >= 12


@pytest.mark.slow
@pytest.mark.all_hosts
@pytest.mark.timeout(3600)
def test_every_model() -> None:
    text = host_coverage.all_models_text(host_coverage.all_models(workers=2))
    assert PAGE.endswith(text), 'run python tools/host_coverage.py'


@pytest.mark.slow
@pytest.mark.parametrize(
    'module, model',
    [
        ('resnet', 'test_resnet'),
        ('efficientnet', 'test_efficientnet'),
        ('nfnet', 'test_nfnet'),
        ('vision_transformer', 'test_vit'),
        ('byobnet', 'test_byobnet'),
    ],
)
def test_placement_of_the_paper(module, model) -> None:
    if not timm.is_model(model):
        pytest.skip(f'this timm has no {model}')
    row = host_coverage.by_paper(module, model)
    assert (row.way, row.result) == ('paper', 'ok')


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, way, result',
    [
        ('efficientnet_b0', 'name', 'ok'),
        ('resnetv2_50', 'name', 'ok'),
        ('ecaresnet26t', 'name', 'ok'),  # an activation after attention that has one channel inside
        ('nf_resnet50', 'name', 'ok'),  # a network with 'norm' in its name
        ('levit_128s', 'name', 'ok'),  # an activation that is first in its container; tokens
        ('mambaout_femto', 'name', 'ok'),
        ('vit_pwee_patch16_reg1_gap_256', 'name', 'ok'),
        ('gemma4_vit_167m', 'class', 'ok'),
        ('dm_nfnet_f0', '-', 'takes act_layer but creates no activation from it'),
        ('res2net50_14w_8s', '-', "ValueError: ATACMe at 'relu' of timm.models.res2net.Bottle2neck"),
        ('efficientnet_b1_pruned', '-', 'KeyError'),
    ],
)
def test_widths(name, way, result) -> None:
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    found = host_coverage.check_widths(name)
    assert found[:2] == (name, way)
    assert found[2].startswith(result)


def test_wrong_width_is_found() -> None:
    """`input_layouts` finds a unit that is for another number of channels or for another layout."""
    model = timm.create_model('test_resnet', act_layer='atac')
    x = host_coverage.sample_input('test_resnet')
    assert host_coverage.input_layouts(model, x) == {'NCHW'}
    unit: Any = host_coverage.units(model)[0]
    unit.forward = lambda x: x  # without its own check
    conv1 = unit.conv1
    unit.conv1 = nn.Conv2d(1, 1, 1)
    with pytest.raises(host_coverage.Failure, match=r'a unit for 1 channels in NCHW gets \d+ in NCHW'):
        host_coverage.input_layouts(model, x)
    unit.conv1, unit.input_fmt = conv1, 'NLC'
    with pytest.raises(host_coverage.Failure, match=r'a unit for .* channels in NLC gets .* in NCHW'):
        host_coverage.input_layouts(model, x)


@pytest.mark.slow
def test_unchanged_parameter_is_found() -> None:
    model = timm.create_model('test_resnet', act_layer='atac')
    unit = host_coverage.units(model)[0]
    unit.register_parameter('unused', nn.Parameter(torch.zeros(3)))
    with pytest.raises(host_coverage.Failure, match=r'1 of .* parameters of units do not change'):
        host_coverage.train_units(model, host_coverage.sample_input('test_resnet'))

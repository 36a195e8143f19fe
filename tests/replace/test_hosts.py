"""docs/coverage.md is correct for timm's own models."""

import re
from collections.abc import Iterator
from typing import Any

import host_coverage as hosts
import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version

FEW = 2  # models: in modules up to here the smallest is looked for in every run
SMALL = 2.0  # million parameters: a model up to here is walked in every run, all others with --all-hosts
WAYS = {'By `act_layer`': hosts.by_act_layer, 'By `replace_activations`': hosts.by_replacing}
PAGE = hosts.PAGE.read_text()
TIMM = PAGE.splitlines()[0].split()[-1]

pytestmark = pytest.mark.skipif(
    Version(timm.__version__) < Version(TIMM), reason=f'docs/coverage.md is about timm {TIMM}, which is newer'
)


def table() -> dict[tuple[str, str], str]:
    """The rows of the page, by title and module."""
    rows, title = {}, ''
    for line in PAGE.splitlines():
        if line == hosts.EVERY_MODEL:
            break
        if line.startswith('## '):
            title = line.removeprefix('## ')
        elif title and line.startswith('| ') and not line.startswith(('| module ', '| --- ')):
            rows[title, line.split(' | ')[0].removeprefix('| ')] = line
    return rows


def small(row: str) -> bool:
    millions = re.match(r'([\d.]+) M \+', row.split(' | ')[5])
    return millions is not None and float(millions[1]) <= SMALL


def cases() -> Iterator:
    for (title, module), row in table().items():
        marks = [] if small(row) else [pytest.mark.slow, pytest.mark.all_hosts]
        yield pytest.param(title, module, marks=marks, id=f'{WAYS[title].__name__}-{module}')


@pytest.mark.parametrize('title, module', list(cases()))
@pytest.mark.timeout(1800)
def test_row(title, module) -> None:
    row = table()[title, module]
    model = row.split(' | ')[1]
    assert str(WAYS[title](module, model)) == row, 'python tools/host_coverage.py writes the page anew'


def modules() -> Iterator:
    """The search for the smallest model builds all models of a module. That is slow, so most modules are slow tests."""
    for module in hosts.host_modules():
        few = len(timm.list_models(module=module)) <= FEW
        yield pytest.param(module, marks=[] if few else [pytest.mark.slow, pytest.mark.all_hosts])


@pytest.mark.parametrize('module', list(modules()))
def test_row_is_of_the_smallest_model(module) -> None:
    rows = table()
    first = [name for name in hosts.by_size(module) if hosts.takes_act_layer(name)] or hosts.by_size(module)
    assert rows['By `act_layer`', module].split(' | ')[1] == first[0]
    assert rows['By `replace_activations`', module].split(' | ')[1] == hosts.by_size(module)[0]


def test_every_module_is_there() -> None:
    rows = table()
    for title in WAYS:
        missing = [module for module in hosts.host_modules() if (title, module) not in rows]
        assert not missing, 'python tools/host_coverage.py writes the page anew'
    assert sum(small(row) for row in rows.values()) >= 20


@pytest.mark.slow
@pytest.mark.all_hosts
@pytest.mark.timeout(3600)
def test_every_model() -> None:
    text = hosts.all_models_text(hosts.all_models(workers=2))
    assert PAGE.endswith(text), 'python tools/host_coverage.py writes the page anew'


@pytest.mark.parametrize(
    'name, way, result',
    [
        ('efficientnet_b0', 'name', 'ok'),
        ('resnetv2_50', 'name', 'ok'),
        ('ecaresnet26t', 'name', 'ok'),  # an activation behind attention with one channel inside
        ('nf_resnet50', 'name', 'ok'),  # a network with 'norm' in its name
        ('levit_128s', 'name', 'ok'),  # first in a container; tokens
        ('mambaout_femto', 'name', 'ok'),
        ('vit_pwee_patch16_reg1_gap_256', 'name', 'ok'),
        ('gemma4_vit_167m', 'class', 'ok'),
        ('dm_nfnet_f0', '-', 'takes act_layer and has no activation of it'),
        ('res2net50_14w_8s', '-', "ValueError: ATACMe at 'relu' of timm.models.res2net.Bottle2neck"),
        ('efficientnet_b1_pruned', '-', 'KeyError'),
    ],
)
def test_widths(name, way, result) -> None:
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    found = hosts.widths(name)
    assert found[:2] == (name, way)
    assert found[2].startswith(result)


def test_a_wrong_width_is_found() -> None:
    """A unit for another number of channels, or for another layout, is a failure."""
    model = timm.create_model('test_resnet', act_layer='atac')
    x = hosts.image('test_resnet')
    assert hosts.executed(model, x) == {'NCHW'}
    unit: Any = hosts.units(model)[0]
    unit.forward = lambda x: x  # its own check is not what is tested here
    unit.channels = 1
    with pytest.raises(hosts.Failure, match='channels in NCHW meet a unit for 1 in NCHW'):
        hosts.executed(model, x)
    unit.channels, unit.input_fmt = unit.conv1.in_channels, 'NLC'
    with pytest.raises(hosts.Failure, match=r'channels in NCHW meet a unit for .* in NLC'):
        hosts.executed(model, x)


def test_a_parameter_that_does_not_move_is_found() -> None:
    model = timm.create_model('test_resnet', act_layer='atac')
    unit = hosts.units(model)[0]
    unit.register_parameter('unused', nn.Parameter(torch.zeros(3)))
    with pytest.raises(hosts.Failure, match=r'1 of .* parameters of units do not move'):
        hosts.step(model, hosts.image('test_resnet'))

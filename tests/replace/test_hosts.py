"""docs/coverage.md agrees with tools/host_coverage.py and with timm's models."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import host_checks
import host_coverage
import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version

FEW = 2  # modules with at most 2 models: the smallest is determined in every run
SMALL = 0.5  # models with at most 0.5 million parameters are tested in every run, all others with --all-hosts
PAGE = host_coverage.PAGE.read_text()
TIMM = PAGE.splitlines()[0].split()[-1]

pytestmark = pytest.mark.skipif(
    Version(timm.__version__) < Version(TIMM), reason=f'docs/coverage.md is for timm {TIMM}, which is newer'
)


def table() -> dict[tuple[str, str], host_checks.Row]:
    """Return the rows of the page by way and module."""
    return {(way, row.module): row for way, rows in host_coverage.read_page().items() for row in rows}


def millions(row: host_checks.Row) -> float:
    """Return the host's parameters in millions; infinity if the row does not have them."""
    found = re.match(r'([\d.]+) M \+', row.parameters)
    return float(found[1]) if found else math.inf


def cases() -> Iterator:
    for (way, module), row in table().items():
        marks = [pytest.mark.all_hosts] if millions(row) > SMALL else []
        yield pytest.param(way, module, marks=marks, id=f'{way}-{module}')


@pytest.mark.slow
@pytest.mark.parametrize('way, module', list(cases()))
@pytest.mark.timeout(1800)
def test_row(way, module) -> None:
    row = table()[way, module]
    assert host_coverage.WAYS[way].test(module, row.model) == row, 'run python tools/host_coverage.py'


def modules() -> Iterator:
    """Yield all modules. Those with many models are slow, since all are built to find the smallest."""
    for module in host_checks.host_modules():
        few = len(timm.list_models(module=module)) <= FEW
        yield pytest.param(module, marks=[] if few else [pytest.mark.all_hosts])


@pytest.mark.slow
@pytest.mark.parametrize('module', list(modules()))
def test_row_is_of_the_smallest_model(module) -> None:
    rows = table()
    names = host_checks.by_size(module)
    smallest = next((name for name in names if host_checks.takes_act_layer(name)), names[0])
    assert rows['act_layer', module].model == smallest
    assert rows['replace', module].model == rows['paper', module].model == names[0]


def test_text_of_the_page() -> None:
    """The page without its last section is what `page_text` returns for its rows."""
    assert PAGE.startswith(host_coverage.page_text(host_coverage.read_page(), TIMM))


def test_one_table_is_written_again(monkeypatch, tmp_path) -> None:
    """The other tables, the counts and the last section stay."""
    page = tmp_path / 'coverage.md'
    rows = host_coverage.read_page()['paper']
    page.write_text(PAGE.replace(f'{rows[0]}\n', f'{replace(rows[0], result="an old reason")}\n'))
    monkeypatch.setattr(host_coverage, 'PAGE', page)
    monkeypatch.setattr(host_coverage, 'walk', lambda ways, modules, workers: [(*ways, row) for row in rows])
    monkeypatch.setattr('sys.argv', ['host_coverage.py', '--ways', 'paper'])
    monkeypatch.setattr(timm, '__version__', TIMM)
    host_coverage.main()
    assert page.read_text() == PAGE

    monkeypatch.setattr(timm, '__version__', '9.9')
    with pytest.raises(SystemExit):
        host_coverage.main()
    assert page.read_text() == PAGE


def test_every_module_has_rows() -> None:
    rows = table()
    for way in host_coverage.WAYS:
        missing = [module for module in host_checks.host_modules() if (way, module) not in rows]
        assert not missing, 'run python tools/host_coverage.py'
    assert sum(millions(row) <= SMALL for row in rows.values()) >= 12


def test_every_host_works() -> None:
    """No row of `replace_activations` is a failure, with `where='all'` and `where='paper'`."""
    failures = [row for (way, _), row in table().items() if way != 'act_layer' and not row.result.startswith('ok')]
    assert not failures


@pytest.mark.slow
@pytest.mark.all_hosts
@pytest.mark.timeout(3600)
def test_every_model() -> None:
    text = host_coverage.all_models_text(host_coverage.all_models(workers=2))
    assert PAGE.endswith(text), 'run python tools/host_coverage.py'


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
    found = host_checks.check_widths(name)
    assert found[:2] == (name, way)
    assert found[2].startswith(result)


@pytest.mark.slow
def test_wrong_width_is_found() -> None:
    """`input_layouts` finds a unit that is for another number of channels or for another layout."""
    model = timm.create_model('test_resnet', act_layer='atac')
    x = host_checks.sample_input('test_resnet')
    assert host_checks.input_layouts(model, x) == {'NCHW'}
    unit: Any = host_checks.units(model)[0]
    unit.forward = lambda x: x  # without its own check
    conv1 = unit.conv1
    unit.conv1 = nn.Conv2d(1, 1, 1)
    with pytest.raises(host_checks.Failure, match=r'a unit for 1 channels in NCHW gets \d+ in NCHW'):
        host_checks.input_layouts(model, x)
    unit.conv1, unit.input_fmt = conv1, 'NLC'
    with pytest.raises(host_checks.Failure, match=r'a unit for .* channels in NLC gets .* in NCHW'):
        host_checks.input_layouts(model, x)


@pytest.mark.slow
def test_unchanged_parameter_is_found() -> None:
    model = timm.create_model('test_resnet', act_layer='atac')
    unit = host_checks.units(model)[0]
    unit.register_parameter('unused', nn.Parameter(torch.zeros(3)))
    with pytest.raises(host_checks.Failure, match=r'1 of .* parameters of units do not change'):
        host_checks.train_units(model, host_checks.sample_input('test_resnet'))

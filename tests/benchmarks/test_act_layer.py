"""benchmarks/act_layer.py"""

import re
from pathlib import Path

import act_layer
import pytest


def rows(monkeypatch, capsys, *options: str) -> list[str]:
    """Run the program for two models, and return the rows of its tables with 0 for each number."""
    monkeypatch.setattr('sys.argv', ['act_layer.py', *options, 'test_resnet', 'test_vit'])
    act_layer.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| `')]
    return [re.sub(r'[\d.]+', '0', line) for line in lines]


@pytest.mark.slow
def test_sizes(monkeypatch, capsys) -> None:
    expected = [f'| `{name}` | 0 | 0 | 0 | 0 | 0 | 0 |' for name in ('test_resnet', 'test_vit')]
    assert rows(monkeypatch, capsys) == expected


@pytest.mark.slow
@pytest.mark.weekly
def test_times(monkeypatch, capsys) -> None:
    expected = [f'| `{name}` | 0 | 0 | 0 | 0 | 0 |' for name in ('test_resnet', 'test_vit')]
    assert rows(monkeypatch, capsys, '--build', '--rounds', '1')[2:] == expected


def test_size_of_resnet50() -> None:
    assert act_layer.size(act_layer.make('resnet50', '', device='meta')) == pytest.approx((25.557, 4.089), abs=1e-3)


@pytest.mark.slow
def test_page_agrees(monkeypatch, capsys) -> None:
    models = ['resnet18', 'resnet50', 'efficientnet_b0', 'vit_small_patch16_224']  # all ten take half a minute
    monkeypatch.setattr('sys.argv', ['act_layer.py', *models])
    act_layer.main()
    page = (Path(__file__).parents[2] / 'docs' / 'act_layer.md').read_text().splitlines()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(models)
    assert all(line in page for line in lines)


def test_ways() -> None:
    assert act_layer.way_of('test_resnet') == 'name'
    assert act_layer.way_of('edgenext_xx_small') == 'class'

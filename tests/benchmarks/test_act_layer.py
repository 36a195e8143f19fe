"""benchmarks/act_layer.py"""

import re
from pathlib import Path

import act_layer
import pytest


def test_sizes_and_times(monkeypatch, capsys) -> None:
    monkeypatch.setattr('sys.argv', ['act_layer.py', '--build', '--rounds', '1', 'test_resnet', 'test_vit'])
    act_layer.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| `')]
    assert [re.sub(r'[\d.]+', '0', row) for row in rows] == [
        *[f'| `{name}` | 0 | 0 | 0 | 0 | 0 | 0 |' for name in ('test_resnet', 'test_vit')],
        *[f'| `{name}` | 0 | 0 | 0 | 0 | 0 |' for name in ('test_resnet', 'test_vit')],
    ]


def test_size_is_what_is_known_of_resnet50() -> None:
    assert act_layer.size(act_layer.make('resnet50', '', device='meta')) == pytest.approx((25.557, 4.089), abs=1e-3)


@pytest.mark.slow
def test_readme_has_the_sizes(monkeypatch, capsys) -> None:
    monkeypatch.setattr('sys.argv', ['act_layer.py'])
    act_layer.main()
    readme = (Path(__file__).parents[2] / 'README.md').read_text()
    table = capsys.readouterr().out
    assert table.count('\n') == 2 + len(act_layer.MODELS)
    assert table in readme


def test_ways() -> None:
    assert act_layer.way_of('test_resnet') == 'name'
    assert act_layer.way_of('iformer_t') == 'class'

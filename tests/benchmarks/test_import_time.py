"""benchmarks/import_time.py"""

import re

import import_time
import pytest


@pytest.mark.slow
def test_table(monkeypatch, capsys) -> None:
    monkeypatch.setattr(import_time, 'MODULES', ('csv', 'json'))  # quicker to import
    monkeypatch.setattr('sys.argv', ['import_time.py', '--runs', '1'])
    import_time.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [re.sub(r'[\d.]+', '0', row) for row in rows] == [
        f'| `{module}` | 0 (0) | 0 (0) | 0 |' for module in ('csv', 'json')
    ]


@pytest.mark.slow
def test_entry_point_is_hidden(new_python) -> None:
    code = import_time.CODE + "import sys; print('timm_atac' in sys.modules)"
    for hidden, present in ((('timm_atac',), 'False'), ((), 'True')):
        assert new_python(code.format(module='torch', hidden=hidden)).stdout.split()[1] == present

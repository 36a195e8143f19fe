"""benchmarks/import_time.py"""

import re

import import_time


def test_prints_both_side_by_side(monkeypatch, capsys) -> None:
    monkeypatch.setattr('sys.argv', ['import_time.py', '--runs', '1'])
    import_time.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [re.sub(r'[\d.]+', '0', row) for row in rows] == [
        f'| `{module}` | 0 (0) | 0 (0) | 0 |' for module in ('torch', 'timm')
    ]


def test_without_is_without(python) -> None:
    code = import_time.CODE + "import sys; print('timm_atac' in sys.modules)"
    for hidden, present in ((('timm_atac',), 'False'), ((), 'True')):
        assert python(code.format(module='timm', hidden=hidden)).stdout.split()[1] == present

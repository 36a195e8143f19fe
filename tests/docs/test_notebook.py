"""docs/quickstart.ipynb runs without an error, and its kept outputs are those that it makes."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, anchors, links

NOTEBOOK = ROOT / 'docs' / 'quickstart.ipynb'
CELLS = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
CODE = [cell for cell in CELLS if cell['cell_type'] == 'code']
TOLERANCE = 0.1
"""How far the decimals of a cell tagged 'varies' may differ: a loss and an accuracy, which depend on the machine."""


def outputs(cell: Any) -> list[dict[str, str]]:
    """Return a cell's outputs: the text by its stream or MIME type. A picture has no text, since fonts differ."""
    found = []
    for output in cell['outputs']:
        assert output['output_type'] in ('stream', 'execute_result', 'display_data'), output
        parts = output['data'] if 'data' in output else {output['name']: output['text']}
        found.append({kind: '' if kind == 'image/png' else ''.join(text) for kind, text in parts.items()})
    return found


def same(kept: str, new: str, tolerance: float) -> bool:
    """Return True if two texts differ in decimals alone, and in these by at most the tolerance."""
    decimal = r'\d+\.\d+'
    if not tolerance or re.sub(decimal, '', kept) != re.sub(decimal, '', new):
        return kept == new
    pairs = zip(re.findall(decimal, kept), re.findall(decimal, new), strict=True)
    return all(abs(float(a) - float(b)) <= tolerance for a, b in pairs)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_outputs(tmp_path) -> None:
    for package in ('ipykernel', 'nbclient', 'nbformat'):
        pytest.importorskip(package, reason="needs the extra 'test'")
    cells = importlib.import_module('notebook').executed(NOTEBOOK, tmp_path).cells
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    for kept, new in zip(CODE, code, strict=True):
        tolerance = TOLERANCE if 'varies' in kept['metadata'].get('tags', []) else 0
        for a, b in zip(outputs(kept), outputs(new), strict=True):
            assert a.keys() == b.keys(), ''.join(kept['source'])
            for kind in a:
                assert same(a[kind], b[kind], tolerance), f'run python tools/notebook.py\n{a[kind]}\n{b[kind]}'


@pytest.mark.parametrize(
    ('kept', 'new', 'tolerance', 'expected'),
    [
        ('loss=0.26', 'loss=0.30', 0.1, True),
        ('loss=0.26', 'loss=0.30', 0, False),
        ('loss=0.26', 'loss=0.46', 0.1, False),
        ('loss=0.26', 'lost=0.26', 0.1, False),
        ('16/16', '15/16', 0.1, False),
        ('0.26', '0.26 0.26', 0.1, False),
    ],
)
def test_other_outputs_are_found(kept, new, tolerance, expected) -> None:
    assert same(kept, new, tolerance) is expected


def test_kept_outputs() -> None:
    """Each cell ran once, in order. The outputs have no warning, no path of a machine and no address in memory."""
    assert [cell['execution_count'] for cell in CODE] == [*range(1, len(CODE) + 1)]
    kinds = {kind for cell in CODE for output in outputs(cell) for kind in output}
    assert kinds == {'stdout', 'image/png', 'text/html', 'text/plain'}
    for cell in CODE:
        for output in outputs(cell):
            assert not re.search(r'[Ww]arning|/(home|root|tmp|usr)/| at 0x', ''.join(output.values())), output
    assert NOTEBOOK.stat().st_size < 400_000


def test_links(tmp_path) -> None:
    page = Path(tmp_path / 'page.md')
    page.write_text('\n\n'.join(''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'markdown'))
    assert links(page)
    for target in links(page):
        file, _, anchor = target.partition('#')
        path = NOTEBOOK.parent / file
        assert path.is_file() and (not anchor or anchor in anchors(path)), target


def test_page_of_the_site() -> None:
    """The page has the code, and each kind of output."""
    pytest.importorskip('mkdocs', reason="needs the extra 'docs'")
    site = importlib.import_module('docs_site')
    text = site.markdown_of(NOTEBOOK)
    assert text.startswith('# Quick start in a notebook\n')
    assert '```python\nimport timm\n' in text and '```text\n89,578 parameters\n```' in text
    assert text.count('<img alt="Output" src="data:image/png;base64,') == 2 and text.count('<table>') == 1
    assert site.markdown_of_output({'data': {'text/plain': ['a\n', 'b']}}) == '```text\na\nb\n```'

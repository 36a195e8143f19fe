"""README.md and docs/cli.md have what the programs in tools/ write."""

import importlib

import cli_page
import pytest
from pages import ROOT

README = ROOT / 'README.md'


def test_length_of_the_readme() -> None:
    assert README.read_text().count('\n') <= 150


@pytest.mark.slow
def test_table_of_the_readme() -> None:
    pytest.importorskip('scipy', reason="needs the packages of the extra 'ablation'")
    readme_table = importlib.import_module('readme_table')
    text = README.read_text()
    assert readme_table.with_table(text, readme_table.table()) == text, 'run python tools/readme_table.py'
    start, end = readme_table.START, readme_table.END
    assert readme_table.with_table(f'a\n{start}old\n{end}b\n', 'new\n') == f'a\n{start}new\n{end}b\n'


def test_page_of_the_program() -> None:
    assert cli_page.PAGE.read_text() == cli_page.page_text(), 'run python tools/cli_page.py'


def test_markup_of_the_program() -> None:
    assert cli_page.escape('`a*b` and c* --where, well-known -- x') == '`a*b` and c\\* `--where`, well-known -- x'

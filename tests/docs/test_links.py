"""Links of the README and of the pages, to files and headings of the repository."""

import importlib
import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, anchors, links


def name(page: Path) -> str:
    return page.name


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links(page) -> None:
    """Each file that a page names exists, and has the heading that the link names. It is not known of addresses."""
    for target in links(page):
        if re.match(r'https?:|mailto:', target):
            continue
        file, _, anchor = target.partition('#')
        path = (page.parent / file).resolve() if file else page
        assert path.exists() and path.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_programs_and_tests_exist(page) -> None:
    """Paths in code, `tests/units/test_atac.py`, exist."""
    folders = 'benchmarks|docs|hub_configs|results|tests|tools|train_scripts'
    for path in re.findall(rf'`((?:{folders})/[\w./]+\.\w+)[`:]', page.read_text()):
        if not re.search('results/ablation|ARCH.TAG', path):  # of one's own runs, and a placeholder
            assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / 'mkdocs.yml').read_text()
    shown = re.findall(r': (\w+\.md)$', text, re.MULTILINE)
    assert len(shown) == len({*shown})
    written = {page.name for page in (ROOT / 'docs').glob('*.md')}
    outside = {
        'benchmark_log.md',
        'changelog.md',
        'contributing.md',
        'quickstart.md',
        'security.md',
        'upgrading.md',
    }
    assert {*shown} - written == outside  # tools/docs_site.py adds them
    assert not written - {*shown}


@pytest.mark.parametrize('path', ['index.md', 'README.md'])
def test_a_link_that_is_dead_is_found(path, tmp_path) -> None:
    page = tmp_path / path
    page.write_text('# A\n\n[a](#b) [b](c.md)\n\n```sh\n[x](y)\n```\n')
    assert links(page) == ['#b', 'c.md']
    assert anchors(page) == {'a'}


def test_links_on_the_site() -> None:
    """Links of the repository become those of the site, but not in code."""
    pytest.importorskip('mkdocs', reason="needs the extra 'docs'")
    site = importlib.import_module('docs_site')
    for page, text, expected in (
        ('results.md', '[a](../results/digits.csv)', '[a](files/results/digits.csv)'),
        ('results.md', '[a](../benchmarks/log.md#tried)', '[a](benchmark_log.md#tried)'),
        ('benchmark_log.md', '[a](../docs/deploy.md)', '[a](deploy.md)'),
        ('index.md', '[a](quickstart.ipynb)', '[a](quickstart.md)'),
        ('quickstart.md', '[a](gates.md)', '[a](gates.md)'),
        ('contributing.md', '[`timm_atac/`](timm_atac)', '`timm_atac/`'),
        ('files/results/deploy.md', '[a](../docs/deploy.md)', '[a](../../deploy.md)'),
        (
            'index.md',
            '![a](gates.png) [b](#c) [d](https://arxiv.org)',
            '![a](gates.png) [b](#c) [d](https://arxiv.org)',
        ),
        ('index.md', '```\n[a](../README.md)\n```\n', '```\n[a](../README.md)\n```\n'),
    ):
        assert site.with_site_links(text, page) == expected
    html = site.on_page_content(f'<td>1.0 (0.9..1.1)</td><td>{"b" * 34}</td><td>{"c" * 35}</td><td><code>d</code></td>')
    assert [part.partition('>')[0] for part in html.split('<td')[1:]] == [
        ' class="tiny"',
        ' class="short"',
        '',
        ' class="tiny"',
    ]
    assert [*site.linked('docs/index.md', '[a](../LICENSE) [b](https://arxiv.org)')] == ['LICENSE']

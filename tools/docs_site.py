"""A hook of mkdocs: files outside of docs/ that the pages link to become part of the site.

Links in docs/*.md are those of the repository, `../results/digits.csv`, so that they also work where the repository is
read. mkdocs only knows files in docs/. So this hook adds the files that are linked, and turns the links into those of
the site. The files in PAGES become pages of their own. The notebook is one of them, with the outputs that it has. A
link to a folder becomes its text.
"""

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    'CHANGELOG.md': 'changelog.md',
    'UPGRADING.md': 'upgrading.md',
    'SECURITY.md': 'security.md',
    'CONTRIBUTING.md': 'contributing.md',
    'benchmarks/log.md': 'benchmark_log.md',
    'docs/quickstart.ipynb': 'quickstart.md',
}
"""File of the repository -> page of the site."""

SHORT, TINY = 34, 16
"""Characters of a table's cell that stays on one line: on a wide screen, and on any screen."""

LINK = re.compile(r'(?P<text>\[[^\]]*\])\((?P<target>[^)\s]+)\)')
CODE = re.compile(r'^```.*?^```', re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and each file that a page links to."""
    for source, page in PAGES.items():
        text = f'# {Path(source).stem.capitalize()}\n\nThere is none yet.\n'
        if (ROOT / source).is_file():
            text = markdown_of(ROOT / source)
        files.append(File.generated(config, page, content=text))
    known = set(PAGES)
    waiting = [posixpath.join('docs', file.src_uri) for file in files.documentation_pages() if file.abs_src_path]
    waiting += [source for source in PAGES if (ROOT / source).is_file()]
    while waiting:
        source = waiting.pop()
        for path in linked(source, markdown_of(ROOT / source)):
            if path in known or path.startswith('docs/') or not (ROOT / path).is_file():
                continue
            known.add(path)
            files.append(File.generated(config, f'files/{path}', abs_src_path=str(ROOT / path)))
            if path.endswith('.md'):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of the repository into links of the site."""
    return with_site_links(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Mark the short cells of tables, see docs/site.css, and show `\\|` in them as `|`."""

    def cell(match: re.Match[str]) -> str:
        content = match[1].replace(r'\|', '|')  # a forge wants it escaped, also in code
        length = len(re.sub(r'<[^>]+>', '', content))
        size = 'tiny' if length <= TINY else 'short'
        return f'<td class="{size}">{content}</td>' if length <= SHORT else f'<td>{content}</td>'

    return re.sub(r'<td>(.*?)</td>', cell, html, flags=re.DOTALL)


def markdown_of(path: Path) -> str:
    """Return the text of a Markdown file, or of a notebook as Markdown."""
    if path.suffix != '.ipynb':
        return path.read_text(encoding='utf-8')
    parts = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        parts.append(source if cell['cell_type'] == 'markdown' else f'```python\n{source}\n```')
        parts += [markdown_of_output(output) for output in cell.get('outputs', [])]
    parts.append(f'<a href="{path.name}" download>Download the notebook</a>')
    return '\n\n'.join(parts) + '\n'


def markdown_of_output(output: dict[str, Any]) -> str:
    """Return an output of a notebook as Markdown: a picture, a table or text."""
    data = output.get('data', {})
    if 'image/png' in data:
        return f'<p><img alt="Output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}"></p>'
    if 'text/html' in data:
        return ''.join(data['text/html'])
    text = ''.join(output.get('text') or data['text/plain'])
    return f'```text\n{text.rstrip()}\n```'


def linked(source: str, text: str) -> Iterator[str]:
    """Yield the paths in the repository that a Markdown file links to."""
    for match in LINK.finditer(CODE.sub('', text)):
        if path := repository_path(match['target'], source):
            yield path


def repository_path(target: str, source: str) -> str:
    """Return the path in the repository that a link of a file names, '' for an address or a heading of the file."""
    path = target.partition('#')[0]
    return '' if not path or ':' in path else posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def with_site_links(text: str, page: str) -> str:
    """Return the text of a page of the site with links of the site."""
    sources = {page: source for source, page in PAGES.items()}
    source = sources.get(page) or (page.removeprefix('files/') if page.startswith('files/') else f'docs/{page}')

    def site_link(match: re.Match[str]) -> str:
        target = match['target']
        path = repository_path(target, source)
        if not path:
            return match[0]
        if (ROOT / path).is_dir():
            return match['text'][1:-1]
        uri = PAGES.get(path) or (path.removeprefix('docs/') if path.startswith('docs/') else f'files/{path}')
        _, hash, anchor = target.partition('#')
        return f'{match["text"]}({posixpath.relpath(uri, posixpath.dirname(page) or ".")}{hash}{anchor})'

    return outside_code(text, lambda part: LINK.sub(site_link, part))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply a function to what is between the code blocks of a text."""
    parts, end = [], 0
    for block in CODE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return ''.join([*parts, change(text[end:])])

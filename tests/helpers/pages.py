"""The code, links and headings of a Markdown page."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
_FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    section: str  # the heading above it
    number: int  # counted from 0 within the section
    code: str


def python_blocks(page: Path) -> list[Block]:
    blocks: list[Block] = []
    for heading, text in re.findall(r'^#+ ([^\n]+)\n(.*?)(?=^#+ |\Z)', page.read_text(), re.MULTILINE | re.DOTALL):
        codes = re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
        blocks += [Block(heading, number, code) for number, code in enumerate(codes)]
    return blocks


class Fence(NamedTuple):
    """A block of code.

    Attributes:
        line: Number of its first line of code.
        language: 'python', 'sh', 'text', or '' for none.
        title: Why no test runs it, or needs something for that; '' for a block that runs anywhere.
        code: The code.
        output: What the block prints: that of the `text` block right below. None if there is none.
    """

    line: int
    language: str
    title: str
    code: str
    output: str | None


def fences(page: Path) -> list[Fence]:
    text = page.read_text()
    found = [*_FENCE.finditer(text)]
    assert len(found) * 2 == len(re.findall(r'^```', text, re.MULTILINE)), f'{page}: a block that is not understood'
    result = []
    for match, following in zip(found, [*found, None][1:], strict=True):
        is_output = following and following[1] == 'text' and not text[match.end() : following.start()].strip()
        output = following[3] if following and is_output else None
        line = text.count('\n', 0, match.start(3)) + 1
        result.append(Fence(line, match[1], match[2] or '', match[3], output))
    return result


def links(page: Path) -> list[str]:
    """Return the targets of the links and pictures outside of code."""
    text = re.sub(r'`[^`\n]+`', 'code', _FENCE.sub('', page.read_text()))
    return re.findall(r'\]\(([^)\s]+)\)', text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as a forge makes them."""
    headings = re.findall(r'^#+ (.+)', _FENCE.sub('', page.read_text()), re.MULTILINE)
    return {re.sub(r'[^\w\s-]', '', heading.lower()).replace(' ', '-') for heading in headings}

"""The Python code of a Markdown page."""

import re
from pathlib import Path
from typing import NamedTuple


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

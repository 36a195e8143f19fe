"""Write docs/cli.md, the reference of the program `timm-atac`, from its parser.

python tools/cli_page.py
"""

import argparse
import re
from pathlib import Path
from typing import Any

from timm_atac.cli.program import _parser

PAGE = Path(__file__).parents[1] / 'docs' / 'cli.md'
HEAD = """\
# timm-atac

`python tools/cli_page.py` writes this page from what `timm-atac COMMAND --help` prints.

Errors are one line with what to do. `TIMM_ATAC_DEBUG=1` in the environment shows the traceback too. The exit status is
0, 1 after an error, 2 for wrong arguments, 70 after a fault of the package and 130 after an interruption.
"""


def page_text() -> str:
    parser: Any = _parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return HEAD + ''.join(section(name, command) for name, command in commands.choices.items())


def section(name: str, command: Any) -> str:
    """Return the description of a command and a table of its arguments."""
    # indented lines are commands
    blocks = re.sub(
        r'(?:^    .*\n)+',
        lambda match: '```sh\n' + re.sub(r'^    ', '', match[0], flags=re.MULTILINE) + '```\n',
        command.description.strip() + '\n',
        flags=re.MULTILINE,
    )
    text = f'\n## {name}\n\n{outside_code(blocks)}'
    rows = [f'| {argument(a)} | {escape(a.help or "")} |\n' for a in command._actions if a.dest != 'help']
    return text + ''.join(['\n| argument | what it is |\n| --- | --- |\n', *rows] if rows else [])


def argument(action: Any) -> str:
    """Return how an argument is written, such as `--image IMAGE`."""
    values = action.metavar or action.dest.upper()
    if action.nargs == '+':
        values = f'{values} ...'
    if action.nargs == 0:
        values = ''
    names = ', '.join(action.option_strings)
    text = ' '.join(filter(None, (names, values)))
    return ' or '.join(f'`{part}`' for part in text.split('|'))


def outside_code(text: str) -> str:
    """Escape what Markdown would read as markup, but not in blocks of code."""
    parts = re.split(r'(^```.*?^```)', text, flags=re.MULTILINE | re.DOTALL)
    return ''.join(part if part.startswith('```') else escape(part) for part in parts)


def escape(text: str) -> str:
    """Escape `*`, and put options into code."""

    def outside(part: str) -> str:
        return re.sub(r'(?<![\w-])--[a-z][\w-]*', r'`\g<0>`', part.replace('*', r'\*'))

    parts = re.split(r'(`[^`]*`)', text.replace('%%', '%'))
    return ''.join(part if part.startswith('`') else outside(part) for part in parts)


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page_text())
    print(f'Wrote {PAGE}')

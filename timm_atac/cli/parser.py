"""An argument parser that suggests the right name for a misspelt option or command."""

import argparse
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

__all__ = ['Parser']


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors end with "did you mean ...?" after a misspelt option or choice.

    It reports unknown options itself. So a parser of a command prints its own usage, and not that of the program.
    """

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(args or ())
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}')
        return found, unknown

    def error(self, message: str) -> NoReturn:
        hints = [_hint(option, self._option_string_actions) for option in self._unknown_options()]
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if choice and 'maybe you meant' not in message:  # Python 3.15 suggests one itself
            hints.append(_hint(choice[1], [name.strip(" '") for name in choice[2].split(',')]))
        super().error('; '.join([message, *filter(None, hints)]))

    def _unknown_options(self) -> list[str]:
        options = [text.partition('=')[0] for text in self._given if text.startswith('--') and len(text) > 2]
        known = self._option_string_actions
        return [option for option in options if not any(name.startswith(option) for name in known)]


def _hint(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ... instead of ...?" for a misspelt name, '' if no known name is similar."""
    found = get_close_matches(name, list(known), n=1)
    return f'did you mean {found[0]!r} instead of {name!r}?' if found else ''

"""Parts of error messages: suggestions for misspelt names, numbers with their noun, shortened lists."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

__all__ = ['close_names', 'counted', 'did_you_mean', 'one_line', 'shortened']


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the question "did you mean 'relu'?" for a misspelt name, '' if no known name is similar.

    Case does not matter.
    """
    by_lower = {text.lower(): text for text in known}
    found = get_close_matches(name.lower(), by_lower, n=1)
    return f'did you mean {by_lower[found[0]]!r}?' if found else ''


def close_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known names that are most similar to a misspelt one, the best first."""
    return get_close_matches(name, list(known), n=count, cutoff=0.5)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: '1 unit', '2 units'. The plural of the noun must end in a plain s."""
    return f'{count} {noun}' if count == 1 else f'{count} {noun}s'


def shortened(items: Sequence[Any], shown: int = 5) -> list[str]:
    """Return the first items as text, and '... 3 more' if there are more."""
    more = len(items) - shown
    return [*map(str, items[:shown]), *[f'... {more} more'] * (more > 0)]


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line, the name of its type if it has no message."""
    return ' '.join(str(error).split()) or type(error).__name__

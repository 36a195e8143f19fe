"""Prints a table with aligned columns."""

from collections.abc import Sequence

__all__ = ['print_table']


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length, the head first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print('  '.join(f'{cell:{width}}' for cell, width in zip(row, widths, strict=True)).rstrip())

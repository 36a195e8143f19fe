"""Markdown tables."""


def markdown_table(lines: list[list[str]]) -> str:
    """Return a table with aligned columns. The first line is its head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    ruled = [lines[0], ['-' * width for width in widths], *lines[1:]]
    return '\n'.join(
        '| ' + ' | '.join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + ' |' for line in ruled
    )

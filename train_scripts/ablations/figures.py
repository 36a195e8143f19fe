"""Plots like the paper's figures."""

import io
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ablations.grid import ACT_STAGES, activation
from ablations.store import Row
from timm_atac._files import replaced_file

MARKERS = 'osD^vP*X<>'
Point = tuple[float, list[float]]


def plot_blocks(title: str, rows: list[Row], path: Path, reported: dict[tuple[str, str, int], float]) -> Path:
    """Plot accuracy over parameters: one line per activation and one point per depth.

    Dashed lines are the authors' figures. If one activation is far below all others, a second panel leaves it out.
    """
    full = [row for row in rows if row.run.act_stages == max(ACT_STAGES)]
    lines: dict[str, list[Point]] = {}
    theirs: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys(row.run.activation for row in full):
        depths = sorted({(row.run.blocks, row.result.params / 1e3) for row in full if row.run.activation == name})
        lines[name] = [(k, [r.result.accuracy for r in full if r.run[1:3] == (name, b)]) for b, k in depths]
        cells = [(k, (rows[0].run.dataset, name, b)) for b, k in depths]
        theirs[name] = [(k, reported[cell]) for k, cell in cells if cell in reported]

    others = _without_the_lowest(lines)
    figure, panels = _axes(title, 'parameters (thousands)', rows, 2 if others else 1)
    for axes in panels:
        for i, (name, points) in enumerate(lines.items()):
            color = _draw(axes, points, activation(name).label, i)
            if theirs[name]:
                axes.plot(*zip(*theirs[name], strict=True), '--', marker=_marker(i), color=color, alpha=0.5)
    if any(theirs.values()):
        panels[0].plot([], [], '--o', color='grey', alpha=0.5, label='pale: reported by the authors')
    if others:
        panels[1].set(ylim=_limits(others), title='without the lowest')
    return _save(figure, panels[0], path)


def _without_the_lowest(lines: dict[str, list[Point]]) -> list[Point]:
    """Return the points of all lines but the lowest; an empty list if the lowest is not far below them."""
    means = {name: [statistics.mean(values) for _, values in points] for name, points in lines.items()}
    lowest = min(means, key=lambda name: min(means[name]))
    others = [mean for name in means if name != lowest for mean in means[name]]
    if len(means) < 3 or min(others) - min(means[lowest]) < 4 * (max(others) - min(others)) + 1:
        return []
    return [point for name, points in lines.items() if name != lowest for point in points]


def _limits(points: list[Point]) -> tuple[float, float]:
    """Return limits of the y axis that leave room for the error bars."""
    ends = [(statistics.mean(values), _spread(values)) for _, values in points]
    low, high = min(mean - spread for mean, spread in ends), max(mean + spread for mean, spread in ends)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def plot_act_stages(title: str, rows: list[Row], path: Path) -> Path:
    """Plot accuracy over the number of stages that have the activation, counted from the last stage."""
    figure, (axes,) = _axes(title, 'stages with the activation, counted from the last', rows)
    networks = dict.fromkeys(r.run[1:3] for r in rows if r.run.act_stages < max(ACT_STAGES))
    for i, (name, blocks) in enumerate(networks):
        found = {n: [r.result.accuracy for r in rows if r.run[1:4] == (name, blocks, n)] for n in ACT_STAGES}
        found[0] = [r.result.accuracy for r in rows if r.run[1:3] == ('relu', blocks)]
        _draw(axes, [(n, found[n]) for n in sorted(found) if found[n]], f'{activation(name).label}, b = {blocks}', i)
    axes.set_xticks(range(len(ACT_STAGES) + 1))
    return _save(figure, axes, path)


def _axes(title: str, x: str, rows: list[Row], panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # pyplot would open windows and keep the figure

    figure = Figure(figsize=(6.4 * panels, 4.2), layout='constrained')
    found = figure.subplots(1, panels, squeeze=False)[0]
    for axes in found:
        of = 'held-out' if rows[0].run.held_out else 'test'
        axes.set(xlabel=x, ylabel=f'{of} accuracy after the last epoch (%)')
        axes.grid(alpha=0.3)
    found[0].set_title(title)
    return figure, list(found)


def _draw(axes: Any, points: Iterable[Point], label: str, number: int) -> str:
    """Draw a line with error bars of one standard deviation, and return its colour."""
    x, values = zip(*points, strict=True)
    means, spreads = [statistics.mean(v) for v in values], [_spread(v) for v in values]
    line, *_ = axes.errorbar(x, means, spreads, marker=_marker(number), capsize=3, label=label)
    return line.get_color()


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format='png', dpi=150, metadata={'Software': None})
    with replaced_file(path) as file:
        file.write(picture.getvalue())
    return path

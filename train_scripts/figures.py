"""Plots in the manner of the paper's figures."""

import io
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grid import ACT_STAGES, activation
from store import Row

from timm_atac.atomic import replaced_file

MARKERS = 'osD^vP*X<>'
Point = tuple[float, list[float]]


def plot_blocks(title: str, rows: list[Row], path: Path, reported: dict[tuple[str, str, int], float]) -> Path:
    """Accuracy over parameters: a line an activation, a point a depth, dashed what the authors report."""
    full = [row for row in rows if row.run.act_stages == max(ACT_STAGES)]
    figure, axes = _axes(title, 'parameters (thousands)')
    for i, name in enumerate(dict.fromkeys(row.run.activation for row in full)):
        depths = {row.run.blocks: row.result.params / 1e3 for row in full if row.run.activation == name}
        points = [(k, [r.result.accuracy for r in full if r.run[1:3] == (name, b)]) for b, k in sorted(depths.items())]
        line = _draw(axes, points, activation(name).label, i)
        theirs = [
            (k, reported[cell])
            for b, k in sorted(depths.items())
            if (cell := (rows[0].run.dataset, name, b)) in reported
        ]
        if theirs:
            axes.plot(*zip(*theirs, strict=True), '--', marker=MARKERS[i % len(MARKERS)], color=line, alpha=0.5)
    return _save(figure, axes, path)


def plot_act_stages(title: str, rows: list[Row], path: Path) -> Path:
    """Accuracy over the number of stages that have the activation, from the back: a line a network."""
    figure, axes = _axes(title, 'stages with the activation, from the back')
    networks = dict.fromkeys(r.run[1:3] for r in rows if r.run.act_stages < max(ACT_STAGES))
    for i, (name, blocks) in enumerate(networks):
        found = {n: [r.result.accuracy for r in rows if r.run[1:4] == (name, blocks, n)] for n in ACT_STAGES}
        found[0] = [r.result.accuracy for r in rows if r.run[1:3] == ('relu', blocks)]
        _draw(axes, [(n, found[n]) for n in sorted(found) if found[n]], f'{activation(name).label}, b = {blocks}', i)
    axes.set_xticks(range(len(ACT_STAGES) + 1))
    return _save(figure, axes, path)


def _axes(title: str, x: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel='test accuracy (%)', title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _draw(axes: Any, points: Iterable[Point], label: str, number: int) -> str:
    """A line with error bars of one standard deviation; its colour."""
    x, values = zip(*points, strict=True)
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    marker = MARKERS[number % len(MARKERS)]
    return axes.errorbar(x, [statistics.mean(v) for v in values], spread, marker=marker, capsize=3, label=label)[
        0
    ].get_color()


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format='png', dpi=150, metadata={'Software': None})
    with replaced_file(path) as file:
        file.write(picture.getvalue())
    return path

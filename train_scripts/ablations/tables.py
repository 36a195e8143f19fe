"""The paper's tables and figures, made from rows of results, with the figures that the authors report."""

import csv
import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ablations.figures import plot_act_stages, plot_blocks
from ablations.grid import ACT_STAGES, ACTIVATIONS, Run, activation, dataset_file_name, dataset_label
from ablations.markdown import markdown_table
from ablations.provenance import Setup
from ablations.store import Row
from timm_atac._files import replaced_file

SAME_IMAGES = {'cifar10': 'cifar10-jpeg'}  # reported data set: the copy of it that rows may have
RESULTS = Path(__file__).parents[2] / 'results'
Cell = tuple[str, str, int]  # data set, activation, b


class Group(NamedTuple):
    """Rows of one data set with the same settings.

    Attributes:
        title: Data set and settings, for the title of tables and plots.
        name: Data set and settings, for file names.
        rows: The rows in the order of the paper's tables.
    """

    title: str
    name: str
    rows: list[Row]


def read_reported(path: Path = RESULTS / 'reported-cifar.csv') -> dict[Cell, float]:
    """Return the top-1 accuracies in per cent that the authors report, by data set, activation and b.

    The copy of a data set has the accuracies of the data set.
    """
    with open(path, newline='', encoding='utf-8') as file:
        return {
            (dataset, line['activation'], int(line['blocks'])): float(line['accuracy'])
            for line in csv.DictReader(file)
            for dataset in {line['dataset'], SAME_IMAGES.get(line['dataset'], line['dataset'])}
        }


def group_rows(rows: Iterable[Row]) -> list[Group]:
    """Group rows by data set and settings. Each table shows one group."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(row.run.settings, []).append(row)
    order = [*ACTIVATIONS]

    def rank(row: Row) -> tuple:
        name = row.run.activation
        return order.index(name) if name in order else len(order), name, row.run.blocks, row.run.seed

    return [_group(sorted(rows, key=rank)) for _, rows in sorted(found.items(), key=lambda item: str(item[0]))]


def _group(rows: list[Row]) -> Group:
    run = rows[0].run
    changed = {key: value for key, value in run.changed_settings().items() if key != 'epochs'}
    epochs = f'{run.epochs} epoch{"s" * (run.epochs > 1)}'
    settings = [epochs, *(f'{key} {value}' for key, value in changed.items())]
    title = f'{dataset_label(run.dataset)}, {", ".join(settings)}'
    return Group(title, '-'.join([dataset_file_name(run.dataset), *(s.replace(' ', '_') for s in settings)]), rows)


def accuracy_table(group: Group, reported: dict[Cell, float]) -> str:
    """Return mean and standard deviation of the accuracy by activation and b, in Markdown.

    Cells with a reported accuracy also show it and the difference. '' if no run has its activation in all stages.
    """
    rows = [row for row in group.rows if row.run.act_stages == max(ACT_STAGES)]
    if not rows:
        return ''
    depths = sorted({row.run.blocks for row in rows})
    lines = [['Activation', *(f'b = {b}' for b in depths), 'Parameters (k)']]
    for name in dict.fromkeys(row.run.activation for row in rows):
        runs = {b: [row for row in rows if (row.run.activation, row.run.blocks) == (name, b)] for b in depths}
        lines.append(
            [
                activation(name).label,
                *(_cell(runs[b], reported.get((rows[0].run.dataset, name, b))) for b in depths),
                ' / '.join(f'{runs[b][0].result.params / 1e3:.1f}' if runs[b] else '-' for b in depths),
            ]
        )
    return '\n\n'.join(
        filter(None, [_head(group.title, rows, reported), markdown_table(lines), _setup_differences(rows)])
    )


def _setup_differences(rows: list[Row]) -> str:
    """Return a sentence that names the fields of `Setup` in which the rows differ; '' if there are none."""
    values = {name: sorted({getattr(row.setup, name) for row in rows}) for name in Setup._fields}
    different = [
        f'{name} ({", ".join(v or "unknown" for v in found)})' for name, found in values.items() if len(found) > 1
    ]
    return f'The setups of the rows differ: {"; ".join(different)}.' if different else ''


def _head(title: str, rows: list[Row], reported: dict[Cell, float]) -> str:
    counts: dict[tuple, list[int]] = {}
    for row in rows:
        counts.setdefault(row.run[:4], []).append(row.run.seed)
    seeds = sorted({len(found) for found in counts.values()})
    count = f'{seeds[0]} to {seeds[-1]}' if len(seeds) > 1 else f'{seeds[0]}'
    spread = f'mean ± standard deviation over {count} seeds' if seeds[-1] > 1 else 'one seed'
    compared = any(dataset == rows[0].run.dataset for dataset, _, _ in reported)
    brackets = (
        "; then the mean of the best epochs; in brackets the authors' accuracy and how far that mean is from it, since "
        'their script keeps the epoch that is best on the test set'
        if compared
        else ''
    )
    return f'{title}: {_measured(rows)} after the last epoch in per cent, {spread}{brackets}'


def _measured(rows: list[Row]) -> str:
    return 'accuracy on the held-out images' if rows[0].run.held_out else 'test accuracy'


def _cell(rows: list[Row], reported: float | None) -> str:
    found = [row.result.accuracy for row in rows]
    text = mean_and_spread(found)
    if reported is None:
        return text
    if not rows:
        return f'({reported:.2f})'
    best = statistics.mean(row.result.best_accuracy for row in rows)
    return f'{text}, best {best:.2f} ({reported:.2f}, {_signed(best - reported)})'


def mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ''
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def paired_table(group: Group) -> str:
    """Return how far ATAC is ahead of each other activation, paired by seed, in Markdown.

    Networks of one seed see the same images in the same order. So the differences scatter less than the accuracies. The
    interval is Student's, which takes the differences for normally distributed. '' if there is nothing to compare.
    """
    rows = [row for row in group.rows if row.run.act_stages == max(ACT_STAGES)]
    accuracies = {(row.run.activation, row.run.blocks, row.run.seed): row.result.accuracy for row in rows}
    depths = sorted({b for name, b, _ in accuracies if name == 'atac'})
    lines = [['ATAC against', *(f'b = {b}' for b in depths)]]
    for name in dict.fromkeys(row.run.activation for row in rows if row.run.activation != 'atac'):
        cells = []
        for b in depths:
            seeds = [seed for found, depth, seed in accuracies if (found, depth) == ('atac', b)]
            pairs = [(accuracies['atac', b, s], accuracies[name, b, s]) for s in seeds if (name, b, s) in accuracies]
            cells.append(difference_with_interval([ours - theirs for ours, theirs in pairs]))
        if any(cells):
            lines.append([activation(name).label, *cells])
    if len(lines) == 1:
        return ''
    return (
        f'{group.title}: ATAC less each other activation, {_measured(rows)} in points, mean of the differences within '
        f'seeds, with its 95 % interval. An interval that contains 0 is not significant\n\n{markdown_table(lines)}'
    )


def difference_with_interval(values: Sequence[float]) -> str:
    """Return mean and 95 % interval of Student's t, whether the interval contains 0, and the number of values."""
    if not values:
        return ''
    mean = statistics.mean(values)
    if len(values) == 1:
        return f'{_signed(mean)} (one seed)'
    from scipy import stats  # takes a second

    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    verdict = 'not significant, ' if mean - half <= 0 <= mean + half else ''
    interval = f'{_signed(mean - half)} to {_signed(mean + half)}'
    return f'{_signed(mean)} ({interval}; {verdict}{len(values)} seeds)'


def _signed(value: float) -> str:
    """Return a difference with its sign. A zero is '+0.00', also where rounding makes it from a negative number."""
    return f'{round(value, 2) + 0.0:+.2f}'


def act_stages_table(group: Group) -> str:
    """Return the accuracy by the number of stages that have the activation, counted from the last, in Markdown.

    '' if all runs have their activation in all stages.
    """
    rows = [row for row in group.rows if activation(row.run.activation).takes_act_stages]
    networks = dict.fromkeys(row.run[1:3] for row in rows if row.run.act_stages < max(ACT_STAGES))
    if not networks:
        return ''
    lines = [['Network', *map(str, (0, *ACT_STAGES))]]
    for name, blocks in networks:
        host = [r.result.accuracy for r in group.rows if r.run[1:3] == ('relu', blocks)]
        cells = [[r.result.accuracy for r in rows if r.run[1:4] == (name, blocks, n)] for n in ACT_STAGES]
        lines.append([f'{activation(name).label}, b = {blocks}', *map(mean_and_spread, [host, *cells])])
    return (
        f'{group.title}: {_measured(group.rows)} by the number of stages with the activation, from the last on '
        f'(0: ReLU everywhere)\n\n{markdown_table(lines)}'
    )


def first_rows(rows: list[Row]) -> list[Row]:
    """Return the first row of each run. Print a message if another row of a run has another accuracy."""
    found: dict[Run, Row] = {}
    for row in rows:
        first = found.setdefault(row.run, row)
        if first.result.accuracy != row.result.accuracy:
            print(
                f'{row.run.name} occurs twice, with {first.result.accuracy} and {row.result.accuracy} %: the first row '
                'is used.',
                file=sys.stderr,
            )
    return list(found.values())


def all_tables(rows: list[Row]) -> str:
    """Return all tables of the rows in Markdown."""
    reported = read_reported()
    found = (
        (accuracy_table(group, reported), paired_table(group), act_stages_table(group)) for group in group_rows(rows)
    )
    return '\n\n'.join(filter(None, itertools.chain(*found)))


def write_tables(rows: list[Row], text: str, output: Path) -> list[Path]:
    """Write `text` to tables.md, draw the plots of the rows, and return the paths of all files."""
    reported = read_reported()
    paths = [output / 'tables.md']
    with replaced_file(paths[0]) as file:
        file.write(f'{text}\n'.encode())
    for group in group_rows(rows):
        if accuracy_table(group, reported):
            paths.append(plot_blocks(group.title, group.rows, output / f'{group.name}.png', reported))
        if act_stages_table(group):
            paths.append(plot_act_stages(group.title, group.rows, output / f'{group.name}-act_stages.png'))
    return paths

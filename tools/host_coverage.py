"""Test ATAC in one model of each of timm's modules, and write the results to docs/coverage.md.

    python tools/host_coverage.py                 # all modules; writes the page; an hour and a half on two cores
    python tools/host_coverage.py --ways paper    # the same of one table of the page; the others stay as they are
    python tools/host_coverage.py levit nfnet     # only prints the rows of these modules

The model of a module (the host) is its smallest one. It is tested with `act_layer='atac'`, `act_layer=timm_atac.ATAC`
and `replace_activations`, the last with `where='all'` and `where='paper'`. The modules and models are those of timm's
registry, so that new ones are included.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from host_checks import NO_ACT_LAYER, Row, by_act_layer, by_paper, by_replacing, check_widths, host_modules

PAGE = Path(__file__).parent.parent / 'docs' / 'coverage.md'
EVERY_MODEL = '## Every model by `act_layer`'
EVERY_MODEL_HEAD = """
{title}

Of {models} models, {takes} take `act_layer`. Each was created and run on the `meta` device. In {name} of them by name,
and in {cls} as a class, every unit has the width and the layout of its input. These {refused} fail:

| model | reason |
| --- | --- |
"""
HEAD = """# ATAC in the {modules} model modules of timm {timm}

`python tools/host_coverage.py` writes this page. It tests the smallest model of each module, the host.
`tests/replace/test_hosts.py` compares the page with the models.

"ok" means: every unit has the width and the layout of its input in a forward pass; training changes every parameter of
the units; a second model that loads the state dict returns the same output. "units" is their number among all
activation modules of the host; with `act_layer`, the host does not create the others from it, and with `where='paper'`,
the others are in other places. "parameters" are those of the host and those of the units. The shapes of `features_only`
are compared with the unchanged host's. `se_act` and `nin` are only trained in hosts without tokens, since tokens have
no map to pool. "-": nothing to report.

| way | modules |
| --- | --- |
| by name, `act_layer='atac'` | {name} |
| as a class, `act_layer=timm_atac.ATAC` | {cls} |
| takes `act_layer`, but fails; the reason is below | {refused} |
| takes no `act_layer` | {without} |
| `replace_activations` | {fit} |
| `replace_activations` fails; the reason is below | {fails} |
| `replace_activations`, `where='paper'` | {paper_fit} |
| `replace_activations`, `where='paper'`, fails; the reason is below | {paper_fails} |
| has no activation module | {no_modules} |

Layouts after `replace_activations`, in modules: {layouts}.
"""


class Way(NamedTuple):
    title: str  # of the table in docs/coverage.md
    test: Callable[..., Row]  # of a module, and of a model that is not the smallest


WAYS = {
    'act_layer': Way('By `act_layer`', by_act_layer),
    'replace': Way('By `replace_activations`', by_replacing),
    'paper': Way("By `replace_activations`, `where='paper'`", by_paper),
}


def _call(job: tuple[Callable[[str], Any], str]) -> Any:
    torch.set_num_threads(1)
    function, name = job
    return function(name)


def walk(ways: Iterable[str], modules: Iterable[str], workers: int) -> Iterator[tuple[str, Row]]:
    """Test each module in each way of `WAYS`. Yield the way and the row."""
    jobs = [(way, module) for way in ways for module in modules]
    with ProcessPoolExecutor(workers) as pool:
        rows = pool.map(_call, [(WAYS[way].test, module) for way, module in jobs])
        yield from zip((way for way, _ in jobs), rows, strict=True)


def all_models(workers: int) -> list[tuple[str, str, str]]:
    """Return `check_widths` of every model."""
    names = [name for module in host_modules() for name in timm.list_models(module=module)]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_call, [(check_widths, name) for name in names]))


def all_models_text(models: list[tuple[str, str, str]]) -> str:
    """Return the last section of the page."""
    ways = Counter(way for _, way, result in models if result == 'ok')
    refused = [(name, result) for name, _, result in models if result not in ('ok', NO_ACT_LAYER)]
    text = EVERY_MODEL_HEAD.format(
        title=EVERY_MODEL,
        models=len(models),
        takes=sum(result != NO_ACT_LAYER for *_, result in models),
        name=ways['name'],
        cls=ways['class'],
        refused=len(refused),
    )
    return text + ''.join(f'| {name} | {result} |\n' for name, result in refused)


def page_text(tables: dict[str, list[Row]], version: str = timm.__version__) -> str:
    """Return the text of docs/coverage.md without its last section. `tables` has the rows of each way of `WAYS`."""
    named, replaced = tables['act_layer'], tables['replace']
    ways = Counter(row.way for row in named)
    without = [row for row in named if row.way == '-' and row.result == NO_ACT_LAYER]
    refused = [row for row in named if row.way == '-' and row.result != NO_ACT_LAYER]
    fit, fails = _fit_and_fails(replaced)
    paper_fit, paper_fails = _fit_and_fails(tables['paper'])
    layouts = Counter(layout for row in fit for layout in row.layouts.split())
    text = HEAD.format(
        modules=len(named),
        timm=version,
        name=ways['name'],
        cls=ways['class'],
        refused=len(refused),
        without=len(without),
        fit=len(fit),
        fails=len(fails),
        paper_fit=len(paper_fit),
        paper_fails=len(paper_fails),
        no_modules=sum(row.way == '-' for row in replaced),
        layouts=', '.join(f'{layout} in {n}' for layout, n in sorted(layouts.items())),
    )
    for way in WAYS:
        columns = ' | '.join('features_only' if f.name == 'features' else f.name for f in fields(Row))
        text += f'\n## {WAYS[way].title}\n\n| {columns} |\n| {" | ".join("---" for _ in fields(Row))} |\n'
        text += ''.join(f'{row}\n' for row in tables[way])
    return text


def _fit_and_fails(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows of models that work and of those that do not. Models without activations are in neither."""
    tested = [row for row in rows if row.way != '-']
    return [r for r in tested if r.result.startswith('ok')], [r for r in tested if not r.result.startswith('ok')]


def read_page() -> dict[str, list[Row]]:
    """Return the rows of docs/coverage.md of each way."""
    tables: dict[str, list[Row]] = {way: [] for way in WAYS}
    titles = {way.title: name for name, way in WAYS.items()}
    title = ''
    for line in PAGE.read_text().splitlines():
        if line.startswith('## '):
            title = line.removeprefix('## ')
        elif title in titles and line.startswith('| ') and not line.startswith(('| module ', '| --- ')):
            tables[titles[title]].append(Row(*line.strip('| ').split(' | ')))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='*', help='modules of timm (default: all of them, and the page is written)')
    parser.add_argument(
        '--ways', nargs='+', choices=WAYS, default=list(WAYS), help='default: all; modules come before it'
    )
    parser.add_argument('--workers', type=int, default=2, help='number of processes (default: 2)')
    args = parser.parse_args()
    first_line = PAGE.read_text().splitlines()[0]
    if set(args.ways) != set(WAYS) and not args.modules and not first_line.endswith(f' {timm.__version__}'):
        parser.error(f'--ways: {PAGE.name} is for another timm than {timm.__version__}; write all of its tables')
    tables: dict[str, list[Row]] = {way: [] for way in args.ways}
    for way, row in walk(args.ways, args.modules or host_modules(), args.workers):
        print(row, flush=True)
        tables[way].append(row)
    if args.modules:
        return
    if 'act_layer' in args.ways:
        every_model = all_models_text(all_models(args.workers))
    else:
        every_model = PAGE.read_text()[PAGE.read_text().index(f'\n{EVERY_MODEL}\n') :]
    if set(args.ways) != set(WAYS):
        tables = {**read_page(), **tables}
    PAGE.write_text(page_text(tables) + every_model)
    print(f'Wrote {PAGE}')


if __name__ == '__main__':
    main()

"""Walk through timm's own models and put ATAC into one of each module; writes docs/coverage.md.

    python tools/host_coverage.py               # every module, and the page: an hour on two cores
    python tools/host_coverage.py levit nfnet   # some modules, printed

A module's model is its smallest one; the ways in are `act_layer='atac'`, `act_layer=timm_atac.ATAC` and
`replace_activations`. Nothing here is a list of timm's models, so that new ones are walked the day they appear.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm_tests import OUR_MODULES

from timm_atac import ATAC, NiN, SEActivation, replace_activations
from timm_atac.replace.trace import is_activation, trace
from timm_atac.units.deferred import ChannelModule
from timm_atac.utils.forward_pass import ForwardError

PAGE = Path(__file__).parent.parent / 'docs' / 'coverage.md'
BATCH = 4  # SE modules pool to one value a channel, and a BatchNorm of two values has no gradient to speak of
STEPS = 4  # blocks that begin as the identity have no gradient inside at first
NO_ACT_LAYER = 'takes no act_layer'
_TWICE = r"unexpected keyword argument\W.*'act_layer'|multiple values for .*'act_layer'"

EVERY_MODEL = '## Every model by `act_layer`'
EVERY_MODEL_HEAD = """
{title}

Of {models} models, {takes} take `act_layer`. Created and run on the `meta` device, {name} by name and {cls} as a class
have only units of the width and layout that they meet. These {refused} refuse it:

| model | reason |
| --- | --- |
"""
HEAD = """# ATAC in the {modules} model modules of timm {timm}

Written by `python tools/host_coverage.py`, which takes the smallest model of each module; `tests/replace/test_hosts.py`
compares.

"ok" is: every unit is made for the width and layout that it meets in a forward pass; training moves every one of its
parameters; a second model that loads the state dict gives the same output. "units" counts them among all activation
modules of the model; by `act_layer`, the others are those that the host does not make from it. "parameters" are the
host's and the units'. The shapes of `features_only` are compared with the host's. `se_act` and `nin` are trained where
there are no tokens, which have no map to pool; "-" is: not there.

| way | modules |
| --- | --- |
| by name, `act_layer='atac'` | {name} |
| as a class, `act_layer=timm_atac.ATAC` | {cls} |
| takes `act_layer`, and it cannot work; the reason is below | {refused} |
| takes no `act_layer` | {without} |
| `replace_activations` | {fit} |
| `replace_activations` fails; the reason is below | {fails} |
| has no activation module | {no_modules} |

Layouts after `replace_activations`, in modules: {layouts}.
"""

Make = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """What came of one way into one model: a line of the page."""

    module: str
    model: str
    way: str  # 'name', 'class', 'replace'; '-' for none
    result: str  # 'ok', or why not
    units: str = '-'  # of so many activation modules
    parameters: str = '-'  # the host's and the units'
    layouts: str = '-'  # that the units met
    features: str = '-'  # features_only; '-' where the host has none
    se_act: str = '-'  # '-' where there are tokens, which have no map to pool
    nin: str = '-'

    def __str__(self) -> str:
        return '| ' + ' | '.join(str(value) for value in vars(self).values()) + ' |'


class Failure(Exception):
    """What a host cannot do with units in it."""


def host_modules() -> list[str]:
    return [module for module in timm.list_modules() if module not in OUR_MODULES]


@cache
def by_size(module: str) -> list[str]:
    """The models of a module, the one with the fewest parameters first."""
    counts = {}
    for name in timm.list_models(module=module):
        with torch.device('meta'):
            counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return sorted(counts, key=lambda name: (counts[name], name))


def by_act_layer(module: str, model: str | None = None) -> Row:
    """Put ATAC in by name or else as a class; into `model`, or else the smallest model that has the argument."""
    names = [model] if model else by_size(module)
    name = next((name for name in names if takes_act_layer(name)), None)
    if name is None:
        return Row(module, names[0], '-', NO_ACT_LAYER)
    reasons = []
    for way, acts in (('name', ('atac', 'se_act', 'nin')), ('class', (ATAC, SEActivation, NiN))):
        row = _row(module, name, way, *(partial(timm.create_model, name, act_layer=act) for act in acts))
        if row.result == 'ok':
            return row
        reasons.append(row.result)
    different = reasons[0] != reasons[1]
    return Row(module, name, '-', f'{reasons[0]}; as a class: {reasons[1]}' if different else reasons[0])


def by_replacing(module: str, model: str | None = None) -> Row:
    """Put ATAC in the place of what is there; into `model`, or else the smallest model."""
    name = model or by_size(module)[0]

    def make(act: str, **kwargs) -> nn.Module:
        return replace_activations(timm.create_model(name, **kwargs), act)

    with torch.device('meta'):
        if not any(is_activation(m) for m in timm.create_model(name).modules()):
            return Row(module, name, '-', 'has no activation module')
    return _row(module, name, 'replace', *(partial(make, act) for act in ('atac', 'se_act', 'nin')))


def takes_act_layer(name: str) -> bool:
    """Whether a model takes the argument at all: another error counts as yes, and shows later."""
    try:
        with torch.device('meta'):
            timm.create_model(name, act_layer=nn.ReLU)
    except TypeError as error:
        return re.search(_TWICE, str(error)) is None
    except Exception:
        return True
    return True


def _row(module: str, name: str, way: str, make: Make, se_act: Make, nin: Make) -> Row:
    torch.manual_seed(0)
    try:
        x = image(name)
        model = make()
        layouts = executed(model, x)
        result = 'ok' + step(model, x)
        same_after_loading(model, make(), x)
    except Exception as error:
        return Row(module, name, way, reason(error))
    inside = {m for unit in units(model) for m in unit.modules()}
    left = sum(is_activation(m) and m not in inside for m in model.modules())
    count = len(units(model))
    added = sum(p.numel() for _, p in unit_parameters(model))
    others = sum(p.numel() for p in model.parameters()) - added
    shared = sum(r.places > 1 for r in model.replaced_activations.replaced) if way == 'replace' else 0
    spatial = layouts <= {'NCHW', 'NHWC'}
    return Row(
        module,
        name,
        way,
        result,
        f'{count} of {count + left}' + (f', {shared} shared' if shared else ''),
        f'{others / 1e6:.2f} M + {added / 1e6:.2f} M',
        ' '.join(sorted(layouts)),
        features(name, make),
        trains(se_act, x) if spatial else '-',
        trains(nin, x) if spatial else '-',
    )


def units(model: nn.Module) -> list[ChannelModule]:
    return [m for m in model.modules() if isinstance(m, ChannelModule)]


def executed(model: nn.Module, x: torch.Tensor) -> set[str]:
    """The layouts that the units meet in a forward pass.

    Raises:
        Failure: There is no unit, or one is made for another width or layout than it meets.
    """
    watch: set[nn.Module] = set(units(model))
    if not watch:
        raise Failure('takes act_layer and has no activation of it')
    layouts = set()
    for invocation, call in trace(model, (x,), watch).calls():
        unit = call.activation
        if isinstance(unit, ChannelModule):
            if call.width is None:
                raise Failure(f'{type(invocation.module).__name__} gives a unit {call.shape}: which are the channels?')
            channels, input_fmt = call.width
            last = [fmt in ('NHWC', 'NLC') for fmt in (input_fmt, unit.input_fmt)]
            if channels != unit.channels or (last[0] != last[1] and len(call.shape) > 2):
                raise Failure(f'{channels} channels in {input_fmt} meet a unit for {unit.channels} in {unit.input_fmt}')
            layouts.add(input_fmt)
    return layouts


def step(model: nn.Module, x: torch.Tensor) -> str:
    """Train until every parameter of every unit has moved.

    Returns:
        '', or how many units have a reason not to: the host gives them a constant.

    Raises:
        Failure: Parameters have not moved after `STEPS` steps.
    """
    model.train()
    start = {k: p.detach().clone() for k, p in unit_parameters(model)}
    # steps of one size, however small the gradient, with one state a parameter: the largest model has 412 M of them
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.0, eps=1e-30)
    with torch.no_grad():
        target = torch.randn_like(output(model, x))
    still: list[str] = []
    for _ in range(STEPS):
        (output(model, x) - target).square().mean().backward()
        optimizer.step()
        model.zero_grad()
        still = [k for k, p in unit_parameters(model) if torch.equal(p, start[k])]
        if not still:
            return ''
    constant = with_constant_input(model, x)
    moving = [k for k in still if not k.startswith(tuple(f'{name}.' for name in constant))]
    why = f'the host gives {len(constant)} units a constant'
    if moving:
        also = f'; {why}' if constant else ''
        raise Failure(f'{len(moving)} of {len(start)} parameters of units do not move{also}: {moving[:3]}')
    return f'; {why}'


def with_constant_input(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the units whose input is the same at every position of every image."""
    names = {unit: name for name, unit in model.named_modules() if isinstance(unit, ChannelModule)}
    varies: Counter[str] = Counter()

    def watch(unit: ChannelModule, args: tuple) -> None:
        rows = args[0].detach().transpose(1 if unit.input_fmt in ('NCHW', 'NCL') else -1, -1).flatten(0, -2)
        varies[names[unit]] += int((rows - rows[:1]).abs().max() > 1e-6)

    handles = [unit.register_forward_pre_hook(watch) for unit in names]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [name for name, count in varies.items() if not count]


def same_after_loading(model: nn.Module, again: nn.Module, x: torch.Tensor) -> None:
    """Raises `Failure` if `again` is another model with the state dict of `model`."""
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        if not torch.allclose(output(again.eval(), x), output(model.eval(), x), rtol=1e-4, atol=1e-5):
            raise Failure('another output after a state-dict round trip')


def trains(make: Make, x: torch.Tensor) -> str:
    try:
        return 'ok' + step(make(), x)
    except Exception as error:
        return reason(error)


def unit_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, unit in model.named_modules():
        if isinstance(unit, ChannelModule):
            yield from ((f'{name}.{k}', p) for k, p in unit.named_parameters())


def image(name: str) -> torch.Tensor:
    """A batch of noise, of the first of a few small sizes that the model can do: patches and windows must divide it."""
    cfg: Any = timm.get_pretrained_cfg(name)
    channels, *size = cfg.input_size
    for small in () if cfg.fixed_input_size else (128, 112, 192):
        smaller = [min(s, small) for s in size]
        try:
            with torch.device('meta'):
                timm.create_model(name).eval()(torch.zeros(BATCH, channels, *smaller))
        except Exception:
            continue
        return torch.randn(BATCH, channels, *smaller)
    return torch.randn(BATCH, channels, *size)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return torch.cat([t.flatten(1) for t in (y if isinstance(y, (tuple, list)) else [y])], 1)


def features(name: str, make: Make) -> str:
    try:
        host = timm.create_model(name, features_only=True)
    except Exception:
        return '-'
    x = image(name)
    try:
        with torch.no_grad():
            shapes = [f.shape for f in make(features_only=True)(x)]
            return 'ok' if shapes == [f.shape for f in host(x)] else f'{shapes}'
    except Exception as error:
        return reason(error)


def reason(error: BaseException) -> str:
    if isinstance(error, ForwardError) and error.__cause__ is not None:
        error = error.__cause__  # what the model raised itself
    text = str(error) if isinstance(error, Failure) else f'{type(error).__name__}: {error}'
    return re.sub(r'\s+', ' ', text).replace('|', '/')


def widths(name: str) -> tuple[str, str, str]:
    """Check a model's units for their widths alone, on meta: name of the model, way in, and 'ok' or why not."""
    if not takes_act_layer(name):
        return name, '-', NO_ACT_LAYER
    x = torch.zeros(2, *timm.get_pretrained_cfg(name).input_size, device='meta')  # type: ignore[union-attr]
    result = ''
    for way, act in (('name', 'atac'), ('class', ATAC)):
        try:
            with torch.device('meta'):
                model = timm.create_model(name, act_layer=act)
            executed(model, x)
            return name, way, 'ok'
        except Exception as error:
            result = result or reason(error)
    return name, '-', result


def _call(job: tuple[Callable[[str], Any], str]) -> Any:
    torch.set_num_threads(1)
    function, name = job
    return function(name)


def walk(modules: Iterable[str], workers: int) -> Iterator[Row]:
    """The rows of all modules by `act_layer`, then those by replacement."""
    modules = list(modules)
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_call, [(way, module) for way in (by_act_layer, by_replacing) for module in modules])


def all_models(workers: int) -> list[tuple[str, str, str]]:
    """`widths` of every model."""
    names = [name for module in host_modules() for name in timm.list_models(module=module)]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_call, [(widths, name) for name in names]))


def all_models_text(models: list[tuple[str, str, str]]) -> str:
    """The section of the page about every model."""
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


def page(rows: list[Row]) -> str:
    """The text of docs/coverage.md, but for its last section."""
    named, replaced = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    ways = Counter(row.way for row in named)
    without = [row for row in named if row.way == '-' and row.result == NO_ACT_LAYER]
    refused = [row for row in named if row.way == '-' and row.result != NO_ACT_LAYER]
    fit = [row for row in replaced if row.way == 'replace' and row.result.startswith('ok')]
    no_modules = [row for row in replaced if row.way == '-']
    layouts = Counter(layout for row in fit for layout in row.layouts.split())
    text = HEAD.format(
        modules=len(named),
        timm=timm.__version__,
        name=ways['name'],
        cls=ways['class'],
        refused=len(refused),
        without=len(without),
        fit=len(fit),
        fails=len(replaced) - len(fit) - len(no_modules),
        no_modules=len(no_modules),
        layouts=', '.join(f'{layout} in {n}' for layout, n in sorted(layouts.items())),
    )
    for title, part in (('By `act_layer`', named), ('By `replace_activations`', replaced)):
        columns = ' | '.join('features_only' if f.name == 'features' else f.name for f in fields(Row))
        text += f'\n## {title}\n\n| {columns} |\n| {" | ".join("---" for _ in fields(Row))} |\n'
        text += ''.join(f'{row}\n' for row in part)
    return text


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='*', help='modules of timm; none for all of them and the page')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    rows = []
    for row in walk(args.modules or host_modules(), args.workers):
        print(row, flush=True)
        rows.append(row)
    if not args.modules:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows) + all_models_text(all_models(args.workers)))
        print(f'Wrote {PAGE}')

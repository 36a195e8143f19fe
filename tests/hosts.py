"""Walk through timm's own models and put ATAC into one of each module: `python tests/hosts.py [module ...]`.

The model of a module is the one with the fewest parameters; the ways are `act_layer='atac'`, `act_layer=ATAC` and
`replace_activations`. Nothing here is a list of timm's models, so that new ones are walked the day they appear.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
import torch.nn as nn
from timm_tests import OUR_MODULES

from timm_atac import ATAC, NiN, SEActivation, replace_activations
from timm_atac.complete import ChannelModule
from timm_atac.trace import is_activation

BATCH = 4  # SE modules pool to one value a channel, and a BatchNorm of two values has no gradient to speak of
STEPS = 4  # blocks that begin as the identity have no gradient inside at first


@dataclass(frozen=True)
class Row:
    """What came of one way into one model."""

    module: str
    model: str
    way: str  # 'name', 'class', 'replace'; '' for none
    result: str  # 'ok', or why not
    units: int = 0
    layouts: str = ''
    others: int = 0  # activation modules that are not units
    shared: int = 0  # units that are called at more than one place
    features: str = ''  # features_only: 'ok', why not, or '' where the host has none
    se_act: str = ''
    nin: str = ''


def host_modules() -> list[str]:
    return [module for module in timm.list_modules() if module not in OUR_MODULES]


@cache
def representative(module: str) -> str:
    """The model of a module with the fewest parameters."""
    counts = {}
    for name in timm.list_models(module=module):
        with torch.device('meta'):
            counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(counts, key=lambda name: (counts[name], name))


def by_act_layer(module: str) -> Row:
    """Put ATAC in by name or else as a class."""
    name = representative(module)
    reasons = []
    for way, acts in (('name', ('atac', 'se_act', 'nin')), ('class', (ATAC, SEActivation, NiN))):
        make = [(lambda act=act, **kw: timm.create_model(name, act_layer=act, **kw)) for act in acts]
        result, facts = check(name, make[0])
        if result == 'ok':
            spatial = set(facts['layouts'].split(', ')) <= {'NCHW', 'NHWC'}
            se_act, nin = (try_step(name, m) if spatial else 'tokens' for m in make[1:])
            return Row(module, name, way, result, **facts, se_act=se_act, nin=nin)
        reasons.append(result)
    return Row(module, name, '', reasons[0] if reasons[0] == reasons[1] else f'{reasons[0]}; as a class: {reasons[1]}')


def by_replacing(module: str) -> Row:
    """Put ATAC in the place of what is there."""
    name = representative(module)

    def make(act: str) -> Callable[..., nn.Module]:
        return lambda **kwargs: replace_activations(timm.create_model(name, **kwargs), act)

    if not any(is_activation(m) for m in timm.create_model(name).modules()):
        return Row(module, name, '', 'has no activation module')
    result, facts = check(name, make('atac'))
    if result != 'ok':
        return Row(module, name, '', result)
    spatial = set(facts['layouts'].split(', ')) <= {'NCHW', 'NHWC'}
    se_act, nin = (try_step(name, make(act)) if spatial else 'tokens' for act in ('se_act', 'nin'))
    return Row(module, name, 'replace', result, **facts, se_act=se_act, nin=nin)


def check(name: str, make: Callable[..., nn.Module]) -> tuple[str, dict[str, Any]]:
    """Build, train, save and load, features: 'ok' and facts, or what went wrong."""
    torch.manual_seed(0)
    try:
        model = make()
        units = [m for m in model.modules() if isinstance(m, ChannelModule)]
        if not units:
            return 'takes act_layer and has no activation of it', {}
        inside = {m for unit in units for m in unit.modules()}
        others = sum(is_activation(m) and m not in inside for m in model.modules())
        x = step(model, name)
        again = make()
        again.load_state_dict(model.state_dict())
        if not torch.allclose(output(again.eval(), x), output(model.eval(), x), rtol=1e-4, atol=1e-5):
            return 'another output after a state-dict round trip', {}
    except Exception as error:
        return reason(error), {}
    report = getattr(model, 'replaced_activations', None)
    shared = sum(r.places > 1 for r in report.replaced) if report is not None else 0
    layouts = ', '.join(sorted({unit.input_fmt for unit in units}))
    facts = dict(units=len(units), layouts=layouts, others=others, shared=shared, features=features(name, make))
    return 'ok', facts


def try_step(name: str, make: Callable[..., nn.Module]) -> str:
    try:
        step(make(), name)
    except Exception as error:
        return reason(error)
    return 'ok'


def step(model: nn.Module, name: str) -> torch.Tensor:
    """Train until every parameter of every unit has moved; returns the input.

    Raises:
        AssertionError: One has not after `STEPS` steps.
    """
    x = image(model, name)
    model.train()
    start = {k: p.detach().clone() for k, p in unit_parameters(model)}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-30)
    for _ in range(STEPS):
        optimizer.zero_grad()
        output(model, x).square().mean().backward()
        optimizer.step()
        still = [k for k, p in unit_parameters(model) if torch.equal(p, start[k])]
        if not still:
            return x
    raise AssertionError(f'{len(still)} of {len(start)} parameters of units do not move: {still[:3]}')


def unit_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, unit in model.named_modules():
        if isinstance(unit, ChannelModule):
            yield from ((f'{name}.{k}', p) for k, p in unit.named_parameters())


def image(model: nn.Module, name: str) -> torch.Tensor:
    """A batch of the smallest images that are safe for the model; two random classes of noise."""
    cfg: Any = timm.get_pretrained_cfg(name)
    size = cfg.input_size if cfg.fixed_input_size else (cfg.input_size[0], *(min(s, 128) for s in cfg.input_size[1:]))
    return torch.randn(BATCH, *size)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return torch.cat([t.flatten(1) for t in (y if isinstance(y, (tuple, list)) else [y])], 1)


def features(name: str, make: Callable[..., nn.Module]) -> str:
    try:
        host = timm.create_model(name, features_only=True)
    except Exception:
        return ''
    x = image(host, name)
    try:
        expected = [f.shape for f in host(x)]
        shapes = [f.shape for f in make(features_only=True)(x)]
    except Exception as error:
        return reason(error)
    return 'ok' if shapes == expected else f'{shapes} instead of {expected}'


def reason(error: Exception) -> str:
    text = re.sub(r'\s+', ' ', f'{type(error).__name__}: {error}')
    text = re.sub(r"^TypeError: .*unexpected keyword argument 'act_layer'.*", 'takes no act_layer', text)
    return text.replace('|', '/')


def _walk(job: tuple[str, str]) -> Row:
    torch.set_num_threads(1)
    kind, module = job
    return by_act_layer(module) if kind == 'act_layer' else by_replacing(module)


def walk(modules: Iterable[str], workers: int) -> dict[str, list[Row]]:
    modules = list(modules)
    jobs = [(kind, module) for module in modules for kind in ('act_layer', 'replace')]
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(_walk, jobs))
    return {'act_layer': rows[0::2], 'replace': rows[1::2]}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('modules', nargs='*', help='modules of timm; all of them if none is given')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    for rows in walk(args.modules or host_modules(), args.workers).values():
        for row in rows:
            print(*(f'{k}={v}' for k, v in vars(row).items() if v not in ('', 0)), sep='  ')

"""Test ATAC in one model of timm, the host. tools/host_coverage.py does so for all of timm's modules."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests' / 'helpers'))

import timm
import torch
import torch.nn as nn
from timm_tests import OUR_MODULES

from timm_atac import ATAC, NiN, SEActivation, replace_activations
from timm_atac.replace.trace import is_activation, trace
from timm_atac.units.deferred import ChannelModule
from timm_atac.utils.forward_pass import ForwardError

BATCH = 4  # after an SE module's pooling, BatchNorm has one value per image, and with two values hardly any gradient
STEPS = 4  # blocks that are the identity at first have no gradient inside in the first step
NO_ACT_LAYER = 'takes no act_layer'
_REFUSES_ACT_LAYER = r"unexpected keyword argument\W.*'act_layer'|multiple values for .*'act_layer'"

Make = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """A row of the page: the result of one way to put ATAC into one model."""

    module: str
    model: str
    way: str  # 'name', 'class', 'replace' or 'paper'; '-' if none works
    result: str  # 'ok' or the reason
    units: str = '-'  # number of units, and of all activation modules
    parameters: str = '-'  # of the host and of the units
    layouts: str = '-'  # layouts of the units' inputs
    features: str = '-'  # result of features_only; '-' if the host does not have it
    se_act: str = '-'  # result of training; '-' for tokens, which have no map to pool
    nin: str = '-'  # the same

    def __str__(self) -> str:
        return '| ' + ' | '.join(str(value) for value in vars(self).values()) + ' |'


class Failure(Exception):
    """A host with units does not work."""


def host_modules() -> list[str]:
    return [module for module in timm.list_modules() if module not in OUR_MODULES]


@cache
def by_size(module: str) -> list[str]:
    """Return the names of a module's models, sorted by their number of parameters."""
    counts = {}
    for name in timm.list_models(module=module):
        with torch.device('meta'):
            counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return sorted(counts, key=lambda name: (counts[name], name))


def by_act_layer(module: str, model: str | None = None) -> Row:
    """Test `act_layer` by name, then as a class, with `model` or the smallest model that takes the argument."""
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


def by_replacing(module: str, model: str | None = None, where: str = 'all') -> Row:
    """Test `replace_activations` with `model` or the smallest model."""
    name = model or by_size(module)[0]

    def make(act: str, **kwargs) -> nn.Module:
        return replace_activations(timm.create_model(name, **kwargs), act, where=where)

    with torch.device('meta'):
        if not any(is_activation(m) for m in timm.create_model(name).modules()):
            return Row(module, name, '-', 'has no activation module')
    way = 'replace' if where == 'all' else where
    return _row(module, name, way, *(partial(make, act) for act in ('atac', 'se_act', 'nin')))


def by_paper(module: str, model: str | None = None) -> Row:
    """Test `replace_activations(where='paper')` with `model` or the smallest model."""
    return by_replacing(module, model, 'paper')


def takes_act_layer(name: str) -> bool:
    """True unless the model refuses the argument `act_layer`. Other errors are found later."""
    try:
        with torch.device('meta'):
            timm.create_model(name, act_layer=nn.ReLU)
    except TypeError as error:
        return re.search(_REFUSES_ACT_LAYER, str(error)) is None
    except Exception:
        return True
    return True


def _row(module: str, name: str, way: str, make: Make, se_act: Make, nin: Make) -> Row:
    torch.manual_seed(0)
    try:
        x = sample_input(name)
        model = make()
        layouts = input_layouts(model, x)
        result = 'ok' + train_units(model, x)
        check_state_dict(model, make(), x)
    except Exception as error:
        return Row(module, name, way, describe_error(error))
    inside = {m for unit in units(model) for m in unit.modules()}
    left = sum(is_activation(m) and m not in inside for m in model.modules())
    count = len(units(model))
    added = sum(p.numel() for _, p in unit_parameters(model))
    others = sum(p.numel() for p in model.parameters()) - added
    shared = sum(r.places > 1 for r in model.replaced_activations.replaced) if way in ('replace', 'paper') else 0
    spatial = layouts <= {'NCHW', 'NHWC'}
    return Row(
        module,
        name,
        way,
        result,
        f'{count} of {count + left}' + (f', {shared} shared' if shared else ''),
        f'{others / 1e6:.2f} M + {added / 1e6:.2f} M',
        ' '.join(sorted(layouts)),
        check_features(name, make),
        try_training(se_act, x) if spatial else '-',
        try_training(nin, x) if spatial else '-',
    )


def units(model: nn.Module) -> list[ChannelModule]:
    return [m for m in model.modules() if isinstance(m, ChannelModule)]


def input_layouts(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Return the layouts of the units' inputs in a forward pass.

    Raises:
        Failure: The model has no unit, or a unit is for another width or layout than that of its input.
    """
    traced: set[nn.Module] = set(units(model))
    if not traced:
        raise Failure('takes act_layer but creates no activation from it')
    layouts = set()
    for invocation, call in trace(model, (x,), traced).calls():
        unit = call.activation
        if isinstance(unit, ChannelModule):
            if call.width is None:
                raise Failure(f'{type(invocation.module).__name__} calls a unit with {call.shape}, of unknown layout')
            channels, input_fmt = call.width
            last = [fmt in ('NHWC', 'NLC') for fmt in (input_fmt, unit.input_fmt)]
            if channels != unit.channels or (last[0] != last[1] and len(call.shape) > 2):
                raise Failure(f'a unit for {unit.channels} channels in {unit.input_fmt} gets {channels} in {input_fmt}')
            layouts.add(input_fmt)
    return layouts


def train_units(model: nn.Module, x: torch.Tensor) -> str:
    """Train until every parameter of every unit has changed.

    Returns:
        '', or the number of units that cannot change because the host gives them a constant input.

    Raises:
        Failure: Parameters of other units have not changed after `STEPS` steps.
    """
    model.train()
    start = {k: p.detach().clone() for k, p in unit_parameters(model)}
    # RMSprop's steps do not depend on the size of the gradient, and it has one state per parameter, of up to 412 M
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.0, eps=1e-30)
    with torch.no_grad():
        target = torch.randn_like(output(model, x))
    unchanged: list[str] = []
    for _ in range(STEPS):
        (output(model, x) - target).square().mean().backward()
        optimizer.step()
        model.zero_grad()
        unchanged = [k for k, p in unit_parameters(model) if torch.equal(p, start[k])]
        if not unchanged:
            return ''
    constant = with_constant_input(model, x)
    unexplained = [k for k in unchanged if not k.startswith(tuple(f'{name}.' for name in constant))]
    why = f'{len(constant)} units get a constant input'
    if unexplained:
        also = f'; {why}' if constant else ''
        raise Failure(f'{len(unexplained)} of {len(start)} parameters of units do not change{also}: {unexplained[:3]}')
    return f'; {why}'


def with_constant_input(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Return the names of the units whose input is the same at every position of every image."""
    names = {unit: name for name, unit in model.named_modules() if isinstance(unit, ChannelModule)}
    varies: Counter[str] = Counter()

    def compare(unit: ChannelModule, args: tuple) -> None:
        rows = args[0].detach().transpose(1 if unit.input_fmt in ('NCHW', 'NCL') else -1, -1).flatten(0, -2)
        varies[names[unit]] += int((rows - rows[:1]).abs().max() > 1e-6)

    handles = [unit.register_forward_pre_hook(compare) for unit in names]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [name for name, count in varies.items() if not count]


def check_state_dict(model: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    """Load the state dict of `model` into `other`, and raise `Failure` if their outputs differ."""
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        if not torch.allclose(output(other.eval(), x), output(model.eval(), x), rtol=1e-4, atol=1e-5):
            raise Failure('the output differs after loading the state dict')


def try_training(make: Make, x: torch.Tensor) -> str:
    try:
        return 'ok' + train_units(make(), x)
    except Exception as error:
        return describe_error(error)


def unit_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, unit in model.named_modules():
        if isinstance(unit, ChannelModule):
            yield from ((f'{name}.{k}', p) for k, p in unit.named_parameters())


def sample_input(name: str) -> torch.Tensor:
    """Return a random batch in the first of a few small sizes that the model accepts.

    Patches and windows must divide the size.
    """
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


def check_features(name: str, make: Make) -> str:
    try:
        host = timm.create_model(name, features_only=True)
    except Exception:
        return '-'
    x = sample_input(name)
    try:
        with torch.no_grad():
            shapes = [f.shape for f in make(features_only=True)(x)]
            return 'ok' if shapes == [f.shape for f in host(x)] else f'{shapes}'
    except Exception as error:
        return describe_error(error)


def describe_error(error: BaseException) -> str:
    if isinstance(error, ForwardError) and error.__cause__ is not None:
        error = error.__cause__  # the exception that the model raised
    text = str(error) if isinstance(error, Failure) else f'{type(error).__name__}: {error}'
    return re.sub(r'\s+', ' ', text).replace('|', '/')


def check_widths(name: str) -> tuple[str, str, str]:
    """Check the widths of a model's units on the meta device. Return its name, the way, and 'ok' or the reason."""
    if not takes_act_layer(name):
        return name, '-', NO_ACT_LAYER
    x = torch.zeros(2, *timm.get_pretrained_cfg(name).input_size, device='meta')  # type: ignore[union-attr]
    result = ''
    for way, act in (('name', 'atac'), ('class', ATAC)):
        try:
            with torch.device('meta'):
                model = timm.create_model(name, act_layer=act)
            input_layouts(model, x)
            return name, way, 'ok'
        except Exception as error:
            result = result or describe_error(error)
    return name, '-', result

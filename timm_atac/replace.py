"""ATAC in place of the activations of a finished model, whatever it is and wherever it is from."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import LayerType, get_act_layer
from torch.utils._pytree import tree_map_only

from .complete import ChannelModule
from .placement import create_activation
from .rewrite import Site, Untraceable, rewrite, sites_of
from .selection import Selection, Where
from .trace import Call, Invocation, Trace, is_activation, trace

__all__ = ['Replaced', 'Report', 'UnitPerWidth', 'replace_activations']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replaced:
    """A unit in its model."""

    name: str
    was: str  # type of the activation
    channels: int
    input_fmt: str
    places: int  # how often a forward pass calls it; several share its parameters


@dataclass(frozen=True)
class Report:
    """What `replace_activations` did to a model."""

    act: str
    replaced: tuple[Replaced, ...]
    left: tuple[tuple[str, str], ...]  # activation, and why it stayed

    def __str__(self) -> str:
        lines = [f'{len(self.replaced)} units ({self.act})']
        lines += [
            f'  {r.name}: {r.was} -> {r.channels} channels, {r.input_fmt}'
            + (f', shared by {r.places} places' if r.places > 1 else '')
            for r in self.replaced
        ]
        lines += [f'  {name} stays: {reason}' for name, reason in self.left]
        return '\n'.join(lines)


class UnitPerWidth(nn.Module):
    """Units in place of one activation that is called with several widths; the one whose width fits is used.

    Args:
        units: Units of different `channels`, of which all have the same layout.
    """

    def __init__(self, units: Sequence[ChannelModule]) -> None:
        super().__init__()
        self.units = nn.ModuleDict({str(unit.channels): unit for unit in units})
        self.channel_dim = 1 if units[0].input_fmt in ('NCHW', 'NCL') else -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = str(x.shape[self.channel_dim])
        if width not in self.units:
            raise ValueError(
                f'Got an input of shape {tuple(x.shape)}: expected {", ".join(self.units)} channels in dimension '
                f'{self.channel_dim}, the widths the model had when its activations were replaced.'
            )
        return self.units[width](x)


def replace_activations(
    model: nn.Module,
    act: LayerType = 'atac',
    *,
    where: Where | Sequence[Where] | None = None,
    example_input: Any = None,
    rd_ratio: float | None = None,
) -> nn.Module:
    """Put units in place of a model's activations. Its weights and everything else stay as they are.

    One forward pass, on the `meta` device where the model can do that, tells width and layout of each activation. An
    activation module that is called at several places becomes one unit for each, by rewriting the module that calls it
    with torch.fx; where its forward pass has no one graph, one unit for each width. Activations called as functions
    are replaced in the same way, or stay.

    Args:
        model: Any model; changed in place, all of it or, with an error, nothing.
        act: 'atac', 'se_act', 'nin', a class or `partial` whose constructor takes `channels` and `input_fmt`.
        where: Which activations, None for all: a pattern of names (`'layer4.*'`), a type (`nn.GELU`), a stage by its
            number from 1 as `atac_stages` has it, or from the last (`(-2, -1)`; by the model's `feature_info`), a
            function of name and module; or several of those, of which one has to fit.
        example_input: What the model takes: a tensor, or a tuple of positional arguments. None is a batch of two of
            the model's `pretrained_cfg`, or (2, 3, 224, 224).
        rd_ratio: Width of the units' bottleneck over the channels, None for their own (0.5).

    Returns:
        The model. Its `replaced_activations` is a `Report`, which is also logged: as a warning if anything in `where`
        stayed as it was or shares a unit.

    Raises:
        ValueError: `where` fits no activation that can be replaced, the model does not take `example_input`, or `act`
            is no unit.
    """
    selection = Selection(where)
    _check_act(act)
    inputs = _inputs(model, example_input)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    watch = {m for m in names if is_activation(m) or isinstance(m, selection.types)}
    seen = _trace(model, inputs, watch)
    selection.watch_stages(model, seen)

    plan = Plan(model, names, watch, seen, selection, act, rd_ratio)
    if not plan.replaced:
        left = ''.join(f' {name} stays: {reason}.' for name, reason in plan.left[:10])
        there = [name for activation in plan.activations for name in names[activation]]
        raise ValueError(
            f'where={where!r} fits no activation of {type(model).__name__} that can be replaced.{left} '
            f'There are {len(there)} activation modules: {", ".join(there[:10])}{", ..." if len(there) > 10 else ""}'
        )
    undo = plan.apply()
    try:
        shapes = _shapes(_trace(model, inputs, watch).output)
        if shapes != _shapes(seen.output):
            raise RuntimeError(f'the output would be {shapes}, not {_shapes(seen.output)}')
    except BaseException:
        undo()
        raise
    report = Report(_act_name(act), tuple(plan.replaced), tuple(plan.left))
    model.replaced_activations = report  # type: ignore[assignment]
    shared = [r for r in report.replaced if r.places > 1]
    _logger.log(logging.WARNING if report.left or shared else logging.INFO, '%s: %s', type(model).__name__, report)
    return model


class Plan:
    """What goes where; nothing is changed before `apply`."""

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[nn.Module, list[str]],
        watch: set[nn.Module],
        seen: Trace,
        selection: Selection,
        act: LayerType,
        rd_ratio: float | None,
    ) -> None:
        inside_units = {m for unit in names if isinstance(unit, ChannelModule) for m in unit.modules()}
        self.activations = [m for m in names if m in watch and m not in inside_units]
        self.replaced: list[Replaced] = []
        self.left: list[tuple[str, str]] = []
        self._model, self._names = model, names
        self._act, self._rd_ratio = act, rd_ratio
        self._children: list[tuple[nn.Module, str, nn.Module]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []

        chosen = {
            id(call)
            for invocation, call in seen.calls()
            if call.activation in self.activations or isinstance(call.activation, str)
            if selection.fits(self._names_of(call, invocation), call.activation, invocation.module, call.step)
        }
        by_owner: dict[nn.Module, list[Invocation]] = defaultdict(list)
        for invocation in seen.invocations:
            if any(id(call) in chosen for call in invocation.calls):
                by_owner[invocation.module].append(invocation)
        for owner, invocations in by_owner.items():
            if _several_sites(invocations, chosen):
                chosen -= self._rewrite(owner, invocations, chosen)

        remaining: dict[nn.Module, list[tuple[nn.Module, Call]]] = defaultdict(list)
        for invocation, call in seen.calls():
            if id(call) in chosen and isinstance(call.activation, nn.Module):
                remaining[call.activation].append((invocation.module, call))
        for activation, calls in remaining.items():
            self._replace(activation, calls)

        called = {call.activation for _, call in seen.calls()}
        for activation in self.activations:
            if activation not in called and selection.fits(names[activation], activation, activation, None):
                self.left.append((names[activation][0], 'the forward pass does not call it'))

    def apply(self) -> Callable[[], None]:
        """Change the model; returns what changes it back."""
        touched: list[Any] = [parent for parent, *_ in (*self._children, *self._classes)]
        parents = {parent: (type(parent), dict(parent._modules)) for parent in touched}

        def undo() -> None:
            for parent, (cls, children) in parents.items():
                parent.__class__ = cls
                parent._modules.clear()
                parent._modules.update(children)

        try:
            for parent, name, child in self._children:
                setattr(parent, name, child)
            for module, cls in self._classes:
                module.__class__ = cls
        except BaseException:
            undo()
            raise
        return undo

    def _names_of(self, call: Call, invocation: Invocation) -> list[str]:
        if isinstance(call.activation, nn.Module):
            return self._names[call.activation]
        return [_join(owner, call.activation) for owner in self._names.get(invocation.module, [''])]

    def _rewrite(self, owner: nn.Module, invocations: list[Invocation], chosen: set[int]) -> set[int]:
        """Plan a unit for each place in `owner`; returns the calls that are done with."""
        name = self._names[owner][0]
        calls = [call for invocation in invocations for call in invocation.calls if id(call) in chosen]
        try:
            if len({(i.arguments, tuple(call.activation for call in i.calls)) for i in invocations}) > 1:
                raise Untraceable('it is called in several ways')
            graph, sites = sites_of(owner, invocations[0])
            units: list[ChannelModule | None] = []
            for at_site in zip(*(invocation.calls for invocation in invocations), strict=True):
                wanted = [call for call in at_site if id(call) in chosen]
                units.append(self._units(wanted, several=False)[0] if wanted else None)
            cls, children = rewrite(owner, graph, sites, units)
        except Untraceable as error:
            functions = Counter(call.activation for call in calls if isinstance(call.activation, str))
            self.left += [(_join(name, f'{f}()'), f'a function, and {error}') for f in functions]
            return {id(call) for call in calls if isinstance(call.activation, str)}
        self._classes.append((owner, cls))
        at: dict[Any, Site] = {unit: site for unit, site in zip(units, sites, strict=True)}
        for child, unit in children.items():
            self._children.append((owner, child, unit))
            self._note(_join(name, child), at[unit].was, cast(ChannelModule, unit), len(invocations))
        return {id(call) for call in calls}

    def _replace(self, activation: nn.Module, calls: list[tuple[nn.Module, Call]]) -> None:
        """Plan the units for an activation at each of its names."""
        parents = [self._names_to_parent(name) for name in self._names[activation]]
        owners = {owner for owner, _ in calls}
        made: dict[tuple[int, ...], nn.Module] = {}
        for name, parent in zip(self._names[activation], parents, strict=True):
            # called by somebody else than the module that has it: then the calls of all are meant
            here = [c for owner, c in calls if owner is parent or not owners <= set(parents)]
            if not here or not name:
                continue
            key = tuple(id(call) for call in here)
            if key not in made:
                try:
                    units = self._units(here, several=True)
                except Untraceable as error:
                    self.left.append((name, str(error)))
                    continue
                made[key] = units[0] if len(units) == 1 else UnitPerWidth(units)
                made[key].train(activation.training)
                for unit in units:
                    full = name if len(units) == 1 else f'{name}.units.{unit.channels}'
                    self._note(full, type(activation).__name__, unit, sum(_width(c)[0] == unit.channels for c in here))
            self._children.append((parent, name.rpartition('.')[2], made[key]))

    def _names_to_parent(self, name: str) -> nn.Module:
        return self._model.get_submodule(name.rpartition('.')[0])

    def _units(self, calls: list[Call], several: bool) -> list[ChannelModule]:
        """A unit for each width of the calls."""
        widths = {_width(call) for call in calls}
        layouts = {input_fmt for _, input_fmt in widths}
        if layouts == {'NCHW', 'NCL'}:
            layouts = {'NCL'}
        if len(layouts) > 1 or (len(widths) > 1 and not several):
            found = ', '.join(f'{channels} in {input_fmt}' for channels, input_fmt in sorted(widths))
            raise Untraceable(f'it is called with {found} channels')
        like = next((t for t in _floating(calls[0].layer)), None)
        like = next(_floating(self._model), None) if like is None else like
        units = []
        for channels in sorted({channels for channels, _ in widths}):
            unit: Any = create_activation(
                self._act,
                channels,
                self._rd_ratio,
                input_fmt=next(iter(layouts)),
                device=None if like is None else like.device,
                dtype=None if like is None else like.dtype,
            )
            units.append(unit.train(self._model.training))
        return units

    def _note(self, name: str, was: str, unit: ChannelModule, places: int) -> None:
        self.replaced.append(Replaced(name, was, unit.channels or 0, unit.input_fmt, places))


def _several_sites(invocations: list[Invocation], chosen: set[int]) -> bool:
    """Whether a forward calls an activation at several places, or as a function."""
    for invocation in invocations:
        counts = Counter(call.activation for call in invocation.calls if id(call) in chosen)
        if any(count > 1 or isinstance(activation, str) for activation, count in counts.items()):
            return True
    return False


def _width(call: Call) -> tuple[int, str]:
    """Channels and layout of a call's input."""
    dim, dims = call.channel_dim, len(call.shape)
    if dim is None or dims < 2:
        raise Untraceable(f'which dimension of its input {call.shape} has the channels cannot be told')
    if dim == 1 and dims > 2:
        return call.shape[1], 'NCHW' if dims == 4 else 'NCL'
    return call.shape[-1], 'NHWC' if dims == 4 else 'NLC'


def _join(*names: str) -> str:
    return '.'.join(name for name in names if name)


def _floating(module: nn.Module | None) -> Iterator[torch.Tensor]:
    if module is not None:
        yield from (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def _check_act(act: LayerType) -> None:
    try:
        layer = get_act_layer(act)
        accepted = signature(layer).parameters if layer is not None else {}
    except (KeyError, TypeError, ValueError):
        accepted = {}
    if not {'channels', 'input_fmt'} <= set(accepted):
        raise ValueError(
            f"act={act!r}: expected 'atac', 'se_act', 'nin', or a class or partial whose constructor takes `channels` "
            f'and `input_fmt`, such as partial(timm_atac.ATAC, gate_layer=...).'
        )


def _act_name(act: LayerType) -> str:
    return act if isinstance(act, str) else getattr(act, '__name__', repr(act))


def _inputs(model: nn.Module, example_input: Any) -> tuple:
    if isinstance(example_input, (tuple, list)):
        return tuple(example_input)
    if example_input is not None:
        return (example_input,)
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    like = next(_floating(model), torch.empty(0))
    return (torch.zeros(2, *cfg.get('input_size', (3, 224, 224)), device=like.device, dtype=like.dtype),)


def _trace(model: nn.Module, inputs: tuple, watch: set[nn.Module]) -> Trace:
    try:
        return trace(model, inputs, watch)
    except Exception as error:
        raise ValueError(
            f'{type(model).__name__} does not run on {_shapes(inputs)}: {type(error).__name__}: {error} '
            f'Give an example_input that it takes, a tensor or a tuple of positional arguments.'
        ) from error


def _shapes(values: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: tuple(t.shape), values)

"""Which unit goes where in a finished model: decided from a watched forward pass, then done all at once, or undone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.layers import LayerType

from ..units.create import create_activation
from ..units.deferred import ChannelModule
from ..utils.forward_pass import floating
from .rewrite import Untraceable, called_for_effect, rewrite, sites_of
from .trace import Call, Invocation, Trace
from .where import Selection

__all__ = ['Edits', 'Replaced', 'UnitPerWidth']

_HOOKS = [name for name in vars(nn.Identity()) if 'hook' in name and 'state_dict' not in name]


@dataclass(frozen=True)
class Replaced:
    """A unit in its model."""

    name: str
    was: str  # type of the activation
    channels: int
    input_fmt: str
    places: int  # how often a forward pass calls it; several share its parameters


class UnitPerWidth(nn.Module):
    """Units in place of one activation that is called with several widths; the one whose width fits is used.

    Args:
        units: Units for different widths, by those.
        channel_dim: Dimension of the channels, 1 or -1, in the input of all of them.
    """

    def __init__(self, units: Mapping[int, nn.Module], channel_dim: int) -> None:
        super().__init__()
        self.units = nn.ModuleDict({str(channels): unit for channels, unit in units.items()})
        self.channel_dim = channel_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = str(int(x.shape[self.channel_dim]))
        if width not in self.units:
            raise ValueError(
                f'Got an input of shape {tuple(x.shape)}: expected {", ".join(self.units)} channels in dimension '
                f'{self.channel_dim}, the widths the model had when its activations were replaced.'
            )
        return self.units[width](x)


class _Unit(NamedTuple):
    module: nn.Module
    channels: int
    input_fmt: str


class Edits:
    """What goes where in a model; nothing is changed before `apply`.

    Args:
        model: Unchanged.
        names: All names of all its modules.
        watch: What counts as an activation.
        seen: A forward pass.
        selection: Which activations are meant.
        act: As in `replace_activations`.
        rd_ratio: As in `replace_activations`.

    Attributes:
        activations: The activation modules that are in the model.
        replaced: The units to come.
        units: Their modules.
        left: Activations that are meant and stay, and why.
        where: `selection`, for a config.json.
    """

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
        self.units: list[nn.Module] = []
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
        self.where = selection.portable(
            self._names_of(call, invocation)[0] for invocation, call in seen.calls() if id(call) in chosen
        )
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
        before = {module: (type(module), dict(vars(module)), dict(module._modules)) for module in touched}

        def undo() -> None:
            for module, (cls, attributes, children) in before.items():
                module.__class__ = cls
                vars(module).update(attributes)
                module._modules.clear()
                module._modules.update(children)

        try:
            for parent, name, child in self._children:
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # PyTorch's fast path would compute the one that was there
                setattr(parent, name, child)
            for module, cls in self._classes:
                module.__class__ = cls
        except BaseException:
            undo()
            raise
        return undo

    def _names_of(self, call: Call, invocation: Invocation) -> list[str]:
        """Names of what is called: those in the caller, if it has any of them."""
        callers = self._names.get(invocation.module, [''])
        if isinstance(call.activation, str):
            return [_join(caller, call.activation) for caller in callers]
        names = self._names[call.activation]
        return [name for name in names if name.rpartition('.')[0] in callers] or names

    def _rewrite(self, owner: nn.Module, invocations: list[Invocation], chosen: set[int]) -> set[int]:
        """Edits a unit for each place in `owner`; returns the calls that are done with."""
        name = self._names[owner][0]
        calls = [call for invocation in invocations for call in invocation.calls if id(call) in chosen]
        try:
            if len({(i.arguments, tuple(call.activation for call in i.calls)) for i in invocations}) > 1:
                raise Untraceable('it is called in several ways')
            graph, sites, fixed = sites_of(owner, invocations[0])
            units: list[_Unit | None] = []
            for at_site in zip(*(invocation.calls for invocation in invocations), strict=True):
                wanted = [call for call in at_site if id(call) in chosen]
                units.append(self._make(wanted, owner.training, several=False)[0] if wanted else None)
                if wanted:
                    _take_hooks(units[-1].module, at_site[0].activation)  # type: ignore[union-attr]
            modules = [unit.module if unit is not None else None for unit in units]
            cls, children = rewrite(owner, graph, sites, modules, fixed)
        except Untraceable as error:
            functions = Counter(call.activation for call in calls if isinstance(call.activation, str))
            self.left += [(_join(name, f'{f}()'), f'a function, and {error}') for f in functions]
            return {id(call) for call in calls if isinstance(call.activation, str)}
        self._classes.append((owner, cls))
        at: dict[Any, tuple[_Unit, str]] = {u.module: (u, s.was) for u, s in zip(units, sites, strict=True) if u}
        for child, module in children.items():
            self._children.append((owner, child, module))
            unit, was = at[module]
            self._note(_join(name, child), was, unit, len(invocations))
        return {id(call) for call in calls}

    def _replace(self, activation: nn.Module, calls: list[tuple[nn.Module, Call]]) -> None:
        """Edits the units for an activation at each of its names."""
        parents = [self._model.get_submodule(name.rpartition('.')[0]) for name in self._names[activation]]
        owners = {owner for owner, _ in calls}
        made: dict[tuple[int, ...], nn.Module] = {}
        for name, parent in zip(self._names[activation], parents, strict=True):
            # called by somebody else than the module that has it: then the calls of all are meant
            here = [c for owner, c in calls if owner is parent or not owners <= set(parents)]
            if not here or not name:
                continue
            child = name.rpartition('.')[2]
            key = tuple(id(call) for call in here)
            if key not in made:
                try:
                    if getattr(activation, 'inplace', False) and called_for_effect(parent, child):
                        raise Untraceable('it is called for its effect on the input, which a unit does not have')
                    units = self._make(here, activation.training, several=True)
                except Untraceable as error:
                    self.left.append((name, str(error)))
                    continue
                dim = 1 if units[0].input_fmt in ('NCHW', 'NCL') else -1
                several = UnitPerWidth({unit.channels: unit.module for unit in units}, dim)
                made[key] = (several if len(units) > 1 else units[0].module).train(activation.training)
                _take_hooks(made[key], activation)
                for unit in units:
                    full = name if len(units) == 1 else f'{name}.units.{unit.channels}'
                    places = sum(_width(call)[0] == unit.channels for call in here)
                    self._note(full, type(activation).__name__, unit, places)
            self._children.append((parent, child, made[key]))

    def _make(self, calls: list[Call], training: bool, several: bool) -> list[_Unit]:
        """A unit for each width of the calls."""
        widths = {_width(call) for call in calls}
        layouts = {input_fmt for _, input_fmt in widths}
        if layouts == {'NCHW', 'NCL'}:
            layouts = {'NCL'}
        if len(layouts) > 1 or (len(widths) > 1 and not several):
            found = ', '.join(f'{channels} in {input_fmt}' for channels, input_fmt in sorted(widths))
            raise Untraceable(f'it is called with {found} channels')
        input_fmt = next(iter(layouts))
        like = next(floating(calls[0].layer), None)
        like = next(floating(self._model), None) if like is None else like
        dd: dict[str, Any] = {} if like is None else {'device': like.device, 'dtype': like.dtype}
        return [
            _Unit(
                create_activation(self._act, channels, self._rd_ratio, input_fmt=input_fmt, **dd).train(training),
                channels,
                input_fmt,
            )
            for channels in sorted({channels for channels, _ in widths})
        ]

    def _note(self, name: str, was: str, unit: _Unit, places: int) -> None:
        self.replaced.append(Replaced(name, was, unit.channels, unit.input_fmt, places))
        self.units.append(unit.module)


def _take_hooks(unit: nn.Module, activation: nn.Module | str) -> None:
    """Let the hooks on an activation, timm's for features among them, watch what takes its place."""
    if isinstance(activation, nn.Module):
        vars(unit).update({name: copy(vars(activation)[name]) for name in _HOOKS if name in vars(activation)})


def _several_sites(invocations: Sequence[Invocation], chosen: set[int]) -> bool:
    """Whether a forward calls an activation at several places, or as a function."""
    for invocation in invocations:
        counts = Counter(call.activation for call in invocation.calls if id(call) in chosen)
        if any(count > 1 or isinstance(activation, str) for activation, count in counts.items()):
            return True
    return False


def _width(call: Call) -> tuple[int, str]:
    if call.width is None:
        raise Untraceable(f'which dimension of its input {call.shape} has the channels cannot be told')
    return call.width


def _join(*names: str) -> str:
    return '.'.join(name for name in names if name)

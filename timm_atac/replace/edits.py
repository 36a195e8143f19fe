"""Decides which unit replaces which activation, from one observed forward pass, and then changes the model."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerType

from ..units.create import create_activation
from ..units.deferred import ChannelModule
from ..utils.forward_pass import floating_point_tensors
from .rewrite import NotReplaceable, find_sites, result_is_discarded, rewrite
from .trace import Call, Invocation, Trace
from .where import Selection

__all__ = ['Edits', 'Replaced', 'UnitPerWidth']

_HOOKS = [name for name in vars(nn.Identity()) if 'hook' in name and 'state_dict' not in name]


@dataclass(frozen=True)
class Replaced:
    """A unit that has replaced an activation."""

    name: str
    was: str  # type of the activation, or the function with '()'
    channels: int
    input_fmt: str
    places: int  # calls in one forward pass; several calls share the parameters


class UnitPerWidth(nn.Module):
    """Replaces one activation that is called with several widths: each input goes to the unit for its width.

    The widths are those of the units now, which may have been pruned. Their names stay.

    Args:
        units: The units by the number of their channels.
        channel_dim: The dimension of the channels in every input, 1 or -1.

    Raises:
        ValueError: No unit has the width of the input, or several have it.
    """

    def __init__(self, units: Mapping[int, nn.Module], channel_dim: int) -> None:
        super().__init__()
        self.units = nn.ModuleDict({str(channels): unit for channels, unit in units.items()})
        self.channel_dim = channel_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = int(x.shape[self.channel_dim])
        widths = {
            name: unit.channels if isinstance(unit, ChannelModule) else int(name) for name, unit in self.units.items()
        }
        names = [name for name, channels in widths.items() if channels == width]
        if len(names) != 1:
            raise ValueError(
                f'Got an input of shape {tuple(x.shape)}: expected the channels of one unit in dimension '
                f'{self.channel_dim}. The units have {", ".join(map(str, widths.values()))} channels.'
            )
        return self.units[names[0]](x)


class Edits:
    """The changes to a model that replace its selected activations. Nothing changes before `applied`.

    Args:
        model: The model.
        activations: The modules that count as activations.
        trace: A forward pass of the model.
        selection: Selects activations.
        act: As in `replace_activations`.
        rd_ratio: As in `replace_activations`.

    Attributes:
        activation_names: The names of all activation modules, except for those inside of units.
        replaced: The new units, and what the report says about them.
        kept: The selected activations that stay, and why.
        where: The `where` for a config.json.
    """

    def __init__(
        self,
        model: nn.Module,
        activations: Collection[nn.Module],
        trace: Trace,
        selection: Selection,
        act: LayerType,
        rd_ratio: float | None,
    ) -> None:
        self._model, self._act, self._rd_ratio = model, act, rd_ratio
        self._names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            self._names[module].append(name)
        inside_units = {m for unit in self._names if isinstance(unit, ChannelModule) for m in unit.modules()}
        candidates = [m for m in self._names if m in activations and m not in inside_units]
        self.activation_names = [name for activation in candidates for name in self._names[activation]]
        self.replaced: dict[nn.Module, Replaced] = {}
        self.kept: list[tuple[str, str]] = []
        self._children: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, new child
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []  # module, new class

        selected: dict[int, str] = {}  # the name of the activation by the id of its call
        by_caller: dict[nn.Module, list[Invocation]] = defaultdict(list)
        for invocation in trace.invocations:
            for call in invocation.calls:
                names = self._names_of(call, invocation.module)
                is_candidate = isinstance(call.activation, str) or call.activation in candidates
                if is_candidate and selection.selects(names, call.activation, invocation.module, call.step):
                    selected[id(call)] = names[0]
            if any(id(call) in selected for call in invocation.calls):
                by_caller[invocation.module].append(invocation)
        self.where = selection.serializable(selected.values())

        for caller, invocations in by_caller.items():
            if _needs_rewriting(invocations, selected):
                self._rewrite(caller, invocations, selected)
        rewritten = [module for module, _ in self._classes]
        by_activation: dict[nn.Module, list[tuple[nn.Module, Call]]] = defaultdict(list)
        for invocation, call in trace.calls():
            if id(call) in selected and isinstance(call.activation, nn.Module) and invocation.module not in rewritten:
                by_activation[call.activation].append((invocation.module, call))
        for activation, calls in by_activation.items():
            self._replace(activation, calls)

        called = {call.activation for _, call in trace.calls()}
        for activation in candidates:
            names = self._names[activation]
            if activation not in called and selection.selects(names, activation, activation, None):
                self.kept.append((names[0], 'the forward pass does not call it'))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Change the model. If the body of the `with` statement raises an exception, the model is changed back."""
        touched: list[Any] = [parent for parent, *_ in (*self._children, *self._classes)]
        before = {module: (type(module), dict(vars(module)), dict(module._modules)) for module in touched}
        try:
            for parent, name, child in self._children:
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # else PyTorch's fast path computes ReLU or GELU itself
                setattr(parent, name, child)
            for module, cls in self._classes:
                module.__class__ = cls
            yield
        except BaseException:
            for module, (cls, attributes, children) in before.items():
                module.__class__ = cls
                vars(module).update(attributes)
                module._modules.clear()
                module._modules.update(children)
            raise

    def _names_of(self, call: Call, caller: nn.Module) -> list[str]:
        """Return the names of what is called. Of a module with several names, those inside of its caller if any."""
        if isinstance(call.activation, str):
            return [_join(name, call.activation) for name in self._names[caller]]
        names = self._names[call.activation]
        return [name for name in names if name.rpartition('.')[0] in self._names[caller]] or names

    def _rewrite(self, caller: nn.Module, invocations: list[Invocation], selected: Collection[int]) -> None:
        """Add a unit for each place in the forward of `caller` that calls a selected activation."""
        name = self._names[caller][0]
        units: list[nn.Module | None] = []
        descriptions: dict[nn.Module, tuple[str, int, str, int]] = {}
        try:
            if len({(i.arguments, tuple(call.activation for call in i.calls)) for i in invocations}) > 1:
                raise NotReplaceable('it is called in several ways')
            graph, sites, constants = find_sites(caller, invocations[0])
            for site, *calls in zip(sites, *(invocation.calls for invocation in invocations), strict=True):
                calls = [call for call in calls if id(call) in selected]
                unit = None
                if calls:
                    created, input_fmt = self._create_units(calls, caller.training, several=False)
                    ((channels, unit),) = created.items()
                    _copy_hooks(calls[0].activation, unit)
                    descriptions[unit] = (_describe(site.activation), channels, input_fmt, len(invocations))
                units.append(unit)
            cls, children = rewrite(caller, graph, sites, units, constants)
        except NotReplaceable as error:
            functions = {call.activation: None for i in invocations for call in i.calls if id(call) in selected}
            self.kept += [
                (_join(name, _describe(f)), f'a function, and {error}') for f in functions if isinstance(f, str)
            ]
            return
        self._classes.append((caller, cls))
        for child, unit in children.items():
            self._children.append((caller, child, unit))
            self.replaced[unit] = Replaced(_join(name, child), *descriptions[unit])

    def _replace(self, activation: nn.Module, calls: list[tuple[nn.Module, Call]]) -> None:
        """Add units for an activation module under each of its names."""
        parents = [self._model.get_submodule(name.rpartition('.')[0]) for name in self._names[activation]]
        only_parents_call = {caller for caller, _ in calls} <= set(parents)
        new_modules: dict[tuple[int, ...], nn.Module] = {}
        for name, parent in zip(self._names[activation], parents, strict=True):
            # a call by another module than a parent may be of any of the names
            own_calls = [call for caller, call in calls if caller is parent or not only_parents_call]
            if not own_calls or not name:
                continue
            child = name.rpartition('.')[2]
            key = tuple(id(call) for call in own_calls)
            if key not in new_modules:
                try:
                    if getattr(activation, 'inplace', False) and result_is_discarded(parent, child):
                        raise NotReplaceable('it is called for its effect on the input, which a unit does not have')
                    units, input_fmt = self._create_units(own_calls, activation.training, several=True)
                except NotReplaceable as error:
                    self.kept.append((name, str(error)))
                    continue
                if len(units) == 1:
                    (new_modules[key],) = units.values()
                else:
                    new_modules[key] = UnitPerWidth(units, 1 if input_fmt in ('NCHW', 'NCL') else -1)
                new_modules[key].train(activation.training)
                _copy_hooks(activation, new_modules[key])
                for channels, unit in units.items():
                    full_name = name if len(units) == 1 else f'{name}.units.{channels}'
                    places = sum(_width(call)[0] == channels for call in own_calls)
                    self.replaced[unit] = Replaced(full_name, _describe(activation), channels, input_fmt, places)
            self._children.append((parent, child, new_modules[key]))

    def _create_units(self, calls: list[Call], training: bool, several: bool) -> tuple[dict[int, nn.Module], str]:
        """Return a unit for each width of the calls, by its channels, and the layout of their inputs."""
        widths = sorted({_width(call) for call in calls})
        layouts = {input_fmt for _, input_fmt in widths}
        if layouts == {'NCHW', 'NCL'}:
            layouts = {'NCL'}
        if len(layouts) > 1 or (len(widths) > 1 and not several):
            found = ', '.join(f'{channels} in {input_fmt}' for channels, input_fmt in widths)
            raise NotReplaceable(f'it is called with {found} channels')
        (input_fmt,) = layouts
        modules = [module for module in (calls[0].layer, self._model) if module is not None]
        reference = next((t for module in modules for t in floating_point_tensors(module)), torch.empty(0))
        dd: dict[str, Any] = {'device': reference.device, 'dtype': reference.dtype}
        return {
            channels: create_activation(self._act, channels, self._rd_ratio, input_fmt=input_fmt, **dd).train(training)
            for channels in dict(widths)
        }, input_fmt


def _copy_hooks(activation: nn.Module | str, unit: nn.Module) -> None:
    """Copy the hooks of an activation to the unit that replaces it. timm takes features by such hooks."""
    if isinstance(activation, nn.Module):
        vars(unit).update({name: copy(vars(activation)[name]) for name in _HOOKS if name in vars(activation)})


def _needs_rewriting(invocations: list[Invocation], selected: Collection[int]) -> bool:
    """True if one run of a forward calls a selected activation several times, or a selected function."""
    return any(
        count > 1 or isinstance(activation, str)
        for invocation in invocations
        for activation, count in Counter(call.activation for call in invocation.calls if id(call) in selected).items()
    )


def _width(call: Call) -> tuple[int, str]:
    if call.width is None:
        raise NotReplaceable(f'it is unknown which dimension of its input {call.shape} has the channels')
    return call.width


def _describe(activation: nn.Module | str) -> str:
    return f'{activation}()' if isinstance(activation, str) else type(activation).__name__


def _join(*names: str) -> str:
    return '.'.join(name for name in names if name)

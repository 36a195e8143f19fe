"""The places of a model whose activations can be replaced one by one, and their names."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch.fx as fx
import torch.nn as nn

from ..units.deferred import ChannelModule
from .rewrite import NotReplaceable, Site, find_sites, free_name, numbered, result_is_discarded
from .trace import Call, Invocation, Trace

__all__ = ['Place', 'Rewritable', 'SharedModule', 'callee_names', 'describe', 'find_places']


@dataclass(eq=False)
class Rewritable:
    """A module whose forward can be rewritten, so that each of its calls of an activation gets a unit of its own."""

    caller: nn.Module
    graph: fx.Graph
    sites: list[Site]
    names: list[str]  # of the child that each site gets
    constants: frozenset[str]
    needs_graph: list[bool]  # for each site: False if setting the child of this name is enough


@dataclass(eq=False)
class SharedModule:
    """An activation module, where it is registered, and its calls there."""

    activation: nn.Module
    parents: list[tuple[nn.Module, str]]  # with the names of the activation in them
    calls: list[Call]


@dataclass(eq=False)
class Place:
    """What can be replaced by one unit.

    Attributes:
        name: One name, whatever else is replaced. It is also the name of the unit in the changed model.
        aliases: Other names of the place, if the model has a module under several names.
        callee: The names of the activation module or function, which several places may share.
        activation: The module, or the name of the function.
        caller: The module that calls it first.
        calls: All calls in one forward pass.
        reason: Why it cannot be replaced, None if it can.
        owner: What has to be changed to replace it.
        site: Its index among the sites of a `Rewritable`.
    """

    name: str
    aliases: list[str]
    callee: list[str]
    activation: nn.Module | str
    caller: nn.Module
    calls: list[Call]
    reason: str | None = None
    owner: Rewritable | SharedModule | None = None
    site: int = 0
    width: tuple[int, str] = (0, 'NCHW')
    sort_key: tuple[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.sort_key = (self.calls[0].step if self.calls else 1 << 60, self.name)


def find_places(model: nn.Module, activations: Collection[nn.Module], trace: Trace) -> list[Place]:
    """Return all places, in the order in which they run.

    Args:
        model: The model.
        activations: The modules that count as activations. Those inside of units are left out.
        trace: A forward pass of the model.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    inside_units = {m for unit in names if isinstance(unit, ChannelModule) for m in unit.modules()}
    candidates = {m: None for m in names if m in activations and m not in inside_units}

    by_caller: dict[nn.Module, list[Invocation]] = defaultdict(list)
    for invocation in trace.invocations:
        if any(isinstance(call.activation, str) or call.activation in candidates for call in invocation.calls):
            by_caller[invocation.module].append(invocation)
    places: list[Place] = []
    in_modules: dict[nn.Module, list[tuple[nn.Module, Call]]] = defaultdict(list)
    for caller, invocations in by_caller.items():
        try:
            if _calls_one_of_them_twice(invocations, candidates):
                places += _sites(caller, invocations, candidates, names)
                continue
        except NotReplaceable as error:
            places += _functions(caller, invocations, names, f'a function, and {error}')
        for call in (call for invocation in invocations for call in invocation.calls):
            if isinstance(call.activation, nn.Module) and call.activation in candidates:
                in_modules[call.activation].append((caller, call))
    for activation, calls in in_modules.items():
        places += _in_parents(model, activation, calls, names)

    called = {call.activation for _, call in trace.calls()}
    for activation in candidates:
        if activation not in called:
            name, *aliases = names[activation]
            reason = 'the forward pass does not call it'
            places.append(Place(name, aliases, names[activation], activation, activation, [], reason))
    return sorted(places, key=lambda place: place.sort_key)


def _calls_one_of_them_twice(invocations: Sequence[Invocation], candidates: Collection[nn.Module]) -> bool:
    """True if one run of a forward calls an activation several times, or a function."""
    return any(
        isinstance(activation, str) or (count > 1 and activation in candidates)
        for invocation in invocations
        for activation, count in Counter(call.activation for call in invocation.calls).items()
    )


def _sites(
    caller: nn.Module,
    invocations: Sequence[Invocation],
    candidates: Collection[nn.Module],
    names: dict[nn.Module, list[str]],
) -> list[Place]:
    """Return a place for each call of an activation in the forward of `caller`.

    Raises:
        NotReplaceable: The forward cannot be rewritten.
    """
    if len({(i.arguments, tuple(call.activation for call in i.calls)) for i in invocations}) > 1:
        raise NotReplaceable('it is called in several ways')
    graph, sites, constants = find_sites(caller, invocations[0])
    owner = Rewritable(caller, graph, sites, [], constants, [])
    counts = Counter(site.activation for site in sites)
    places: list[Place] = []
    for index, site in enumerate(sites):
        name = free_name(caller, site, owner.names)
        owner.names.append(name)
        owner.needs_graph.append(isinstance(site.activation, str) or counts[site.activation] > 1 or name != site.name)
        if isinstance(site.activation, nn.Module) and site.activation not in candidates:
            continue
        calls = [invocation.calls[index] for invocation in invocations]
        widths = _widths(calls)
        if len(widths) > 1:
            raise NotReplaceable(f'it is called with {_listed(widths)} channels')
        full, *aliases = [join(of_caller, name) for of_caller in names[caller]]
        callee = callee_names(calls[0], caller, names)
        places.append(Place(full, aliases, callee, site.activation, caller, calls, None, owner, index, widths[0]))
    return places


def _functions(
    caller: nn.Module, invocations: Sequence[Invocation], names: dict[nn.Module, list[str]], reason: str
) -> list[Place]:
    """Return a place for each function that a forward calls which cannot be rewritten."""
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in (call for invocation in invocations for call in invocation.calls):
        if isinstance(call.activation, str):
            calls[call.activation].append(call)
    places = []
    for function, own in calls.items():
        free = next(name for name in numbered(function) if not hasattr(caller, name))
        full, *aliases = [join(of_caller, free) for of_caller in names[caller]]
        places.append(Place(full, aliases, callee_names(own[0], caller, names), function, caller, own, reason))
    return places


def _in_parents(
    model: nn.Module,
    activation: nn.Module,
    calls: list[tuple[nn.Module, Call]],
    names: dict[nn.Module, list[str]],
) -> list[Place]:
    """Return a place for each width of an activation module that one unit replaces everywhere in its parents."""
    groups: dict[tuple[int, ...], tuple[list[str], SharedModule]] = {}
    parents = [model.get_submodule(name.rpartition('.')[0]) for name in names[activation]]
    only_parents_call = {caller for caller, _ in calls} <= set(parents)
    for name, parent in zip(names[activation], parents, strict=True):
        # a call by another module than a parent may be of any of the names
        own = [call for caller, call in calls if caller is parent or not only_parents_call]
        if own and name:
            key = tuple(map(id, own))
            of_group, owner = groups.setdefault(key, ([], SharedModule(activation, [], own)))
            of_group.append(name)
            owner.parents.append((parent, name.rpartition('.')[2]))
    places: list[Place] = []
    for (name, *aliases), owner in groups.values():
        reason, widths = _problem(owner), []
        if reason is None:
            widths = _widths(owner.calls)
        if len(widths) < 2:
            width = widths[0] if widths else (0, 'NCHW')
            callee = [name, *aliases]
            place = Place(name, aliases, callee, activation, calls[0][0], owner.calls, reason, owner, 0, width)
            places.append(place)
            continue
        for channels, input_fmt in widths:
            own = [call for call in owner.calls if call.width is not None and call.width[0] == channels]
            others = [name, *(f'{alias}.units.{channels}' for alias in aliases), *aliases]
            full = f'{name}.units.{channels}'
            width = (channels, input_fmt)
            places.append(Place(full, others, others, activation, calls[0][0], own, None, owner, 0, width))
    return places


def _problem(owner: SharedModule) -> str | None:
    """Return why an activation module cannot be replaced, None if it can."""
    for parent, child in owner.parents:
        if getattr(owner.activation, 'inplace', False) and result_is_discarded(parent, child):
            return 'it is called for its effect on the input, which a unit does not have'
    try:
        _widths(owner.calls)
    except NotReplaceable as error:
        return str(error)
    return None


def _widths(calls: Sequence[Call]) -> list[tuple[int, str]]:
    """Return the channels of the inputs of calls, sorted, each with the layout that fits all calls.

    Raises:
        NotReplaceable: A width is unknown, or the layouts differ.
    """
    widths: set[tuple[int, str]] = set()
    for call in calls:
        if call.width is None:
            raise NotReplaceable(f'it is unknown which dimension of its input {call.shape} has the channels')
        widths.add(call.width)
    layouts = {input_fmt for _, input_fmt in widths}
    if layouts == {'NCHW', 'NCL'}:
        layouts = {'NCL'}
    if len(layouts) > 1:
        raise NotReplaceable(f'it is called with {_listed(sorted(widths))} channels')
    (input_fmt,) = layouts
    return [(channels, input_fmt) for channels in sorted({channels for channels, _ in widths})]


def _listed(widths: Sequence[tuple[int, str]]) -> str:
    return ', '.join(f'{channels} in {input_fmt}' for channels, input_fmt in widths)


def callee_names(call: Call, caller: nn.Module, names: dict[nn.Module, list[str]]) -> list[str]:
    """Return the names of what is called. Of a module with several names, those inside of its caller if any."""
    if isinstance(call.activation, str):
        return [join(name, call.activation) for name in names[caller]]
    of_module = names[call.activation]
    return [name for name in of_module if name.rpartition('.')[0] in names[caller]] or of_module


def describe(activation: nn.Module | str) -> str:
    return f'{activation}()' if isinstance(activation, str) else type(activation).__name__


def join(*names: str) -> str:
    return '.'.join(name for name in names if name)

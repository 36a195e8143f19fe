"""One module's forward as a graph, with a unit of its own at each place where it calls an activation (torch.fx)."""

import inspect
import itertools
import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from .trace import FUNCTIONS, Invocation

__all__ = ['Site', 'Untraceable', 'rewrite', 'sites_of']


class Untraceable(Exception):
    """A module's forward that has no one graph, and why."""


@dataclass
class Site:
    """A place in a graph that calls an activation."""

    node: fx.Node
    name: str  # of the activation: path of the module, or name of the function
    was: str  # type of the module, or the function


class _Tracer(fx.Tracer):
    """Traces one module's own forward; what it calls stays whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def sites_of(module: nn.Module, invocation: Invocation) -> tuple[fx.Graph, list[Site]]:
    """Trace `module.forward` as it was invoked, and find the activations that the invocation called.

    Raises:
        Untraceable: The forward pass branches on values, differs between training and inference, or the graph does not
            call what the invocation called.
    """
    if any(name.startswith('forward_') and name != 'forward_' for name in dir(type(module))):
        raise Untraceable('there are other ways through it than its forward')
    training = module.training
    try:
        graphs = []
        for mode in (True, False):
            module.training = mode
            graphs.append(_Tracer().trace(module, concrete_args=_left_out(module, invocation)))
    except Exception as error:
        raise Untraceable(f'its forward pass cannot be traced ({str(error).splitlines()[0]})') from error
    finally:
        module.training = training
    if graphs[0].python_code('self').src != graphs[1].python_code('self').src:
        raise Untraceable('its forward pass in training is another than in inference')

    graph = graphs[1]
    called = [call.activation for call in invocation.calls]
    modules = {a for a in called if isinstance(a, nn.Module)}
    found: list[tuple[Site, nn.Module | str]] = []
    for node in graph.nodes:
        activation: nn.Module | str | None = None
        if node.op == 'call_module':
            activation = module.get_submodule(node.target)
        elif node.op in ('call_function', 'call_method'):
            target = getattr(torch.Tensor, node.target, None) if node.op == 'call_method' else node.target
            activation = FUNCTIONS.get(target) if callable(target) else None
        if isinstance(activation, str):
            found.append((Site(node, activation, f'{activation}()'), activation))
        elif activation in modules:
            found.append((Site(node, node.target, type(activation).__name__), activation))
    if [activation for _, activation in found] != called:
        raise Untraceable('its graph does not call the activations that its forward pass called')
    if any(not site.node.users for site, _ in found):
        raise Untraceable('it calls an activation for its effect on the input')
    return graph, [site for site, _ in found]


def rewrite(
    module: nn.Module, graph: fx.Graph, sites: Sequence[Site], units: Sequence[nn.Module | None]
) -> tuple[type[nn.Module], dict[str, nn.Module]]:
    """The class and the new children that give `module` a unit of its own at each site.

    Args:
        module: Left as it is; the caller sets `__class__` and children.
        graph: Of its forward; changed.
        sites: Where it calls activations.
        units: What goes to each site, None for what is there.
    """
    taken = {site.name for site, unit in zip(sites, units, strict=True) if unit is None}
    children: dict[str, nn.Module] = {}
    for site, unit in zip(sites, units, strict=True):
        if unit is None:
            continue
        name = _free_name(module, site, taken)
        taken.add(name)
        children[name] = unit
        argument = site.node.args[0] if site.node.args else next(iter(site.node.kwargs.values()))
        with graph.inserting_before(site.node):
            call = graph.create_node('call_module', name, (argument,))
        site.node.replace_all_uses_with(call)
        graph.erase_node(site.node)
    code = graph.python_code('self')
    return _with_forward(type(module), code.src, code.globals), children


def _free_name(module: nn.Module, site: Site, taken: set[str]) -> str:
    """Name of a new unit: that of the activation it replaces if it can have it, else with a number."""
    base = site.name.replace('.', '_')
    own = site.node.op == 'call_module' and base == site.name  # the activation that gives way is the module's child
    numbered = (f'{base}_{i}' for i in itertools.count(1))
    return next(n for n in itertools.chain([base], numbered) if n not in taken and (own or not hasattr(module, n)))


def _with_forward(base: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    """Subclass of `base` whose forward is `source`, for which `names` are the globals; always the same one."""
    key = (base, source, tuple(sorted((k, id(v)) for k, v in names.items())))
    if key in _classes:
        return _classes[key]
    filename = f'<{base.__qualname__} with its own units {len(_classes)}>'
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for tracebacks and TorchScript
    namespace = dict(names)
    exec(compile(source, filename, 'exec'), namespace)
    attributes = {
        'forward': namespace['forward'],
        '__reduce_ex__': _reduce,
        '__module__': base.__module__,
        '__qualname__': base.__qualname__,
        '__doc__': base.__doc__,
        '_made_of': (base, source, names),
    }
    return _classes.setdefault(key, type(base.__name__, (base,), attributes))


def _reduce(self: Any, protocol: Any) -> tuple:
    """Copying and pickling: the class is made anew, because no module has it."""
    base, source, names = type(self)._made_of
    modules = {k: v.__name__ for k, v in names.items() if isinstance(v, ModuleType)}
    others = {k: v for k, v in names.items() if k not in modules}
    return _recreate, (base, source, modules, others), vars(self)


def _recreate(base: type[nn.Module], source: str, modules: dict[str, str], others: dict[str, Any]) -> nn.Module:
    names = {**others, **{k: import_module(v) for k, v in modules.items()}}
    cls = _with_forward(base, source, names)
    return cls.__new__(cls)


_classes: dict[tuple, type[nn.Module]] = {}


def _left_out(module: nn.Module, invocation: Invocation) -> dict[str, Any]:
    """Arguments that the invocation left at their defaults: the graph is for those."""
    positional, by_name = invocation.arguments
    parameters = list(inspect.signature(module.forward).parameters.values())
    return {
        p.name: p.default
        for i, p in enumerate(parameters)
        if i >= positional and p.name not in by_name and p.default is not inspect.Parameter.empty
    }

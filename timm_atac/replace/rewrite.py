"""One module's forward as a graph, with a unit of its own at each place where it calls an activation (torch.fx)."""

import ast
import copy
import inspect
import itertools
import linecache
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized

from .trace import FUNCTIONS, Invocation

__all__ = ['Site', 'Untraceable', 'called_for_effect', 'rewrite', 'sites_of']


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


def sites_of(module: nn.Module, invocation: Invocation) -> tuple[fx.Graph, list[Site], frozenset[str]]:
    """Trace `module.forward` as it was invoked, and find the activations that the invocation called.

    Returns:
        The graph, its sites, and the attributes whose values have become part of it.

    Raises:
        Untraceable: The forward pass branches on values, differs between training and inference, changes its module,
            draws random numbers, or the graph does not call what the invocation called.
    """
    if isinstance(module, fx.GraphModule):
        raise Untraceable('it is a graph already, which would be made again from what it was')
    if 'forward' in vars(module):
        raise Untraceable('its forward is an attribute of its own')
    if is_parametrized(module):
        raise Untraceable('it has parametrizations')
    if any(name.startswith('forward_') for name in dir(type(module))):
        raise Untraceable('there are other ways through it than its forward')
    read: set[str] = set()
    graphs = [_trace(module, invocation, training, read) for training in (True, False)]
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
    return graph, [site for site, _ in found], frozenset(read)


def _trace(module: nn.Module, invocation: Invocation, training: bool, read: set[str]) -> fx.Graph:
    """One trace, of a shallow copy, which has what the forward pass sets; adds the attributes that it reads."""
    twin = copy.copy(module)
    vars(twin)['_modules'] = dict(module._modules)
    twin.training = training
    before = dict(vars(twin))
    twin.__class__ = _recording(type(module), read)
    state = random.getstate(), torch.get_rng_state()
    try:
        graph = _Tracer().trace(twin, concrete_args=_left_out(module, invocation))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Untraceable(f'its forward pass cannot be traced ({reason})') from error
    if random.getstate() != state[0] or not torch.equal(torch.get_rng_state(), state[1]):
        raise Untraceable('its forward pass draws random numbers')
    if {k: id(v) for k, v in vars(twin).items()} != {k: id(v) for k, v in before.items()}:
        raise Untraceable('its forward pass sets attributes, or makes tensors, of its own')
    placeholders = [node for node in graph.nodes if node.op == 'placeholder']
    names = list(inspect.signature(module.forward).parameters)
    if len(placeholders) != len(names) or isinstance(graph._codegen, fx.graph._PyTreeCodeGen):
        raise Untraceable('its arguments have defaults that a graph cannot have')
    for node, name in zip(placeholders, names, strict=True):
        if not node.target.startswith('*'):
            node.target = name  # torch.fx gives those with a default another
    return graph


def _recording(base: type[nn.Module], read: set[str]) -> type[nn.Module]:
    """Subclass that notes which plain attributes of an instance are read: flags and numbers."""

    def get(self: nn.Module, name: str) -> Any:
        value = base.__getattribute__(self, name)
        if not name.startswith('_') and name != 'training' and name in object.__getattribute__(self, '__dict__'):
            read.add(name)
        return value

    return type(base.__name__, (base,), {'__getattribute__': get, '__module__': base.__module__})


def rewrite(
    module: nn.Module,
    graph: fx.Graph,
    sites: Sequence[Site],
    units: Sequence[nn.Module | None],
    fixed: frozenset[str],
) -> tuple[type[nn.Module], dict[str, nn.Module]]:
    """The class and the new children that give `module` a unit of its own at each site.

    Args:
        module: Left as it is; the caller sets `__class__` and children.
        graph: Of its forward; changed.
        sites: Where it calls activations.
        units: What goes to each site, None for what is there.
        fixed: Attributes whose values are part of the graph: setting another one becomes an error.
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
    return _with_forward(type(module), code.src, code.globals, fixed), children


def _free_name(module: nn.Module, site: Site, taken: set[str]) -> str:
    """Name of a new unit: that of the activation it replaces if it can have it, else with a number."""
    base = site.name.replace('.', '_')
    own = site.node.op == 'call_module' and base == site.name  # the activation that gives way is the module's child
    numbered = (f'{base}_{i}' for i in itertools.count(1))
    return next(n for n in itertools.chain([base], numbered) if n not in taken and (own or not hasattr(module, n)))


def _with_forward(base: type[nn.Module], source: str, names: dict[str, Any], fixed: frozenset[str]) -> type[nn.Module]:
    """Subclass of `base` whose forward is `source`, for which `names` are the globals; always the same one."""
    key = (
        base,
        source,
        tuple(sorted((k, repr(v) if isinstance(v, float) else id(v)) for k, v in names.items())),
        fixed,
    )
    if key in _classes:
        return _classes[key]
    filename = f'<{base.__qualname__} with its own units {len(_classes)}>'
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for tracebacks and TorchScript
    namespace = dict(names)
    exec(compile(source, filename, 'exec'), namespace)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        now: Any = getattr(self, name, None) if name in fixed else value
        if value is not now and (type(value) is not type(now) or isinstance(value, torch.Tensor) or value != now):
            raise AttributeError(
                f'{name} = {value!r}: when the activations of this {base.__qualname__} were replaced it was {now!r}, '
                f'which is now part of its forward pass. Set it before replace_activations.'
            )
        base.__setattr__(self, name, value)

    attributes = {
        'forward': namespace['forward'],
        '__setattr__': set_attribute,
        '__reduce_ex__': _reduce,
        '__module__': base.__module__,
        '__qualname__': base.__qualname__,
        '__doc__': base.__doc__,
        '_made_of': (base, source, names, fixed),
    }
    return _classes.setdefault(key, type(base.__name__, (base,), attributes))


def _reduce(self: Any, protocol: Any) -> tuple:
    """Copying and pickling: the class is made anew, because no module has it."""
    base, source, names, fixed = type(self)._made_of
    modules = {k: v.__name__ for k, v in names.items() if isinstance(v, ModuleType)}
    others = {k: v for k, v in names.items() if k not in modules}
    return _recreate, (base, source, modules, others, fixed), self.__getstate__()


def _recreate(
    base: type[nn.Module], source: str, modules: dict[str, str], others: dict[str, Any], fixed: frozenset[str]
) -> nn.Module:
    names = {**others, **{k: import_module(v) for k, v in modules.items()}}
    cls = _with_forward(base, source, names, fixed)
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


def called_for_effect(owner: nn.Module, child: str) -> bool:
    """Whether a forward calls `self.child(...)` as a statement: an in-place activation, whose result nobody takes."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(owner).forward)))
    except (OSError, TypeError, SyntaxError):  # no source: of a class from an interactive session, say
        return False
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return any(isinstance(s, ast.Call) and ast.unparse(s.func) == f'self.{child}' for s in statements)

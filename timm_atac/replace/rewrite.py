"""Rewrites a module's forward so that each place where it calls an activation calls a unit of its own (torch.fx)."""

import ast
import copy
import inspect
import itertools
import linecache
import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized

from .trace import FUNCTIONS, Invocation

__all__ = ['NotReplaceable', 'Site', 'find_sites', 'free_name', 'numbered', 'result_is_discarded', 'rewrite']


class NotReplaceable(Exception):
    """Says why an activation cannot be replaced."""


@dataclass
class Site:
    """A node of a graph that calls an activation."""

    node: fx.Node
    activation: nn.Module | str  # the module, or the name of the function

    @property
    def name(self) -> str:
        """The path of the module, or the name of the function."""
        return self.activation if isinstance(self.activation, str) else str(self.node.target)


class _Tracer(fx.Tracer):
    """Traces the forward of one module and records each call of a child as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_sites(module: nn.Module, invocation: Invocation) -> tuple[fx.Graph, list[Site], frozenset[str]]:
    """Trace `module.forward` with the arguments of an invocation, and find the activations that it called.

    Returns:
        The graph, its sites, and the attributes whose values have become constants of the graph.

    Raises:
        NotReplaceable: The forward pass branches on values, differs between training and inference, changes its module,
            draws random numbers, or the graph does not call what the invocation called.
    """
    if isinstance(module, fx.GraphModule):
        raise NotReplaceable('it is a graph already, and torch.fx would make its forward again from that graph')
    if 'forward' in vars(module):
        raise NotReplaceable('its forward is an attribute of the instance')
    if is_parametrized(module):
        raise NotReplaceable('it has parametrizations')
    if any(name.startswith('forward_') for name in dir(type(module))):
        raise NotReplaceable('it has other methods of a forward pass, such as forward_features')
    read: set[str] = set()
    graphs = [_trace(module, invocation, training, read) for training in (True, False)]
    if graphs[0].python_code('self').src != graphs[1].python_code('self').src:
        raise NotReplaceable('its forward pass in training differs from inference')

    graph = graphs[1]
    called = [call.activation for call in invocation.calls]
    sites: list[Site] = []
    for node in graph.nodes:
        activation: Any = None
        if node.op == 'call_module':
            activation = module.get_submodule(node.target)
        elif node.op in ('call_function', 'call_method'):
            function = getattr(torch.Tensor, node.target, None) if node.op == 'call_method' else node.target
            activation = FUNCTIONS.get(function) if callable(function) else None
        if isinstance(activation, str) or activation in called:
            sites.append(Site(node, activation))
    if [site.activation for site in sites] != called:
        raise NotReplaceable('its graph does not call the activations that its forward pass called')
    if any(not site.node.users for site in sites):
        raise NotReplaceable('it calls an activation for its effect on the input')
    return graph, sites, frozenset(read)


def _trace(module: nn.Module, invocation: Invocation, training: bool, read: set[str]) -> fx.Graph:
    """Trace a shallow copy of a module, so that the module keeps its attributes. Add the attributes it reads to `read`.

    Raises:
        NotReplaceable: The forward pass is more than its graph.
    """
    twin = copy.copy(module)
    vars(twin)['_modules'] = dict(module._modules)
    twin.training = training
    before = dict(vars(twin))
    twin.__class__ = _recording_class(type(module), read)
    state = random.getstate(), torch.get_rng_state()
    try:
        graph = _Tracer().trace(twin, concrete_args=_omitted_arguments(module, invocation))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotReplaceable(f'its forward pass cannot be traced ({reason})') from error
    if random.getstate() != state[0] or not torch.equal(torch.get_rng_state(), state[1]):
        raise NotReplaceable('its forward pass draws random numbers')
    if {k: id(v) for k, v in vars(twin).items()} != {k: id(v) for k, v in before.items()}:
        raise NotReplaceable('its forward pass sets attributes or creates tensors')
    placeholders = [node for node in graph.nodes if node.op == 'placeholder']
    names = list(inspect.signature(module.forward).parameters)
    if len(placeholders) != len(names) or isinstance(graph._codegen, fx.graph._PyTreeCodeGen):
        raise NotReplaceable('its arguments have defaults that a graph cannot have')
    for node, name in zip(placeholders, names, strict=True):
        if not node.target.startswith('*'):
            node.target = name  # torch.fx renames arguments that have defaults
    return graph


def _recording_class(base: type[nn.Module], read: set[str]) -> type[nn.Module]:
    """Return a subclass that adds the plain attributes of an instance to `read` when they are read."""

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
    names: Sequence[str],
    units: Sequence[nn.Module | None],
    constants: frozenset[str],
) -> tuple[type[nn.Module], dict[str, nn.Module]]:
    """Return the class and the new children that give `module` a unit of its own at each site.

    An activation that stays at one site, and whose name the unit of another site gets, becomes a child of the name of
    its own site.

    Args:
        module: Not changed. The caller of this function sets its `__class__` and its children.
        graph: The graph of its forward. It is changed.
        sites: The nodes that call activations.
        names: The name of the child for each site, by `free_name`.
        units: The unit for each site, None where the activation stays.
        constants: Attributes whose values are constants of the graph. Setting another value becomes an error.
    """
    children = {name: unit for name, unit in zip(names, units, strict=True) if unit is not None}
    replaced = set(children)
    for site, name, unit in zip(sites, names, units, strict=True):
        if unit is None:
            if site.name in replaced and isinstance(site.activation, nn.Module):
                site.node.target = name
                children[name] = site.activation
            continue
        (argument, *_) = (*site.node.args, *site.node.kwargs.values())
        with graph.inserting_before(site.node):
            call = graph.create_node('call_module', name, (argument,))
        site.node.replace_all_uses_with(call)
        graph.erase_node(site.node)
    code = graph.python_code('self')
    modules = {k: v.__name__ for k, v in code.globals.items() if isinstance(v, ModuleType)}
    others = {k: v for k, v in code.globals.items() if k not in modules}
    return _with_forward(type(module), code.src, modules, others, constants), children


def free_name(module: nn.Module, site: Site, taken: Sequence[str]) -> str:
    """Return the name of the activation for the child of a site if that is free, else the name with a number."""
    base = site.name.replace('.', '_')
    is_own_child = site.node.op == 'call_module' and base == site.name  # the unit takes the place of the activation
    return next(name for name in numbered(base) if name not in taken and (is_own_child or not hasattr(module, name)))


def numbered(name: str) -> Iterator[str]:
    """Yield the name, then the name with the numbers 1, 2, 3, ..."""
    return itertools.chain([name], (f'{name}_{i}' for i in itertools.count(1)))


def _with_forward(
    base: type[nn.Module], source: str, modules: dict[str, str], others: dict[str, Any], constants: frozenset[str]
) -> type[nn.Module]:
    """Return a subclass of `base` with another forward, the same class for the same arguments.

    Args:
        base: A class of modules.
        source: The code of the forward.
        modules: The Python modules among the globals of the code, by name, because modules cannot be pickled.
        others: The other globals of the code.
        constants: Attributes that cannot be set to another value.
    """
    globals_key = tuple(sorted((k, repr(v) if isinstance(v, float) else id(v)) for k, v in others.items()))
    key = (base, source, tuple(sorted(modules.items())), globals_key, constants)
    if key in _classes:
        return _classes[key]
    filename = f'<{base.__qualname__} with its own units {len(_classes)}>'
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for tracebacks and TorchScript
    namespace = {**others, **{k: import_module(v) for k, v in modules.items()}}
    exec(compile(source, filename, 'exec'), namespace)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        now: Any = getattr(self, name, None) if name in constants else value
        if value is not now and (type(value) is not type(now) or isinstance(value, torch.Tensor) or value != now):
            raise AttributeError(
                f'{name} = {value!r}: it was {now!r} when the activations of this {base.__qualname__} were replaced, '
                f'and that value is now a constant of the forward pass. Set it before replace_activations.'
            )
        base.__setattr__(self, name, value)

    attributes = {
        'forward': namespace['forward'],
        '__setattr__': set_attribute,
        '__reduce_ex__': _reduce,
        '__module__': base.__module__,
        '__qualname__': base.__qualname__,
        '__doc__': base.__doc__,
        '_made_of': (base, source, modules, others, constants),
    }
    return _classes.setdefault(key, type(base.__name__, (base,), attributes))


def _reduce(self: Any, protocol: Any) -> tuple:
    """Copy or pickle a module. Its class is created again, because no Python module has it as an attribute."""
    return _recreate, type(self)._made_of, self.__getstate__()


def _recreate(*made_of: Any) -> nn.Module:
    cls = _with_forward(*made_of)
    return cls.__new__(cls)


_classes: dict[tuple, type[nn.Module]] = {}


def _omitted_arguments(module: nn.Module, invocation: Invocation) -> dict[str, Any]:
    """Return the arguments that an invocation left at their defaults. The defaults become constants of the graph."""
    positional, by_name = invocation.arguments
    parameters = list(inspect.signature(module.forward).parameters.values())[positional:]
    return {p.name: p.default for p in parameters if p.name not in by_name and p.default is not p.empty}


def result_is_discarded(module: nn.Module, child: str) -> bool:
    """True if the forward of `module` has a statement `self.child(...)`: an in-place activation without a result."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    except (OSError, TypeError, SyntaxError):  # there is no source, for example in an interactive session
        return False
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return any(isinstance(s, ast.Call) and ast.unparse(s.func) == f'self.{child}' for s in statements)

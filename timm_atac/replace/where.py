"""Which activations of a model `where` means."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch.nn as nn

from .trace import Invocation, Trace

__all__ = ['Selection', 'Where']

Where = str | type | int | Callable[[str, nn.Module], bool]
# types that stand for a function, in `where`
_TYPES = {
    'relu': nn.ReLU,
    'relu6': nn.ReLU6,
    'leaky_relu': nn.LeakyReLU,
    'prelu': nn.PReLU,
    'elu': nn.ELU,
    'celu': nn.CELU,
    'selu': nn.SELU,
    'gelu': nn.GELU,
    'silu': nn.SiLU,
    'mish': nn.Mish,
    'hardswish': nn.Hardswish,
}


class Selection:
    """`where` of `replace_activations`, checked.

    Args:
        where: A pattern of names, a type, a stage number, a function of name and module, several of those, or None.

    Raises:
        ValueError: `where` is nothing of that.
    """

    def __init__(self, where: Where | Sequence[Where] | None) -> None:
        choices: Any = where if isinstance(where, (list, tuple, set, frozenset)) else [where]
        self.everything = where is None
        self.patterns = [w for w in choices if isinstance(w, str)]
        self.types = tuple(w for w in choices if isinstance(w, type))
        self.stages = [w for w in choices if isinstance(w, int) and not isinstance(w, bool)]
        self.functions = [w for w in choices if callable(w) and not isinstance(w, (type, nn.Module)) and _takes_two(w)]
        understood = [*self.patterns, *self.types, *self.stages, *self.functions]
        if not self.everything and (not choices or len(understood) < len(choices)):
            raise ValueError(
                f"where={where!r}: expected a pattern of names ('layer4.*'), a type (nn.GELU), a stage number "
                f'(4, or -1 for the last), a function of name and module, or a sequence of those.'
            )
        self._steps: list[tuple[int, int]] = []

    def portable(self, chosen: Iterable[str]) -> list[str | int] | None:
        """The same choice without types and functions, which no config.json can hold.

        Args:
            chosen: Names of what they have chosen.
        """
        if self.everything:
            return None
        if self.types or self.functions:
            return list(dict.fromkeys(chosen))
        return [*self.patterns, *self.stages]

    def watch_stages(self, model: nn.Module, trace: Trace) -> None:
        """Find when the chosen stages ran.

        A stage is an entry of timm's `feature_info`: from the end of the one before it to its own end; the first begins
        where its module begins. An entry that is an activation is a stem and no stage.

        Raises:
            ValueError: The model has no `feature_info`, or there is no such stage.
        """
        if not self.stages:
            return
        spans = _stage_spans(model, trace)
        for stage in self.stages:
            if not 1 <= abs(stage) <= len(spans):
                there = f'{len(spans)} stages' if spans else 'no `feature_info` that names its stages'
                raise ValueError(
                    f'where={stage!r}: expected a stage from 1 to {len(spans) or "n"}, or from -1 for the last; '
                    f"{type(model).__name__} has {there}. Patterns of names, such as 'layer4.*', work everywhere."
                )
            self._steps.append(spans[stage - 1 if stage > 0 else stage])

    def fits(self, names: Iterable[str], activation: nn.Module | str, owner: nn.Module, step: int | None) -> bool:
        """Whether an activation is meant.

        Args:
            names: Its names in the model; of a function, its owner's with the function's.
            activation: The module, or the name of the function.
            owner: Module that calls it.
            step: When, None for never.
        """
        if self.everything:
            return True
        names = list(names)
        kind = _TYPES.get(activation, object) if isinstance(activation, str) else type(activation)
        module = owner if isinstance(activation, str) else activation
        return (
            any(fnmatchcase(name, pattern) for name in names for pattern in self.patterns)
            or (bool(self.types) and issubclass(kind, self.types))
            or any(function(name, module) for name in names for function in self.functions)
            or any(step is not None and first < step <= last for first, last in self._steps)
        )


def _takes_two(function: Callable) -> bool:
    try:
        signature(function).bind('name', None)
    except (TypeError, ValueError):
        return False
    return True


def _stage_spans(model: nn.Module, trace: Trace) -> list[tuple[int, int]]:
    """First and last step of each stage."""
    feature_info: Any = getattr(model, 'feature_info', None) or []
    infos = [feature_info[i] for i in range(len(feature_info))] if isinstance(feature_info, (list, tuple)) else []
    if not infos and hasattr(feature_info, 'info'):
        infos = list(feature_info.info)
    modules = dict(model.named_modules())
    spans: list[tuple[int, int]] = []
    for info in infos:
        module = modules.get(info.get('module', ''))
        runs: list[Invocation] = [i for i in trace.invocations if i.module is module]
        if module is None or not runs or not any(True for _ in module.children()):
            continue
        spans.append((spans[-1][1] if spans else runs[0].start, runs[-1].end))
    return spans

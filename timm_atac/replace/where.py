"""Decides which activations of a model are selected by the argument `where`."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch.nn as nn

from ..utils.words import counted
from .trace import ACTIVATION_TYPES, Trace

__all__ = ['Selection', 'Where']

Where = str | type | int | Callable[[str, nn.Module], bool]


class Selection:
    """The argument `where` of `replace_activations`, after a check.

    Args:
        where: A pattern of names, a type, a stage number, a function of name and module, a sequence of these, or None
            for all activations.

    Raises:
        ValueError: `where` is none of these.
    """

    def __init__(self, where: Where | Sequence[Where] | None) -> None:
        choices: Any = where if isinstance(where, (list, tuple, set, frozenset)) else [where]
        self.selects_all = where is None
        self.patterns = [w for w in choices if isinstance(w, str)]
        self.types = tuple(w for w in choices if isinstance(w, type))
        self.stages = [w for w in choices if isinstance(w, int) and not isinstance(w, bool)]
        self.functions = [
            w for w in choices if callable(w) and not isinstance(w, (type, nn.Module)) and _takes_two_arguments(w)
        ]
        understood = [*self.patterns, *self.types, *self.stages, *self.functions]
        if not self.selects_all and (not choices or len(understood) < len(choices)):
            raise ValueError(
                f"where={where!r}: expected a pattern of names ('layer4.*'), a type (nn.GELU), a stage number "
                f'(4, or -1 for the last), a function of name and module, or a sequence of those.'
            )
        self._spans: list[tuple[int, int]] = []

    def serializable(self, selected_names: Iterable[str]) -> list[str | int] | None:
        """Return a `where` with the same effect that config.json can hold: without types and functions.

        Args:
            selected_names: Names of the activations that this selection has selected.
        """
        if self.selects_all:
            return None
        if self.types or self.functions:
            return list(dict.fromkeys(selected_names))
        return [*self.patterns, *self.stages]

    def locate_stages(self, model: nn.Module, trace: Trace) -> None:
        """Find the first and the last step of each selected stage in a forward pass.

        A stage is an entry of timm's `feature_info`. It starts where the stage before it ends, the first stage where
        its module starts, and it ends with its module. An entry whose module is an activation is a stem and no stage.

        Raises:
            ValueError: The model has no `feature_info`, or no stage of this number.
        """
        spans = _stage_spans(model, trace) if self.stages else []
        for stage in self.stages:
            if not 1 <= abs(stage) <= len(spans):
                found = counted(len(spans), 'stage') if spans else 'no `feature_info` that names its stages'
                raise ValueError(
                    f'where={stage!r}: expected a stage from 1 to {len(spans) or "n"}, or from -1 for the last; '
                    f"{type(model).__name__} has {found}. Patterns of names, such as 'layer4.*', work for every model."
                )
            self._spans.append(spans[stage - 1 if stage > 0 else stage])

    def selects(self, names: list[str], activation: nn.Module | str, caller: nn.Module, step: int | None) -> bool:
        """True if an activation is selected.

        Args:
            names: The names of a module, or of a function the names of its caller with the function's name.
            activation: The module, or the name of the function.
            caller: The module that calls it.
            step: The time of the call in the forward pass, None if there is no call.
        """
        if isinstance(activation, str):
            cls, module = ACTIVATION_TYPES[activation], caller
        else:
            cls, module = type(activation), activation
        return (
            self.selects_all
            or any(fnmatchcase(name, pattern) for name in names for pattern in self.patterns)
            or issubclass(cls, self.types)
            or any(function(name, module) for name in names for function in self.functions)
            or any(step is not None and first < step <= last for first, last in self._spans)
        )


def _takes_two_arguments(function: Callable) -> bool:
    try:
        signature(function).bind('name', None)
    except (TypeError, ValueError):
        return False
    return True


def _stage_spans(model: nn.Module, trace: Trace) -> list[tuple[int, int]]:
    """Return the first and the last step of each stage of a model."""
    feature_info: Any = getattr(model, 'feature_info', None)
    feature_info = getattr(feature_info, 'info', feature_info)  # timm's class of a `features_only` model has a list
    modules = dict(model.named_modules())
    spans: list[tuple[int, int]] = []
    for entry in feature_info if isinstance(feature_info, (list, tuple)) else []:
        module = modules.get(entry.get('module', ''))
        runs = [invocation for invocation in trace.invocations if invocation.module is module]
        if module is not None and runs and any(True for _ in module.children()):
            spans.append((spans[-1][1] if spans else runs[0].start, runs[-1].end))
    return spans

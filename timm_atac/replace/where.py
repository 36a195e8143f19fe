"""Chooses the places of a model by the argument `where`."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch.nn as nn

from ..utils.words import close_names, counted, shortened
from .placement import Placement
from .places import Place
from .stages import Stage
from .trace import ACTIVATION_TYPES

__all__ = ['Selection', 'Where', 'stage_lines']

Where = str | type | int | Callable[[str, nn.Module], bool]
_WORDS = ('paper', 'all', 'attention')
_EXPECTED = (
    "expected a pattern of names ('layer4.*'), 'paper', 'all', 'attention', a type (nn.GELU), a stage number (4, or -1 "
    'for the last), a function of name and module, or a sequence of those.'
)


class Selection:
    """The argument `where` of `replace_activations`, after a check.

    Args:
        where: As in `replace_activations`, or a dict with that as 'places', as config.json has it.
        saved: Read `where` as version 0.1 did: a pattern is also compared with the name of an activation that several
            places share, stages and types include the activations inside of attention modules, and what fits nothing
            is no error.

    Raises:
        ValueError: `where` is none of what is expected.
    """

    def __init__(self, where: Where | Sequence[Where] | Mapping[str, Any] | None, saved: bool = False) -> None:
        inner: Any = where['places'] if isinstance(where, Mapping) and set(where) == {'places'} else where
        choices: Any = list(inner) if isinstance(inner, (list, tuple, set, frozenset)) else [inner]
        choices = ['all'] if where is None else choices
        self.where, self.saved = where, saved
        self.words = [w for w in choices if isinstance(w, str) and w in _WORDS]
        self._patterns = [w for w in choices if isinstance(w, str) and w not in _WORDS]
        self.types = tuple(w for w in choices if isinstance(w, type))
        self._stages = [w for w in choices if isinstance(w, int) and not isinstance(w, bool)]
        self._functions = [
            w for w in choices if callable(w) and not isinstance(w, (type, nn.Module)) and _takes_two_arguments(w)
        ]
        understood = [*self.words, *self._patterns, *self.types, *self._stages, *self._functions]
        if not choices or len(understood) < len(choices):
            raise ValueError(f'where={where!r}: {_EXPECTED}')
        # next to something else, 'attention' only adds the attention modules to what that chooses
        self._with_attention = 'attention' in self.words and len(choices) > 1
        self._adds_attention = saved or self._with_attention

    def serializable(self, chosen: Sequence[Place]) -> Any:
        """Return the argument `where` of `atac_host` with the same effect, which config.json can hold."""
        if len(self.words) == 1 and not (self._patterns or self.types or self._stages or self._functions):
            return self.words[0]
        if self.types or self._functions:
            names = [place.callee[0] if self.saved else place.name for place in chosen]
            choices: list[str | int] = list(dict.fromkeys(names))
        else:
            choices = [*self.words, *self._patterns, *self._stages]
        return choices if self.saved else {'places': choices}

    def choose(
        self, model: nn.Module, places: Sequence[Place], placement: Placement, stages: Sequence[Stage]
    ) -> list[Place]:
        """Return the chosen places of a model.

        Raises:
            ValueError: A part of `where` fits no place, or there is no stage of a number.
        """
        words = [word for word in self.words if word != 'attention' or not self._with_attention]
        tests: list[tuple[Any, Callable[[Place], bool]]] = [
            *((word, self._test_of_word(word, placement, stages)) for word in words),
            *((pattern, self._test_of_pattern(pattern)) for pattern in self._patterns),
            *((cls, self._test_of_type(cls, placement)) for cls in self.types),
            *((n, self._test_of_stage(_stage(n, model, stages), placement)) for n in self._stages),
            *((function, _test_of_function(function)) for function in self._functions),
        ]
        fitting = [(part, {place for place in places if test(place)}) for part, test in tests]
        nothing = [part for part, found in fitting if not found]
        if nothing and (len(nothing) == len(fitting) or not self.saved):
            raise ValueError(self._message(nothing[0], model, places, stages))
        return [place for place in places if any(place in found for _, found in fitting)]

    def not_chosen(
        self, model: nn.Module, places: Sequence[Place], placement: Placement, stages: Sequence[Stage]
    ) -> dict[str, list[str]]:
        """Return the names of the places that 'paper', a stage or a type leaves out, by the reason."""
        chosen = self.choose(model, places, placement, stages)
        reasons: dict[str, list[str]] = {}
        if 'paper' in self.words:
            for place in places:
                if place not in chosen:
                    reasons.setdefault(_reason(place, placement) or 'in another stage', []).append(place.name)
        elif (self._stages or self.types) and not self._adds_attention:
            including = copy(self)
            including._adds_attention = True
            more = [place.name for place in including.choose(model, places, placement, stages) if place not in chosen]
            reasons = {'inside an attention module': more} if more else {}
        return reasons

    def _test_of_word(self, word: str, placement: Placement, stages: Sequence[Stage]) -> Callable[[Place], bool]:
        if word == 'all':
            return lambda place: True
        if word == 'attention':
            return lambda place: _is_in_attention(place, placement)
        last = [stage.calls for stage in stages if stage.calls][-2:]

        def test(place: Place) -> bool:
            reason = _reason(place, placement)
            is_inner = reason is None or (reason == 'inside an attention module' and self._with_attention)
            return is_inner and any(_runs_in(place, calls) for calls in last)

        return test

    def _test_of_pattern(self, pattern: str) -> Callable[[Place], bool]:
        def test(place: Place) -> bool:
            names = [*_names(place), *place.callee] if self.saved else _names(place)
            return any(fnmatchcase(name, pattern) for name in names)

        return test

    def _test_of_type(self, cls: type, placement: Placement) -> Callable[[Place], bool]:
        return lambda place: _is_of_type(place, cls) and self._may_take(place, placement)

    def _test_of_stage(self, stage: Stage, placement: Placement) -> Callable[[Place], bool]:
        return lambda place: _runs_in(place, stage.calls) and self._may_take(place, placement)

    def _may_take(self, place: Place, placement: Placement) -> bool:
        return self._adds_attention or not _is_in_attention(place, placement)

    def _message(self, part: Any, model: nn.Module, places: Sequence[Place], stages: Sequence[Stage]) -> str:
        names = [place.name for place in places]
        text = f'where={part!r} fits no activation of {type(model).__name__}'
        if part == 'paper':
            text += ': none is an inner activation of a block of the last two stages'
        if isinstance(part, str) and part not in _WORDS:
            similar = close_names(part, dict.fromkeys((*names, *_patterns(names))))
            text += f'; did you mean {" or ".join(map(repr, similar))}?' if similar else '.'
        else:
            text += '.'
        listed = f'{": " if names else ""}{", ".join(shortened(names, 10))}'
        text += f' There {"is" if len(names) == 1 else "are"} {counted(len(names), "activation")}{listed}.'
        if part == 'paper' or isinstance(part, int):
            text += f' The stages: {"; ".join(stage_lines(stages)) or "none"}.'
        return text


def _patterns(names: Sequence[str]) -> Iterator[str]:
    """Yield patterns for the places of a module and for those of modules with other numbers: 'a.1.*', 'a.*.act'."""
    for name in names:
        prefixes = itertools.accumulate(name.split('.')[:-1], '{}.{}'.format)
        yield from (f'{prefix}.*' for prefix in prefixes)
        numbered = re.sub(r'\b\d+\b', '*', name)
        if numbered.strip('.*') and numbered != name:
            yield numbered


def stage_lines(stages: Sequence[Stage]) -> list[str]:
    """Return a line for each stage: its number and its modules. Of many stages, those in the middle are left out."""
    lines = [f'{n} ({", ".join(shortened(stage.modules, 6))})' for n, stage in enumerate(stages, 1)]
    return lines if len(lines) <= 8 else [*lines[:2], '...', *lines[-4:]]


def _stage(number: int, model: nn.Module, stages: Sequence[Stage]) -> Stage:
    if not 1 <= abs(number) <= len(stages):
        found = f'{counted(len(stages), "stage")}: {"; ".join(stage_lines(stages))}' if stages else 'no stages'
        raise ValueError(
            f'where={number!r}: expected a stage from 1 to {len(stages) or "n"}, or from -1 for the last; '
            f"{type(model).__name__} has {found}. Patterns of names, such as 'layer4.*', work for every model."
        )
    return stages[number - 1 if number > 0 else number]


def _reason(place: Place, placement: Placement) -> str | None:
    """Return why the paper's placement does not take a place, None if it does in some stage."""
    reasons = [placement.reason_to_leave(call) for call in place.calls] or ['the forward pass does not call it']
    return next((reason for reason in reasons if reason is not None), None)


def _is_in_attention(place: Place, placement: Placement) -> bool:
    return bool(place.calls) and all(placement.is_in_attention(call) for call in place.calls)


def _runs_in(place: Place, calls: frozenset[int]) -> bool:
    return any(id(call) in calls for call in place.calls)


def _is_of_type(place: Place, cls: type) -> bool:
    is_function = isinstance(place.activation, str)
    return issubclass(ACTIVATION_TYPES[place.activation] if is_function else type(place.activation), cls)  # type: ignore[index]


def _module(place: Place) -> nn.Module:
    return place.caller if isinstance(place.activation, str) else place.activation


def _names(place: Place) -> list[str]:
    return [place.name, *place.aliases]


def _test_of_function(function: Callable[[str, nn.Module], bool]) -> Callable[[Place], bool]:
    return lambda place: any(function(name, _module(place)) for name in _names(place))


def _takes_two_arguments(function: Callable) -> bool:
    try:
        signature(function).bind('name', None)
    except (TypeError, ValueError):
        return False
    return True

"""The units by their names for timm's `act_layer`.

A name stands for one architecture, because config.json holds the name. So the norm of a unit is part of its name.
'atac' has BatchNorm in every host, as in the paper. 'atac_layernorm2d' has the norm that timm calls 'layernorm2d'.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from .atac import ATAC, NiN, SEActivation
from .memory_efficient import ATACMe
from .xunit import XUnit

__all__ = ['ACTIVATIONS', 'ACTIVATIONS_ME', 'NORMS', 'describe_names', 'name_of']

_UNITS: dict[str, Any] = {'atac': ATAC, 'se_act': SEActivation, 'nin': NiN, 'xunit': XUnit}

NORMS = ('layernorm2d', 'groupnorm1')
"""Norms in the names of units, by timm's names. Neither mixes images: the first normalises the channels of a position,
the second the whole map of an image."""

ACTIVATIONS: Mapping[str, Any] = _UNITS | {
    f'{name}_{norm}': partial(unit, norm_layer=norm) for name, unit in _UNITS.items() for norm in NORMS
}
"""Class or `partial` of a class for each name."""

ACTIVATIONS_ME: Mapping[str, Any] = {'atac': ATACMe}
"""As `ACTIVATIONS`. timm creates these for their names, except in models that are to be exported or scripted."""


def name_of(layer: Any) -> str | None:
    """Return the name of a unit that is given as a class or a `partial`. None if it has no name."""
    if isinstance(layer, str):
        return layer
    for name, known in (*ACTIVATIONS.items(), *ACTIVATIONS_ME.items()):
        if layer is known:
            return name
        if isinstance(layer, partial) and isinstance(known, partial) and _content(layer) == _content(known):
            return name
    return None


def describe_names() -> str:
    """Return the names for an error message."""
    return f'{", ".join(map(repr, _UNITS))} (with BatchNorm, or followed by {" or ".join(f"_{n}" for n in NORMS)})'


def _content(layer: partial) -> tuple:
    return layer.func, layer.args, layer.keywords

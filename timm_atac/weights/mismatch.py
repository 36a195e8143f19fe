"""Says in one line which tensors of a file do not fit a network, and which arguments would make the network fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.words import shortened

__all__ = ['describe_mismatch', 'differences']

Shapes = Mapping[str, Sequence[int]]


def differences(found: Shapes, expected: Shapes) -> str:
    """Return the first tensors that do not fit, '' if all fit. The arguments are those of `describe_mismatch`."""
    different = [
        f'{name!r} is {tuple(found[name])} in the file and {tuple(shape)} in the network'
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    missing = [f'{name!r} is missing' for name in expected if name not in found]
    surplus = [f'{name!r} is not in the network' for name in found if name not in expected]
    return ', '.join(shortened([*different, *missing, *surplus], 3))


def describe_mismatch(found: Shapes, expected: Shapes, head: str = 'fc') -> str:
    """Return the first tensors that do not fit, and what to do.

    Args:
        found: Shapes of the tensors in a file, by name.
        expected: Shapes of the tensors in the network, by name.
        head: Name of the classifier in the network.
    """
    if classes := _head_argument(found, expected, head):
        remedy = f'Give --model-kwargs {classes}.'
    else:
        remedy = 'Give the network and the --model-kwargs that it was trained with.'
    return f'{differences(found, expected)}. {remedy}'


def _head_argument(found: Shapes, expected: Shapes, head: str = 'fc') -> str:
    """Return 'num_classes=N' if the file fits the network with N classes and not otherwise, else ''."""
    names = [name for name in {*found, *expected} if tuple(found.get(name, ())) != tuple(expected.get(name, ()))]
    if not head or not names or any(name.rpartition('.')[0] != head for name in names):
        return ''
    weight: Any = found.get(f'{head}.bias', found.get(f'{head}.weight'))
    return f'num_classes={weight[0] if weight else 0}'

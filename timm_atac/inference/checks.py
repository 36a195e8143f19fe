"""Checks of a model before `fuse` copies it."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_iter

__all__ = ['check_can_be_copied', 'first_names']

_NO_TENSORS = {'_modules', '_parameters', '_forward_hooks', '_forward_pre_hooks', '_backward_hooks'}


def check_can_be_copied(model: nn.Module) -> None:
    """Raise ValueError for a model that has tensors with an autograd graph, which `copy.deepcopy` does not copy.

    Pruning, the old `weight_norm` and the old `spectral_norm` keep such tensors, after a forward pass with gradients.

    Args:
        model: Any model. A model that can be copied is accepted, whatever computes its weights.

    Raises:
        ValueError: With the place of each such tensor, and with what to do.
    """
    found: dict[str, list[str]] = {}  # what to do -> places
    for prefix, module in model.named_modules():
        for attribute in _tensors_with_graph(module):
            found.setdefault(_remedy(module, attribute), []).append('.'.join(filter(None, (prefix, attribute))))
    if found:
        lines = [f'{first_names(places)}: {remedy}.' for remedy, places in found.items()]
        raise ValueError(
            f'fuse: {type(model).__name__} cannot be copied, because it keeps tensors that autograd has computed. '
            + ' '.join(lines)
        )


def first_names(names: list[str], most: int = 5) -> str:
    """Return the first names as an enumeration, with the number of the others."""
    others = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + others


def _tensors_with_graph(module: nn.Module) -> Iterator[str]:
    """Names of the attributes that are, or contain, a tensor that is no leaf of an autograd graph."""
    attributes = {**vars(module), **module._buffers}
    for name, value in attributes.items():
        if name not in _NO_TENSORS and any(_has_graph(t) for t in tree_iter(value)):
            yield name


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_leaf


def _remedy(module: nn.Module, attribute: str) -> str:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == attribute:
            return f"pruned; call torch.nn.utils.prune.remove(module, '{attribute}') for each before fuse"
        if isinstance(hook, WeightNorm | SpectralNorm) and hook.name == attribute:
            name = 'weight_norm' if isinstance(hook, WeightNorm) else 'spectral_norm'
            argument = 'module' if attribute == 'weight' else f"module, '{attribute}'"
            return f'with {name}; call torch.nn.utils.remove_{name}({argument}) for each before fuse'
    return 'kept from a forward pass with gradients; set it to None, or to its value.detach(), before fuse'

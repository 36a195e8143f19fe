"""Units that start as the activations that they replace, as far as their bottlenecks allow.

A new unit of random weights multiplies its input by gates around one half. A trained network then computes something
else, and its accuracy is gone. ATAC can do better. One channel of the bottleneck can tell where one channel x of the
map is large: `x * sigmoid(slope * relu(x / s + shift) - offset)` is close to ReLU, SiLU or GELU for the right numbers.
With r = 2 there is one such channel for half of the channels of the map. The others start with the constant gate that
is best for them.

"Best" is the least mean squared error, which needs to know the values that the activation gets. After a BatchNorm with
weight w and bias b, a channel has mean b and standard deviation |w|. It is taken to be normally distributed.
"""

import copy
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.activations import Sigmoid
from torch.nn.modules.batchnorm import _BatchNorm

from ..units.atac import ATAC
from ..units.infer_width import is_norm
from ..units.memory_efficient import ATACMe
from .places import Place

__all__ = ['Start', 'imitate', 'start_units']

# The gates that are tried are sigmoid(slope * (relu(x / s + shift) - shift) - offset).
_SHIFTS = (0.0, 3.0)
_SLOPES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
_OFFSETS = (-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
_LIMIT = 4.0  # of the logit of a constant gate: gates of 0.02 and 0.98 can still be trained
_STEP = 0.25  # between the points of the integrals, in standard deviations from -6 to 6


class Start(NamedTuple):
    """How the new units of a model start.

    Attributes:
        is_trained: True if the model was trained before.
        units: Number of units.
        imitating: How many of these imitate the activations that they replace.
        channels: Number of channels of the imitating units.
        following: How many of these have a gate that follows the sign of the channel.
    """

    is_trained: bool = False
    units: int = 0
    imitating: int = 0
    channels: int = 0
    following: int = 0


def start_units(model: nn.Module, units: Mapping[nn.Module, Place], wanted: bool, dry_run: bool) -> Start:
    """Let new units imitate the activations that they replace, where that is possible.

    Args:
        model: The model, with the units in it.
        units: The place of each unit.
        wanted: False to let all units start from random weights.
        dry_run: True to change nothing.
    """
    new = {inside for unit in units for inside in unit.modules()}
    trained = any(is_norm(module) and _has_learned(module) for module in model.modules() if module not in new)
    norms = {unit: _norm_before(place, unit) for unit, place in units.items()} if wanted else {}
    found: list[tuple[Any, Place, nn.Module]] = [
        (unit, units[unit], norm) for unit, norm in norms.items() if norm is not None
    ]
    if not dry_run:
        for unit, place, norm in found:
            imitate(unit, place.activation, norm)
    channels = sum(place.width[0] for _, place, _ in found)
    following = sum(unit.conv1.weight.shape[0] for unit, *_ in found)
    return Start(trained, len(units), len(found), channels, following)


def _has_learned(norm: nn.Module) -> bool:
    tensors = (getattr(norm, name, None) for name in ('weight', 'running_mean'))
    known = [t.detach() for t in tensors if isinstance(t, torch.Tensor) and not t.is_meta and t.numel() > 0]
    return any(bool((t != t.flatten()[0]).any()) for t in known)


def _norm_before(place: Place, unit: nn.Module) -> nn.Module | None:
    """Return the trained BatchNorm whose output is the input of a place, None if the unit cannot imitate there."""
    if len(place.calls) != 1 or not _can_imitate(unit):
        return None
    node = place.calls[0].source
    while node is not None and node.is_copy:
        node = node.inputs[0]
    norm = node.invocation.module if node is not None and node.name == 'batch_norm' else None
    is_known = isinstance(norm, _BatchNorm) and norm.num_features == place.width[0] and _has_learned(norm)
    return norm if is_known and _is_elementwise(place.activation, place.width[0]) else None


def _is_elementwise(activation: nn.Module | str, channels: int) -> bool:
    """True if an activation runs on a CPU, and its output has the shape of the input."""
    x = torch.zeros(2, channels)
    try:
        return _values(activation, x).shape == x.shape
    except Exception:  # other shapes, other arguments or another device: each raises an error of its own
        return False


def _can_imitate(unit: Any) -> bool:
    if type(unit) not in (ATAC, ATACMe):
        return False
    norms = (unit.bn1, unit.bn2)
    return (
        type(unit.act) is nn.ReLU
        and type(unit.gate) in (nn.Sigmoid, Sigmoid)
        and all(isinstance(n, _BatchNorm) and n.affine and n.track_running_stats for n in norms)
    )


@torch.no_grad()
def imitate(unit: Any, activation: nn.Module | str, norm: Any) -> None:
    """Set the weights of an ATAC unit so that it comes close to an activation after a BatchNorm.

    Args:
        unit: The unit, changed in place.
        activation: The activation, or its name in `torch.nn.functional`.
        norm: The BatchNorm whose output it gets.
    """
    channels, width = unit.channels, unit.conv1.weight.shape[0]
    dd: dict[str, Any] = {'device': 'cpu', 'dtype': torch.float32}
    mean = torch.zeros(channels, **dd) if norm.bias is None else norm.bias.to(**dd)
    std = torch.ones(channels, **dd) if norm.weight is None else norm.weight.to(**dd).abs().clamp_min(1e-3)

    z = torch.arange(-6, 6 + _STEP, _STEP, **dd)[:, None]
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    x = mean + std * z  # (points, C), as below
    y = _values(activation, x)
    power = (density * x.square()).sum(0)
    constant = ((density * x * y).sum(0) / power).clamp(*torch.tensor([-_LIMIT, _LIMIT]).sigmoid().tolist())
    constant_error = (density * (y - x * constant).square()).sum(0)

    gain, shift, slope, offset = _best_gates(x, y, std, density, constant_error)
    picked = gain.topk(min(width, channels, int((gain > 0).sum()))).indices
    shift, slope, offset, std, mean = (values[picked] for values in (shift, slope, offset, std, mean))
    hidden = (x[:, picked] / std + shift).relu()

    rows = torch.arange(len(picked))
    _set(unit.conv1.weight, rows, F.one_hot(picked, channels)[:, :, None, None])
    _set_norm(unit.bn1, rows, mean, std.square(), torch.ones_like(std), mean / std + shift)
    _set(unit.conv2.weight, picked, F.one_hot(rows, width)[:, :, None, None])
    level = (density * hidden).sum(0)
    variance = ((density * hidden.square()).sum(0) - level.square()).clamp_min(1e-4)
    nn.init.zeros_(unit.bn2.weight)
    unit.bn2.bias.copy_(constant.logit())
    _set_norm(unit.bn2, picked, level, variance, slope * variance.sqrt(), slope * (level - shift) - offset)


def _best_gates(x, y, std, density, constant_error) -> tuple[torch.Tensor, ...]:
    """Return for each channel how much better than a constant gate the best one is, and its shift, slope and offset.

    Args:
        x, y: Values of input and output (points, C).
        std: Standard deviation of x (C,).
        density: Weight of each point (points, 1).
        constant_error: Mean squared error of the constant gate (C,).
    """
    choices, errors = [], []
    for shift in _SHIFTS:
        hidden = (x / std + shift).relu() - shift
        for slope, offset in itertools.product(_SLOPES, _OFFSETS):
            choices.append((shift, slope, offset))
            errors.append((density * (y - x * (slope * hidden - offset).sigmoid()).square()).sum(0))
    error, best = torch.stack(errors).min(0)
    return constant_error - error, *torch.tensor(choices).to(x)[best].unbind(1)


@torch.no_grad()
def _values(activation: nn.Module | str, x: torch.Tensor) -> torch.Tensor:
    """Return the activation of x (points, C)."""
    maps = x[:, :, None, None].clone()  # the activation may work in place
    if isinstance(activation, str):
        return getattr(F, activation)(maps)[:, :, 0, 0]
    return copy.deepcopy(activation).to(maps).forward(maps)[:, :, 0, 0]


def _set(tensor: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    tensor[index.to(tensor.device)] = values.to(tensor)


def _set_norm(norm: Any, index, mean, variance, weight, bias) -> None:
    """Set some channels of a BatchNorm so that it computes `(h - mean) / sqrt(variance) * weight + bias`."""
    _set(norm.running_mean, index, mean)
    _set(norm.running_var, index, variance)
    _set(norm.weight, index, weight * (1 + norm.eps / variance).sqrt())
    _set(norm.bias, index, bias)

"""Converts the authors' arrays to a state dict of our networks and back; every array is checked and used once."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn as nn

from ..utils.words import counted, shortened
from .names import FIXED, ConversionError, open_atac_names

__all__ = ['ConversionError', 'array_shapes', 'to_arrays', 'to_state_dict']

_FLOATS = ('float16', 'float32')


def to_state_dict(
    arrays: Mapping[str, np.ndarray],
    model: nn.Module,
    in_chans: int | None = None,
    num_classes: int | None = None,
) -> dict[str, torch.Tensor]:
    """Convert the authors' arrays to a state dict with the table of names in `timm_atac.weights.names`.

    Args:
        arrays: Name -> array of float16 or float32, as `read_params` returns them.
        model: The network that was trained, or one with another number of input channels or classes.
        in_chans: Input channels of the network that was trained. None means those of `model`.
        num_classes: Classes of the network that was trained. None means those of `model`.

    Returns:
        Key -> float32 tensor, for every key but `num_batches_tracked`, which PyTorch sets to zero.

    Raises:
        ConversionError: An array is missing, surplus, or of another shape or dtype. Or the data norm of a CIFAR network
            has an affine other than 1 and 0; ours has none.
        ValueError: The authors' networks have no counterpart of a part of the model.
    """
    names = open_atac_names(model)
    expected = array_shapes(model, in_chans, num_classes)
    fixed = FIXED if 'data_bn.running_mean' in names else {}

    missing = [f'missing: {name!r} {shape}' for name, shape in expected.items() if name not in arrays]
    surplus = [f'surplus: {name!r} {array.shape}' for name, array in arrays.items() if name not in expected]
    misfit = []
    for name, array in arrays.items():
        if name not in expected:
            continue
        if array.shape != expected[name] or array.dtype.name not in _FLOATS:
            wanted = f'{expected[name]} of {" or ".join(_FLOATS)}'
            misfit.append(f'misfit: {name!r} is {array.shape} of {array.dtype.name}, expected {wanted}')
        elif name in fixed and not (array == fixed[name]).all():
            misfit.append(f'misfit: {name!r} is not {fixed[name]:g} everywhere; our data norm has no affine')
    if missing or surplus or misfit:
        lines = [line for faults in (missing, surplus, misfit) for line in shortened(faults)]
        raise ConversionError(
            f'A file of {counted(len(arrays), "array")} does not fit this {type(model).__name__} of {len(expected)}; '
            f'expected a file of the same architecture, trained with the same arguments: '
            f'{len(missing)} missing, {len(surplus)} surplus, {len(misfit)} misfit.\n  ' + '\n  '.join(lines)
        )
    return {ours: torch.from_numpy(arrays[theirs].astype(np.float32)) for ours, theirs in names.items()}


def array_shapes(
    model: nn.Module, in_chans: int | None = None, num_classes: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the authors' arrays of a network by name. The arguments are those of `to_state_dict`.

    Raises:
        ValueError: The authors' networks have no counterpart of a part of the model.
    """
    names = open_atac_names(model)
    shapes = _trained_shapes(model, in_chans, num_classes)
    fixed = FIXED if 'data_bn.running_mean' in names else {}
    return {theirs: shapes[ours] for ours, theirs in names.items()} | {
        name: shapes['data_bn.running_mean'] for name in fixed
    }


def to_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Convert a network to the authors' arrays, for MXNet's `load_parameters`.

    Args:
        model: `AtacResNet` of bottleneck blocks or `CifarResNet`, with a classifier.

    Returns:
        Name -> float32 array. For a CIFAR network this includes the affine of the data norm, 1 and 0.

    Raises:
        ConversionError: The authors' networks have no counterpart of a part of the model, or it has no classifier.
    """
    state = model.state_dict()
    names = open_atac_names(model)
    if 'fc.weight' not in state:
        raise ConversionError("The model has no classifier (num_classes=0), which the authors' networks have.")
    arrays = {theirs: state[ours].detach().cpu().float().numpy() for ours, theirs in names.items()}
    if 'data_bn.running_mean' in names:
        arrays |= {name: np.full_like(arrays['features.0.running_mean'], value) for name, value in FIXED.items()}
    return arrays


def _trained_shapes(model: nn.Module, in_chans: int | None, num_classes: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the network that was trained, which may have other inputs and outputs than the model."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if in_chans is not None:
        channels, _, *kernel = shapes['conv1.weight']
        shapes['conv1.weight'] = (channels, in_chans, *kernel)
        if 'data_bn.running_mean' in shapes:
            shapes |= {'data_bn.running_mean': (in_chans,), 'data_bn.running_var': (in_chans,)}
    classes = cast(Any, model).num_classes if num_classes is None else num_classes
    shapes |= {'fc.weight': (classes, cast(Any, model).head_hidden_size), 'fc.bias': (classes,)}
    return shapes

"""The table of names between the authors' MXNet networks and ours, in both directions.

The authors' names are the ones that `save_parameters` writes in https://github.com/YimianDai/open-atac. The tables give
every name; nothing is paired by order or shape.
"""

import torch.nn as nn

from ..units.atac import ChannelBottleneck, SEActivation
from ..utils.words import shortened

__all__ = ['FIXED', 'ConversionError', 'open_atac_names']

FIXED = {'features.0.gamma': 1.0, 'features.0.beta': 0.0}
"""Arrays of the authors' CIFAR networks that ours do not have, with their value: our data norm has no affine."""

_CIFAR = {
    'data_bn': 'features.0',
    'conv1': 'features.1',
    'stages.0': 'features.2',
    'stages.1': 'features.3',
    'stages.2': 'features.4',
    'norm': 'features.5',
    'act': 'features.6',
    'fc': 'output',
}
_CIFAR_BLOCK = {
    'bn1': 'bn1',
    'act1': 'msAA1',
    'conv1': 'conv1',
    'bn2': 'bn2',
    'act2': 'msAA2',
    'conv2': 'conv2',
    'downsample': 'downsample',
}
_IMAGENET = {
    'conv1': 'conv1',
    'bn1': 'bn1',
    'layer1': 'layer1',
    'layer2': 'layer2',
    'layer3': 'layer3',
    'layer4': 'layer4',
    'fc': 'fc',
}
_IMAGENET_BLOCK = {
    'conv1': 'conv1',
    'bn1': 'bn1',
    'act1': 'relu1',
    'conv2': 'conv2',
    'bn2': 'bn2',
    'act2': 'relu2',
    'conv3': 'conv3',
    'bn3': 'bn3',
    'downsample.0': 'downsample.0',
    'downsample.1': 'downsample.1',
}
_NORM = {'weight': 'gamma', 'bias': 'beta', 'running_mean': 'running_mean', 'running_var': 'running_var'}
_AFFINE = {'weight': 'weight', 'bias': 'bias'}


class ConversionError(ValueError):
    """Arrays and network do not fit, or the authors' networks have no counterpart of a part of the network.

    The message lists the first arrays that are missing, surplus or misfit.
    """


def open_atac_names(model: nn.Module) -> dict[str, str]:
    """Return the authors' names of a model's parameters and running statistics.

    Args:
        model: `AtacResNet` of bottleneck blocks (the authors' ResNet-50 v1b) or `CifarResNet`.

    Returns:
        Our state dict key -> the authors' name, one to one, in the order of the state dict. The classifier is included
        even if the model has none (`num_classes=0`). `num_batches_tracked` has no counterpart and is left out. The
        arrays in `FIXED` have no counterpart in our networks.

    Raises:
        ConversionError: The authors' networks have no counterpart of some parts; the message names the first ones.
    """
    layout = getattr(model, 'open_atac_layout', None)
    if layout == 'cifar':
        parts, block_parts, stages = _CIFAR, _CIFAR_BLOCK, [f'stages.{i}' for i in range(len(model.stages))]  # type: ignore[arg-type]
    elif layout == 'imagenet':
        parts, block_parts, stages = _IMAGENET, _IMAGENET_BLOCK, ['layer1', 'layer2', 'layer3', 'layer4']
    else:
        raise ConversionError(
            f"{type(model).__name__}: expected one of the authors' networks, AtacResNet or CifarResNet."
        )

    modules = dict(parts)
    for stage in stages:
        theirs = modules.pop(stage)
        for index in range(len(model.get_submodule(stage))):  # type: ignore[arg-type]
            modules.update({f'{stage}.{index}.{k}': f'{theirs}.{index}.{v}' for k, v in block_parts.items()})
    for path, module in model.named_modules():
        if path in modules and isinstance(module, ChannelBottleneck):
            theirs = modules.pop(path)
            modules.update({f'{path}.{k}': f'{theirs}.{v}' for k, v in _unit_parts(module).items()})

    names = {}
    foreign = []
    for key in model.state_dict():
        path, _, leaf = key.rpartition('.')
        if leaf == 'num_batches_tracked':
            continue
        leaves = _NORM if isinstance(model.get_submodule(path), nn.BatchNorm2d) else _AFFINE
        if path not in modules or leaf not in leaves:
            foreign.append(key)
        else:
            names[key] = f'{modules[path]}.{leaves[leaf]}'
    if foreign:
        listed = ', '.join(shortened([repr(key) for key in foreign]))
        raise ConversionError(f"{listed} of {type(model).__name__} has no counterpart in the authors' networks.")
    return names | {f'fc.{ours}': f'{modules["fc"]}.{theirs}' for ours, theirs in _AFFINE.items()}


def _unit_parts(unit: ChannelBottleneck) -> dict[str, str]:
    """Return the authors' names of a unit's layers: they number the layers it has, in the order of `sequence`."""
    sequence = ['pool', 'conv1', 'bn1', 'act', 'conv2', 'bn2']
    if isinstance(unit.act, nn.Identity):
        sequence.remove('act')
    if not isinstance(unit, SEActivation):
        sequence.remove('pool')
    return {name: f'module.{index}' for index, name in enumerate(sequence) if name not in ('act', 'pool')}

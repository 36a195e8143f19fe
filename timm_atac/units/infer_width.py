"""Channels and layout of a feature map, read from the attributes of the layers next to it. No layer runs."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch.nn as nn

__all__ = ['Width', 'is_norm', 'several_widths', 'width_at']

# Activations whose input does not come from the layer registered before them: the sibling next to the activation, and
# whether the activation has the width of its input or of its output, or a function that returns the width.
_HOSTS: dict[str, tuple[str, Literal['in', 'out'] | Callable[[Any], int]]] = {
    'timm.layers.mlp.GluMlp.act': ('fc2', 'in'),  # gets half of the output of fc1
    'timm.models.efficientformer_v2.Attention2d.act': ('proj', 'in'),  # after attention, not after talking_head2
    'timm.models.efficientformer_v2.Attention2dDownsample.act': ('proj', 'in'),
    'timm.models.gemma4_vit.Gemma4GatedMlp.act': ('down_proj', 'in'),  # registered after all layers
    'timm.models.mambaout.GatedConvBlock.act': ('fc2', 'in'),
    'timm.models.mambaout.Stem.act': ('conv2', 'in'),  # its norm works on a permuted map
    'timm.models.nfnet.NormFreeBlock.act1': ('conv1', 'in'),  # pre-activation, registered after downsample
    'timm.models.resnet.BasicBlock.act2': ('bn2', 'out'),  # an attention layer may be between
    'timm.models.resnet.Bottleneck.act3': ('bn3', 'out'),
    'timm.models.starnet.Block.act': ('f1', 'out'),  # registered after all convolutions
    'timm.models.vision_transformer.DiffParallelScalingBlock.mlp_act': ('in_proj', lambda block: block.in_split[0]),
    'timm.models.vision_transformer.ParallelScalingBlock.mlp_act': ('in_proj', lambda block: block.in_split[0]),
}
# Activations that several siblings share, whose widths usually differ.
_SHARED = {'timm.models.res2net.Bottle2neck.relu': ('bn1', 'bns', 'bn3')}
_ANY_DIMS = (nn.GroupNorm, nn.SyncBatchNorm)
_CONV_FMT = {1: 'NCL', 2: 'NCHW', 3: 'NCL'}


class Width(NamedTuple):
    """Channels and layout of a feature map, and the layer that they were read from."""

    channels: int
    input_fmt: str | None  # None if the layer works with several layouts
    name: str  # of the layer in the parent
    layer: nn.Module

    @property
    def likely_fmt(self) -> str:
        """The layout. If it is not known, the usual layout for this type of layer."""
        return self.input_fmt or ('NCHW' if type(self.layer) in _ANY_DIMS else 'NLC')


def width_at(parent: nn.Module, name: str, following: tuple[str, nn.Module] | None = None) -> Width | None:
    """Return the width of the activation `name` of `parent`, or of a container `name` that starts with the activation.

    The width comes from the first of these that has one: the table above for the parent's class, the parent itself if
    it is a normalisation, the last layer before the activation, the first layer after it.

    Args:
        parent: Module that has the activation or will get it.
        name: Name of the activation in the parent.
        following: Name and module of a layer after the activation, which will be put into the parent.

    Returns:
        The width, None if it is not known yet.
    """
    children = {k: m for k, m in parent._modules.items() if m is not None}
    if following is not None:
        children[following[0]] = following[1]
    host = f'{type(parent).__module__}.{type(parent).__qualname__}.{name}'
    if host in _HOSTS:
        sibling, side = _HOSTS[host]
        if sibling not in children:
            return None
        width = _of_module(sibling, children[sibling], 'out' if callable(side) else side)
        return width._replace(channels=side(parent)) if width is not None and callable(side) else width

    own = _of_layer(parent, 'out')
    if own is not None and is_norm(parent):
        return Width(*own, name=type(parent).__name__, layer=parent)
    names = list(children)
    index = names.index(name) if name in names else len(names)
    before = (_of_module(k, children[k], 'out') for k in reversed(names[:index]))
    after = (_of_module(k, children[k], 'in') for k in names[index + 1 :])
    return _first(before) or _first(after)


def several_widths(parent: nn.Module, name: str) -> dict[str, int]:
    """Return the widths of an activation's inputs by the names of the siblings that they come from.

    Args:
        parent: Module that will get the activation.
        name: Name of the activation in the parent.

    Returns:
        The widths. It is empty if the activation is not known to be shared, or all widths are the same.
    """
    children = parent._modules
    siblings = _SHARED.get(f'{type(parent).__module__}.{type(parent).__qualname__}.{name}', ())
    found = {k: _of_module(k, m, 'out') for k in siblings if (m := children.get(k)) is not None}
    widths = {k: width.channels for k, width in found.items() if width is not None}
    return widths if len({*widths.values()}) > 1 else {}


def _first(widths: Iterable[Width | None]) -> Width | None:
    """Return the first width that is not None. If its layout is unknown, take the next known one."""
    found = None
    for width in filter(None, widths):
        found = found or width
        if width.input_fmt is not None:
            return found._replace(input_fmt=width.input_fmt)
    return found


def _of_module(name: str, module: nn.Module, side: str) -> Width | None:
    own = _of_layer(module, side)
    if own is not None:
        return Width(*own, name=name, layer=module)
    children = list(module.named_children())
    found = (_of_module(f'{name}.{k}', m, side) for k, m in (reversed(children) if side == 'out' else children))
    # a layer of one channel inside a module computes a gate, from channels (ECA) or positions (CBAM), not the output
    return _first(width for width in found if width is None or width.channels > 1)


def _of_layer(module: nn.Module, side: str) -> tuple[int, str | None] | None:
    """Return channels and layout from the attributes that PyTorch, timm and this package use for them."""
    channels: object
    input_fmt: str | None
    if hasattr(module, 'input_fmt'):  # one of our units
        channels, input_fmt = getattr(module, 'channels', None), str(module.input_fmt)
    elif hasattr(module, 'out_channels'):  # a convolution, or a module that ends with one
        channels = module.out_channels if side == 'out' else getattr(module, 'in_channels', None)
        dims = getattr(module, 'kernel_size', (0, 0))
        input_fmt = _CONV_FMT.get(len(dims) if isinstance(dims, tuple) else 2, 'NCHW')
    elif hasattr(module, 'out_features'):
        channels, input_fmt = module.out_features if side == 'out' else getattr(module, 'in_features', None), 'NLC'
    elif is_norm(module):
        shape = getattr(module, 'normalized_shape', None)
        weight = getattr(module, 'weight', None)
        channels = getattr(module, 'num_features', None) or getattr(module, 'num_channels', None)
        channels = channels or (shape[-1] if shape else None) or (weight.numel() if weight is not None else None)
        if shape is not None and len(shape) > 1:
            return None  # over (C, H, W), or (H, W, C)
        input_fmt = _norm_fmt(module)
    else:
        return None
    return (channels, input_fmt) if isinstance(channels, int) and channels > 0 else None


def is_norm(module: nn.Module) -> bool:
    """True if the class name is that of a normalisation and `weight` exists, even as None. A NormFreeNet has none."""
    return hasattr(module, 'weight') and any(word in type(module).__name__.lower() for word in ('norm', 'affine'))


def _norm_fmt(module: nn.Module) -> str | None:
    name = type(module).__name__.lower()
    if '1d' in name or type(module) in _ANY_DIMS:
        return None  # BatchNorm1d takes (B, C) and (B, C, L), or follows a reshape
    if '3d' in name:
        return 'NCL'
    channels_first = '2d' in name or isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
    return 'NCHW' if channels_first else 'NLC'

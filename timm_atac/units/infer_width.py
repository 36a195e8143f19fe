"""What layers tell of the feature map next to them: its channels and its layout. By their attributes; nothing runs."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch.nn as nn

__all__ = ['Width', 'width_at']

# Where an activation is not fed by the layer registered before it: the sibling next to it, and on which side its width
# is the activation's, or how many of its channels are.
_HOSTS: dict[str, tuple[str, Literal['in', 'out'] | Callable[[Any], int]]] = {
    'timm.layers.mlp.GluMlp.act': ('fc2', 'in'),  # sees half of fc1
    'timm.models.efficientformer_v2.Attention2d.act': ('proj', 'in'),  # after attention, not after talking_head2
    'timm.models.efficientformer_v2.Attention2dDownsample.act': ('proj', 'in'),
    'timm.models.gemma4_vit.Gemma4GatedMlp.act': ('down_proj', 'in'),  # registered after all layers
    'timm.models.mambaout.GatedConvBlock.act': ('fc2', 'in'),
    'timm.models.mambaout.Stem.act': ('conv2', 'in'),  # its norm works on a permuted map
    'timm.models.nfnet.NormFreeBlock.act1': ('conv1', 'in'),  # pre-activation, registered after downsample
    'timm.models.resnet.BasicBlock.act2': ('bn2', 'out'),  # an attention layer may stand between
    'timm.models.resnet.Bottleneck.act3': ('bn3', 'out'),
    'timm.models.starnet.Block.act': ('f1', 'out'),  # registered after all convolutions
    'timm.models.vision_transformer.DiffParallelScalingBlock.mlp_act': ('in_proj', lambda block: block.in_split[0]),
    'timm.models.vision_transformer.ParallelScalingBlock.mlp_act': ('in_proj', lambda block: block.in_split[0]),
}
_ANY_DIMS = (nn.GroupNorm, nn.SyncBatchNorm)
_CONV_FMT = {1: 'NCL', 2: 'NCHW', 3: 'NCL'}


class Width(NamedTuple):
    """Channels and layout of a feature map, and which layer has told: its name in the parent, and the layer itself."""

    channels: int
    input_fmt: str | None  # None: the layer works with several
    name: str
    layer: nn.Module

    @property
    def likely_fmt(self) -> str:
        """The layout, where no layer has told it that of this kind of layer."""
        return self.input_fmt or ('NCHW' if type(self.layer) in _ANY_DIMS else 'NLC')


def width_at(parent: nn.Module, name: str, following: tuple[str, nn.Module] | None = None) -> Width | None:
    """Width of the activation `name` of `parent`, or of the container `name` that begins with the activation.

    In this order: what the table above says of the parent's class, the parent itself where it is a normalisation, the
    last layer before the activation that has a width, the first one after it.

    Args:
        parent: Module that has the activation, or is about to.
        name: Name of the activation in the parent.
        following: Name and module that are being put into the parent after it.

    Returns:
        None where it cannot be known yet.
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
    if own is not None and _is_norm(parent):
        return Width(*own, name=type(parent).__name__, layer=parent)
    names = list(children)
    before = names[: names.index(name)] if name in names else names
    after = names[names.index(name) + 1 :] if name in names else []
    return _first([(k, children[k]) for k in reversed(before)], 'out') or _first(
        [(k, children[k]) for k in after], 'in'
    )


def _first(candidates: Iterable[tuple[str, nn.Module]], side: str) -> Width | None:
    return _with_layout(_of_module(name, module, side) for name, module in candidates)


def _with_layout(widths: Iterable[Width | None]) -> Width | None:
    """The first width there is; its layout from a later one where the first does not tell that."""
    found = None
    for width in widths:
        if width is None:
            continue
        found = found or width
        if width.input_fmt is not None:
            return found._replace(input_fmt=width.input_fmt)
    return found


def _of_module(name: str, module: nn.Module, side: str) -> Width | None:
    own = _of_layer(module, side)
    if own is not None:
        return Width(*own, name=name, layer=module)
    children = list(module.named_children())
    # one channel inside a module is a gate's, computed across channels (ECA) or positions (CBAM), and not its output's
    found = (_of_module(f'{name}.{k}', m, side) for k, m in (reversed(children) if side == 'out' else children))
    return _with_layout(width for width in found if width is None or width.channels > 1)


def _of_layer(module: nn.Module, side: str) -> tuple[int, str | None] | None:
    """Channels and layout by the words that PyTorch, timm and we use for them."""
    channels: object
    input_fmt: str | None
    if hasattr(module, 'input_fmt'):  # a unit of ours
        channels, input_fmt = getattr(module, 'channels', None), str(module.input_fmt)
    elif hasattr(module, 'out_channels'):  # a convolution, or a module that ends with one
        channels = module.out_channels if side == 'out' else getattr(module, 'in_channels', None)
        dims = getattr(module, 'kernel_size', (0, 0))
        input_fmt = _CONV_FMT.get(len(dims) if isinstance(dims, tuple) else 2, 'NCHW')
    elif hasattr(module, 'out_features'):
        channels, input_fmt = module.out_features if side == 'out' else getattr(module, 'in_features', None), 'NLC'
    elif _is_norm(module):
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


def _is_norm(module: nn.Module) -> bool:
    """A layer that normalises: by its name, and a weight of its own, None included (a NormFreeNet has none)."""
    return hasattr(module, 'weight') and any(word in type(module).__name__.lower() for word in ('norm', 'affine'))


def _norm_fmt(module: nn.Module) -> str | None:
    name = type(module).__name__.lower()
    if '1d' in name or type(module) in _ANY_DIMS:
        return None  # BatchNorm1d is for (B, C) and (B, C, L), or stands behind a reshape
    if '3d' in name:
        return 'NCL'
    channels_first = '2d' in name or isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
    return 'NCHW' if channels_first else 'NLC'

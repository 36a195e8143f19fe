"""What layers tell of the feature map next to them: its channels and its layout. By their attributes; nothing runs."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch.nn as nn

__all__ = ['Width', 'width_at']

# Where an activation is not fed by the layer registered before it: the sibling that has the activation's width, and on
# which side.
_HOSTS: dict[str, tuple[str, Literal['in', 'out']]] = {
    'timm.layers.mlp.GluMlp.act': ('fc2', 'in'),  # sees half of fc1
    'timm.models.mambaout.GatedConvBlock.act': ('fc2', 'in'),
    'timm.models.starnet.Block.act': ('f1', 'out'),  # registered after all convolutions
}
_CONV_FMT = {1: 'NCL', 2: 'NCHW', 3: 'NCL'}


class Width(NamedTuple):
    """Channels and layout of a feature map, and which layer has told: its name in the parent, and the layer itself."""

    channels: int
    input_fmt: str | None  # None: the layer works with several
    name: str
    layer: nn.Module


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
        return _first([(sibling, children[sibling])], side) if sibling in children else None

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
    """The first width any of the candidates tells; its layout from a later one where the first does not tell that."""
    found = None
    for name, module in candidates:
        width = _of_module(name, module, side)
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
    return _first([(f'{name}.{k}', m) for k, m in (reversed(children) if side == 'out' else children)], side)


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
        input_fmt = _norm_fmt(module)
    else:
        return None
    return (channels, input_fmt) if isinstance(channels, int) and channels > 0 else None


def _is_norm(module: nn.Module) -> bool:
    """A layer that normalises: by its name, and without convolutions or linear layers inside."""
    if not any(word in type(module).__name__.lower() for word in ('norm', 'affine')):
        return False
    return not any(hasattr(m, 'out_channels') or hasattr(m, 'out_features') for m in module.children())


def _norm_fmt(module: nn.Module) -> str | None:
    name = type(module).__name__.lower()
    if '1d' in name:
        return None  # (B, C), (B, C, L), or behind a reshape
    if '3d' in name:
        return 'NCL'
    channels_first = '2d' in name or isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
    return 'NCHW' if channels_first else 'NLC'

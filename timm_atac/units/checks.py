"""Checks of arguments and inputs, shared by several networks."""

from collections.abc import Sequence

import torch
import torch.nn as nn

__all__ = ['check_feat_size', 'check_stages']


def check_feat_size(layer: nn.Module, x: torch.Tensor, feat_size: tuple[int, int], reason: str) -> None:
    """Check that an input has the height and width that a layer was created for. Does nothing while tracing.

    Args:
        layer: For the message: its class, and its `img_size` if it has one.
        x: Input (B, C, H, W).
        feat_size: Expected height and width of the input.
        reason: For the message: why the layer needs this size.

    Raises:
        ValueError: The input has another height or width.
    """
    if torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
        return
    if tuple(x.shape[-2:]) != feat_size:
        img_size = getattr(layer, 'img_size', None)
        images = f' (of images of {img_size[0]} x {img_size[1]})' if img_size else ''
        raise ValueError(
            f'{type(layer).__name__} is for feature maps of {feat_size[0]} x {feat_size[1]}{images} and got one of '
            f'shape {tuple(x.shape)}: {reason}. Resize the images, or create the network for theirs: '
            f"timm.create_model('...', img_size=(height, width))."
        )


def check_stages(stages: Sequence[int], num_stages: int, name: str = 'atac_stages') -> tuple[int, ...]:
    """Check an argument that selects stages of a network.

    Args:
        stages: Stage numbers from 1, in any order. `()` selects none.
        num_stages: Number of stages of the network.
        name: Name of the argument, for the message.

    Returns:
        The stages, sorted.

    Raises:
        ValueError: `stages` is not a sequence of different integers in 1..num_stages.
    """
    allowed = range(1, num_stages + 1)
    is_sequence = isinstance(stages, (list, tuple, set, frozenset, range))
    if not is_sequence or not all(type(s) is int and s in allowed for s in stages) or len(set(stages)) < len(stages):
        raise ValueError(
            f'{name}={stages!r}: expected a tuple of different stage numbers from '
            f'{tuple(allowed)}, such as ({num_stages - 1}, {num_stages}), or () for none.'
        )
    return tuple(sorted(stages))

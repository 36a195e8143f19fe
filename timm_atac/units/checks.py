"""Checks of arguments and inputs that several networks share."""

from collections.abc import Sequence

import torch
import torch.nn as nn

__all__ = ['check_feat_size', 'check_stages']


def check_feat_size(layer: nn.Module, x: torch.Tensor, feat_size: tuple[int, int], reason: str) -> None:
    """Check that a layer gets the feature maps that it was made for; traced, scripted code is not asked.

    Raises:
        ValueError: It does not.
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
    """Check the stages that get the unit, or whatever they get.

    Args:
        stages: Stage numbers from 1, in any order; `()` is none.
        num_stages: The highest number there is.
        name: Of the argument that they are from.

    Returns:
        The stages, sorted.

    Raises:
        ValueError: Not a sequence of different integers in 1..num_stages.
    """
    allowed = range(1, num_stages + 1)
    found = tuple(stages) if isinstance(stages, (list, tuple, set, frozenset, range)) else None
    if found is None or not all(type(s) is int and s in allowed for s in found) or len(set(found)) < len(found):
        raise ValueError(
            f'{name}={stages!r}: expected a tuple of different stage numbers from '
            f'{tuple(allowed)}, such as ({num_stages - 1}, {num_stages}), or () for none.'
        )
    return tuple(sorted(found))

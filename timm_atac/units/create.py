"""Which activation goes where in a network, and how it is made once its width is known."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch.nn as nn
from timm.layers import LayerType, create_act_layer, get_act_layer

from .atac import init_weight_
from .deferred import ChannelModule

__all__ = ['create_activation', 'init_weights']


def create_activation(
    act_layer: LayerType | None,
    channels: int,
    rd_ratio: float | None = None,
    norm_layer: LayerType | None = None,
    input_fmt: str | None = None,
    device=None,
    dtype=None,
) -> nn.Module:
    """Create the activation of a feature map whose width is known.

    A layer whose constructor takes `channels` (ATAC and its relatives, timm's channel attentions) gets the width and
    those of the other arguments that it takes; any other is created as timm does it.

    Args:
        act_layer: Name known to timm, class, or `partial` of one, whose own arguments win over `norm_layer`. None is
            the identity.
        channels: Width C of the feature map (B, C, H, W).
        rd_ratio: Width of the bottleneck over C, None for the layer's own.
        norm_layer: Normalisation inside a unit of ours, None for the unit's own.
        input_fmt: Layout of the feature map, None for (B, C, H, W).

    Raises:
        ValueError: A name timm does not know, or `rd_ratio` for a layer that takes none or has it bound already.
    """
    try:
        layer = get_act_layer(act_layer)
    except KeyError:
        raise ValueError(
            f"act_layer={act_layer!r}: no activation of that name in timm; expected 'atac', 'se_act', 'nin', 'xunit', "
            f"a name such as 'relu' or 'silu', or a class. ('local_se' is an attn_layer.)"
        ) from None
    if layer is None:
        return nn.Identity()

    accepted = signature(layer).parameters
    bound: dict[str, Any] = layer.keywords if isinstance(layer, partial) else {}
    if rd_ratio is not None and ('rd_ratio' not in accepted or 'rd_ratio' in bound):
        reason = 'has its own already' if 'rd_ratio' in bound else 'has no bottleneck to set the width of'
        raise ValueError(
            f'rd_ratio={rd_ratio!r} together with act_layer={act_layer!r}, which {reason}: drop one of the two. '
            f'(For an attn_layer, give a partial: attn_layer=partial(timm_atac.LocalSE, rd_ratio={rd_ratio!r}).)'
        )
    if 'channels' not in accepted:
        return create_act_layer(layer, inplace=True).to(device=device, dtype=dtype)

    options: dict[str, Any] = dict(
        channels=channels, rd_ratio=rd_ratio, input_fmt=input_fmt, device=device, dtype=dtype
    )
    cls = layer.func if isinstance(layer, partial) else layer
    if isinstance(cls, type) and issubclass(cls, ChannelModule):
        options['norm_layer'] = norm_layer  # another's norm may be off by default
    return layer(
        **{
            name: value
            for name, value in options.items()
            if value is not None and name in accepted and name not in bound
        }
    )


def init_weights(model: nn.Module, zero_init_last: bool) -> None:
    """Initialise a network as the authors do: He for convolutions and classifier, biases zero, norms one and zero.

    Args:
        model: Network, changed in place.
        zero_init_last: Call `zero_init_last` of every block, so that it starts as the identity.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            init_weight_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if zero_init_last:
        for module in model.modules():
            zero_init: Callable[[], None] | None = getattr(module, 'zero_init_last', None)
            if zero_init is not None:
                zero_init()

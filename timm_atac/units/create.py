"""Creation of an activation for a known width, and initialisation of a network."""

from functools import partial
from inspect import signature
from typing import Any, cast

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
    """Create an activation for a feature map of known width.

    If the layer's constructor takes `channels`, as the units and timm's channel attentions do, it gets the width and
    the other arguments that it takes. Any other layer is created by timm's `create_act_layer`.

    Args:
        act_layer: Name in timm, class, or `partial` of a class, whose arguments override `norm_layer`. None is the
            identity.
        channels: Width C of the feature map (B, C, H, W).
        rd_ratio: Width of the bottleneck over C, None for the layer's default.
        norm_layer: Normalisation inside one of our units, None for the unit's default.
        input_fmt: Layout of the feature map, None for (B, C, H, W).

    Raises:
        ValueError: timm has no activation of that name, or `rd_ratio` was given for a layer that does not take it or
            that already has it.
    """
    try:
        layer = get_act_layer(act_layer)
    except KeyError:
        raise ValueError(
            f"act_layer={act_layer!r}: timm has no activation of that name. Expected 'atac', 'se_act', 'nin', 'xunit', "
            f"one of these with a norm such as 'atac_layernorm2d', a name such as 'relu' or 'silu', or a class. "
            f"('local_se' is an attn_layer.)"
        ) from None
    if layer is None:
        return nn.Identity()

    accepted = signature(layer).parameters
    bound: dict[str, Any] = layer.keywords if isinstance(layer, partial) else {}
    if rd_ratio is not None and ('rd_ratio' not in accepted or 'rd_ratio' in bound):
        reason = 'already has a rd_ratio' if 'rd_ratio' in bound else 'has no bottleneck'
        raise ValueError(
            f'rd_ratio={rd_ratio!r} was given with act_layer={act_layer!r}, which {reason}. Drop one of the two. '
            f'(For an attn_layer, pass a partial: attn_layer=partial(timm_atac.LocalSE, rd_ratio={rd_ratio!r}).)'
        )
    if 'channels' not in accepted:
        # not in place: full backward hooks forbid it, and autograd stores as many bytes either way
        return create_act_layer(layer).to(device=device, dtype=dtype)

    options: dict[str, Any] = dict(
        channels=channels, rd_ratio=rd_ratio, input_fmt=input_fmt, device=device, dtype=dtype
    )
    cls = layer.func if isinstance(layer, partial) else layer
    if isinstance(cls, type) and issubclass(cls, ChannelModule):
        options['norm_layer'] = norm_layer  # other layers may have no norm by default
    return layer(
        **{
            name: value
            for name, value in options.items()
            if value is not None and name in accepted and name not in bound
        }
    )


def init_weights(model: nn.Module, zero_init_last: bool) -> None:
    """Initialise convolutions and linear layers as the authors do: weights by `init_weight_`, biases zero.

    Args:
        model: Network, changed in place.
        zero_init_last: Also call `zero_init_last` of every block, so that each block starts as the identity.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            init_weight_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if zero_init_last:
        for module in model.modules():
            if hasattr(module, 'zero_init_last'):
                cast(Any, module).zero_init_last()

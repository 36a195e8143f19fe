"""Base classes and functions of the ResNets: blocks with options per stage, sizes of feature maps, configurations."""

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, cast

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models.resnet import Bottleneck, ResNet

__all__ = ['LayeredResNet', 'SpatialBottleneck', 'StageBlock', 'imagenet_cfg', 'stage_sizes']


class StageBlock(partial):
    """A `partial` of a block class that has the attribute `expansion`, which timm's `ResNet` reads."""

    @property
    def expansion(self) -> int:
        return cast(Any, self.func).expansion


class LayeredResNet(ResNet):
    """timm's ResNet with layers of other types. For full backward hooks, see `AtacResNet`.

    Attributes:
        own_layers: Types of these layers. timm's initialisation is followed by their `reset_parameters`.
    """

    own_layers: tuple[type, ...] = ()

    def set_img_size(self, img_size: int | tuple[int, int]) -> None:
        """Set `img_size` of the network and of its own layers; they only work for it, and name it in errors."""
        for module in self.modules():
            if module is self or isinstance(module, self.own_layers):
                cast(Any, module).img_size = to_2tuple(img_size)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, self.own_layers):
                cast(Any, module).reset_parameters()


class SpatialBottleneck(Bottleneck):
    """timm's `Bottleneck` with another layer in place of its 3x3 convolution.

    Args:
        *args: Arguments of timm's `Bottleneck`.
        spatial_layer: Layer that is created with the convolution's input channels, output channels, `stride`,
            `dilation`, `device` and `dtype`.
        **kwargs: Arguments of timm's `Bottleneck`.

    Raises:
        ValueError: The cardinality is not 1.
    """

    def __init__(self, *args: Any, spatial_layer: Callable[..., nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conv = self.conv2
        if conv.groups != 1:
            raise ValueError(
                f'cardinality={conv.groups}: expected 1; the layers in place of the 3x3 convolutions have no groups.'
            )
        self.conv2 = spatial_layer(  # type: ignore[assignment]
            conv.in_channels,
            conv.out_channels,
            stride=conv.stride[0],
            dilation=conv.dilation[0],
            device=kwargs.get('device'),
            dtype=kwargs.get('dtype'),
        )


def stage_sizes(img_size: int | tuple[int, int], num_stages: int, output_stride: int = 32) -> list[tuple[int, int]]:
    """Return height and width of the output of each stage of timm's `ResNet`.

    Args:
        img_size: Height and width of the images, or one number for both.
        num_stages: Number of stages. The first one has stride 4.
        output_stride: As in timm's `ResNet`: the largest stride.

    Raises:
        ValueError: `img_size` is not one or two integers of at least 1.
    """
    size = to_2tuple(img_size)
    if len(size) != 2 or not all(isinstance(side, Integral) and int(side) >= 1 for side in size):
        raise ValueError(f'img_size={img_size!r}: expected height and width of the images, or one number for both.')
    height, width = map(int, size)
    strides = [min(4 * 2**stage, output_stride) for stage in range(num_stages)]
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


def imagenet_cfg(url: str = '', **kwargs: Any) -> dict[str, Any]:
    """Return a configuration for `generate_default_cfgs`: ImageNet at 224 px, prepared as in the paper."""
    return {
        'url': url,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        **kwargs,
    }

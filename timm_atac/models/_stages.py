"""What the ResNets here share: blocks that differ by stage, the sizes of feature maps, and default configurations."""

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
    """A block with options of its stage bound, as timm's `ResNet` wants it: callable, and with an `expansion`."""

    @property
    def expansion(self) -> int:
        return cast(Any, self.func).expansion


class LayeredResNet(ResNet):
    """timm's ResNet with layers that initialise themselves, by `reset_parameters`, after timm has initialised all."""

    own_layers: tuple[type, ...] = ()

    def set_img_size(self, img_size: int | tuple[int, int]) -> None:
        """Note the only size of images that network and layers are for, so that they can say it."""
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
        spatial_layer: Called with the convolution's input and output channels, `stride`, `dilation`, device and dtype.

    Raises:
        ValueError: The convolution has groups.
    """

    def __init__(self, *args: Any, spatial_layer: Callable[..., nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conv = self.conv2
        if conv.groups != 1:
            raise ValueError(
                f'cardinality={conv.groups}: expected 1; what replaces the 3x3 convolutions has no groups.'
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
    """Height and width of the feature maps that the stages of timm's `ResNet` put out.

    Args:
        img_size: Height and width of the images, or one number for both.
        num_stages: Number of stages, the first of stride 4.
        output_stride: As in timm's `ResNet`: stages of a larger stride keep the size of the one before.

    Raises:
        ValueError: `img_size` is not a size of at least 1.
    """
    size = to_2tuple(img_size)
    if len(size) != 2 or not all(isinstance(side, Integral) and int(side) >= 1 for side in size):
        raise ValueError(f'img_size={img_size!r}: expected height and width of the images, or one number for both.')
    height, width = (_halved(_halved(int(side))) for side in size)
    sizes = [(height, width)]
    for stage in range(1, num_stages):
        if 4 * 2**stage <= output_stride:
            height, width = _halved(height), _halved(width)
        sizes.append((height, width))
    return sizes


def _halved(side: int) -> int:
    return (side + 1) // 2


def imagenet_cfg(url: str = '', **kwargs: Any) -> dict[str, Any]:
    """A configuration for `generate_default_cfgs`: ImageNet at 224 px as the paper's networks see it."""
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

"""GE-ResNet: Gather-Excite with a learned global gather, at the end of the residual branch of each block.

Paper: `Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks` - https://arxiv.org/abs/1810.12348
(Hu et al., NeurIPS 2018)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch.nn as nn
from timm.layers import LayerType
from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck

from ..units.gather_excite import GatherExcite
from ._build import build_model
from ._stages import LayeredResNet, StageBlock, imagenet_cfg, stage_sizes

__all__ = ['GEResNet']


class GEResNet(LayeredResNet):
    """timm's ResNet with `GatherExcite` at the end of every residual branch, for images of a fixed size.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: Blocks in each stage.
        img_size: Height and width of the images, or one number for both.
        rd_ratio: Width of the bottleneck in `GatherExcite` over its channels.
        output_stride: As in timm's `ResNet`.
        norm_layer: Normalisation layer of the network and of `GatherExcite`.
        **kwargs: Other arguments of timm's `ResNet`.

    Raises:
        ValueError: In the forward pass, images have another size than `img_size`.

    Source:
        GE-theta+ ResNet-50 of Table 4 of "Attention as Activation", from the Gather-Excite paper.
    """

    own_layers = (GatherExcite,)

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        img_size: int | tuple[int, int] = 224,
        rd_ratio: float = 1 / 16,
        output_stride: int = 32,
        norm_layer: LayerType = nn.BatchNorm2d,
        **kwargs: Any,
    ) -> None:
        layer = partial(GatherExcite, rd_ratio=rd_ratio, norm_layer=norm_layer)
        sizes = stage_sizes(img_size, len(layers), output_stride)
        blocks = tuple(StageBlock(block, attn_layer=partial(layer, feat_size=size)) for size in sizes)
        super().__init__(cast(Any, blocks), tuple(layers), output_stride=output_stride, norm_layer=norm_layer, **kwargs)
        self.set_img_size(img_size)


# `_register.py` registers the entry function named by each key.
default_cfgs = generate_default_cfgs(
    {
        'ge_plus_resnet50.untrained': imagenet_cfg(
            fixed_input_size=True,
            paper_ids='arXiv:1810.12348',
            paper_name='Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks',
        ),
    }
)


def ge_plus_resnet50(pretrained: bool = False, **kwargs) -> GEResNet:
    """ResNet-50 with Gather-Excite (GE-theta+) at the end of every residual branch."""
    model_args = {'block': Bottleneck, 'layers': (3, 4, 6, 3), **kwargs}
    return build_model(GEResNet, 'ge_plus_resnet50', pretrained, **model_args)

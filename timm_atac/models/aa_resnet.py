"""AA-ResNet: 2-D relative self-attention beside the 3x3 convolutions.

Paper: `Attention Augmented Convolutional Networks` - https://arxiv.org/abs/1904.09925 (Bello et al., ICCV 2019)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import make_divisible
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.models import generate_default_cfgs
from timm.models.resnet import Bottleneck

from ..units.checks import check_feat_size, check_stages
from ._build import build_model
from ._stages import LayeredResNet, SpatialBottleneck, StageBlock, imagenet_cfg, stage_sizes

__all__ = ['AAResNet', 'AugmentedConv2d']


class AugmentedConv2d(nn.Module):
    """A 3x3 convolution and multi-head self-attention, concatenated: (B, C, H, W) -> (B, D, H', W').

    The attention computes the last `v_ratio` of the D channels: `Wo concat(softmax((q k + r(q)) / sqrt(d)) v)` over the
    heads, where r(q) are logits of the relative height and width. An average pool before queries, keys and values has
    the stride of the convolution. If `pooled`, another one halves the map, and the result is interpolated to the size
    of the output. Multi-head attention and relative logits are timm's `BottleneckAttn`.

    Args:
        in_channels: C.
        out_channels: D.
        feat_size: Height and width of the output.
        stride: Stride of convolution and attention, 1 or 2.
        dilation: Dilation of the convolution.
        num_heads: Number of heads.
        qk_ratio: Key channels of all heads over D, the paper's kappa.
        v_ratio: Value channels of all heads over D, the paper's upsilon; rounded to a multiple of `num_heads`.
        min_dim_head: Minimum number of key channels of a head.
        pooled: Compute the attention on a map of half the height and width.

    Raises:
        ValueError: `stride` is neither 1 nor 2. In the forward pass, the output would not have the size `feat_size`.

    Source:
        The paper's attention augmented convolution: a 1x1 convolution mixes the heads, 3x3 average pools of stride 2
        shrink the maps, and bilinear interpolation enlarges them. Ours: beside a convolution of stride 2, such an
        average pool shrinks the input of the attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        feat_size: tuple[int, int],
        stride: int = 1,
        dilation: int = 1,
        num_heads: int = 8,
        qk_ratio: float = 0.2,
        v_ratio: float = 0.1,
        min_dim_head: int = 20,
        pooled: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f'stride={stride!r}: expected 1 or 2.')
        self.feat_size = feat_size
        self.pooled = pooled
        v_channels = make_divisible(out_channels * v_ratio, num_heads)
        self.conv = nn.Conv2d(
            in_channels, out_channels - v_channels, 3, stride, padding=dilation, dilation=dilation, bias=False, **dd
        )
        self.pool = nn.Sequential(
            *(nn.AvgPool2d(3, 2, padding=1, count_include_pad=False) for _ in range((stride == 2) + pooled))
        )
        height, width = ((side + 1) // 2 for side in feat_size) if pooled else feat_size
        self.attn = BottleneckAttn(
            in_channels,
            v_channels,
            feat_size=(height, width),
            num_heads=num_heads,
            dim_head=max(min_dim_head, int(out_channels * qk_ratio) // num_heads),
            scale_pos_embed=True,
            **dd,
        )
        self.proj = nn.Conv2d(v_channels, v_channels, 1, bias=False, **dd)

    def reset_parameters(self) -> None:
        """Initialise the attention as timm does. The network initialises the convolutions."""
        self.attn.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if not torch.jit.is_scripting():
            check_feat_size(self, y, self.feat_size, 'its attention has an embedding for each distance on the map')
        attended = self.proj(self.attn(self.pool(x)))
        if self.pooled:
            attended = F.interpolate(attended, size=y.shape[-2:], mode='bilinear')
        return torch.cat([y, attended], dim=1)


class AAResNet(LayeredResNet):
    """timm's ResNet with `AugmentedConv2d` for the 3x3 convolutions of chosen stages, for images of a fixed size.

    Args:
        layers: Blocks (timm's `Bottleneck`) in each stage.
        aa_stages: Stages with `AugmentedConv2d`, counted from 1.
        pooled_stages: Stages whose attention, if any, works on maps of half the height and width, which saves memory.
        img_size: Height and width of the images, or one number for both.
        output_stride: As in timm's `ResNet`.
        **kwargs: Arguments of timm's `ResNet`.

    Raises:
        ValueError: A stage does not exist, or `aa_layer` is given: timm puts that blur after the replaced convolutions.
            In the forward pass, images have another size than `img_size`.

    Source:
        AA-ResNet-50 of Table 4 of "Attention as Activation", from the Attention Augmented paper: the last three stages,
        kappa = 2 upsilon = 0.2, 8 heads of at least 20 key channels.
    """

    own_layers = (AugmentedConv2d,)

    def __init__(
        self,
        layers: Sequence[int],
        aa_stages: Sequence[int] = (2, 3, 4),
        pooled_stages: Sequence[int] = (2,),
        img_size: int | tuple[int, int] = 224,
        output_stride: int = 32,
        **kwargs: Any,
    ) -> None:
        if kwargs.get('aa_layer') is not None:
            raise ValueError(
                f'aa_layer={kwargs["aa_layer"]!r}: expected None. It is a blur after a convolution of stride 1, '
                f'in whose place AAResNet has attention of stride 2.'
            )
        aa_stages = check_stages(aa_stages, len(layers), 'aa_stages')
        pooled_stages = check_stages(pooled_stages, len(layers), 'pooled_stages')
        blocks = [
            StageBlock(
                SpatialBottleneck,
                spatial_layer=partial(AugmentedConv2d, feat_size=size, pooled=stage in pooled_stages),
            )
            if stage in aa_stages
            else Bottleneck
            for stage, size in enumerate(stage_sizes(img_size, len(layers), output_stride), 1)
        ]
        super().__init__(cast(Any, tuple(blocks)), tuple(layers), output_stride=output_stride, **kwargs)
        self.set_img_size(img_size)


# `_register.py` registers the entry function named by each key.
default_cfgs = generate_default_cfgs(
    {
        'aa_resnet50.untrained': imagenet_cfg(
            fixed_input_size=True,
            paper_ids='arXiv:1904.09925',
            paper_name='Attention Augmented Convolutional Networks',
        ),
    }
)


def aa_resnet50(pretrained: bool = False, **kwargs) -> AAResNet:
    """ResNet-50 with self-attention beside the 3x3 convolutions of stages 2 to 4."""
    return build_model(AAResNet, 'aa_resnet50', pretrained, **{'layers': (3, 4, 6, 3), **kwargs})

"""GE-ResNet: Gather-Excite with a learned global gather, after the residual branch of each block.

Paper: `Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks` - https://arxiv.org/abs/1810.12348
(Hu et al., NeurIPS 2018)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import ConvMlp, LayerType, create_act_layer, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck

from .layers import get_rd_channels
from .resnet_stages import LayeredResNet, StageBlock, check_feat_size, imagenet_cfg, stage_sizes

__all__ = ['GEResNet', 'GatherExcite', 'MapConv2d']


class MapConv2d(nn.Conv2d):
    """Depthwise convolution as large as the map, (B, C, H, W) -> (B, C, 1, 1): a weighted sum over the positions.

    Written as that sum, which takes a third of the time of PyTorch's convolution forwards and backwards on a CPU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[2:] == self.weight.shape[2:], 'expected a map as large as the weight')  # or it broadcasts
        y = (x * self.weight[:, 0]).sum((2, 3), keepdim=True)
        bias = self.bias
        return y if bias is None else y + bias.view(-1, 1, 1)


class GatherExcite(nn.Module):
    """GE-theta+: `x * sigmoid(W2 relu(W1 relu(BN(gather(x)))))`, (B, C, H, W) -> (B, C, H, W).

    `gather` is a depthwise convolution over the whole map, so there is one gate a channel, and the layer is for maps of
    one size. W1: 1x1 convolution C -> C * rd_ratio, W2: back to C, both with bias. In training a batch of one has a
    single value a channel left to normalise, which BatchNorm refuses.

    timm's `GatherExcite(extra_params=True, extent=0)` is meant to be this; it hands device and dtype to its
    convolutions as the positional arguments behind theirs, and cannot be created (timm 1.0.31). It also lacks the ReLU
    behind the gather.

    Args:
        channels: Width C of the input.
        feat_size: Height and width of the input.
        rd_ratio: Width of the bottleneck over C.
        act_layer: Activation after the gather and inside the bottleneck.
        norm_layer: Normalisation after the gather.
        gate_layer: Squashes the bottleneck's output to the gate.

    Raises:
        ValueError: `rd_ratio` is not in (0, 1]; an input of another size.

    Source:
        `models/RN50-GEPP.prototxt` of the authors' repository (hujie-frank/GENet, commit ae791f8).
    """

    def __init__(
        self,
        channels: int,
        feat_size: tuple[int, int],
        rd_ratio: float = 1 / 16,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        gate_layer: LayerType = 'sigmoid',
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.feat_size = feat_size
        act, norm = cast(Any, get_act_layer(act_layer)), cast(Any, get_norm_layer(norm_layer))
        self.gather = nn.Sequential(
            MapConv2d(channels, channels, cast(Any, feat_size), groups=channels, bias=False, **dd),
            norm(channels, **dd),
            act(inplace=True),
        )
        self.mlp = ConvMlp(channels, get_rd_channels(channels, rd_ratio), act_layer=act, **dd)
        self.gate = create_act_layer(gate_layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the convolutions as the authors do."""
        nn.init.kaiming_normal_(cast(nn.Conv2d, self.gather[0]).weight)
        for conv in (self.mlp.fc1, self.mlp.fc2):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(cast(torch.Tensor, conv.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            check_feat_size(self, x, self.feat_size, 'its gather has a weight for each position')
        return x * self.gate(self.mlp(self.gather(x)))


class GEResNet(LayeredResNet):
    """timm's ResNet with `GatherExcite` at the end of every residual branch, for images of one size.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: Blocks in each stage.
        img_size: Height and width of the images, or one number for both.
        rd_ratio: Width of the layers' bottleneck over their channels.
        output_stride: As in timm's `ResNet`.
        **kwargs: Arguments of timm's `ResNet`; a `norm_layer` goes into the layers as well.

    Raises:
        ValueError: From the forward pass: feature maps of another size than those of `img_size`.

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
    """ResNet-50 with GE-theta+ at the end of every residual branch."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return build_model_with_cfg(GEResNet, 'ge_plus_resnet50', pretrained, **dict(model_args, **kwargs))

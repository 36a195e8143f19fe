"""Gather-Excite with a learned global gather, GE-theta+.

Paper: `Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks` - https://arxiv.org/abs/1810.12348
(Hu et al., NeurIPS 2018)
"""

from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import ConvMlp, LayerType, create_act_layer, get_act_layer, get_norm_layer

from .atac import get_rd_channels
from .checks import check_feat_size

__all__ = ['GatherExcite', 'MapConv2d']


class MapConv2d(nn.Conv2d):
    """Depthwise convolution as large as the map, (B, C, H, W) -> (B, C, 1, 1): a weighted sum over the positions.

    It computes this sum directly. On a CPU, forward and backward pass then take a third of the time of PyTorch's
    convolution.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[2:] == self.weight.shape[2:], 'expected a map as large as the weight')  # no broadcast
        y = (x * self.weight[:, 0]).sum((2, 3), keepdim=True)
        bias = self.bias  # TorchScript needs a local variable to see that it is not None
        return y if bias is None else y + bias.view(-1, 1, 1)


class GatherExcite(nn.Module):
    """GE-theta+: `x * sigmoid(W2 relu(W1 relu(BN(gather(x)))))`, (B, C, H, W) -> (B, C, H, W).

    `gather` is a depthwise convolution over the whole map. So there is one gate per channel, and the layer takes maps
    of one size. W1 is a 1x1 convolution C -> C * rd_ratio, W2 is one back to C, both with bias. In training, BatchNorm
    raises an error for a batch of one, because `gather` leaves one value per channel.

    timm's `GatherExcite(extra_params=True, extent=0)` is meant to be the same layer, but timm 1.0.31 cannot create it:
    it passes device and dtype by position to its convolutions, in the place of other arguments. It also has no ReLU
    after the gather.

    Args:
        channels: Width C of the input.
        feat_size: Height and width of the input.
        rd_ratio: Width of the bottleneck over C.
        act_layer: Activation after the gather and inside the bottleneck.
        norm_layer: Normalisation after the gather.
        gate_layer: Activation that turns the bottleneck's output into the gate.

    Raises:
        ValueError: `rd_ratio` is not in (0, 1], or the input has another size.

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
            act(),  # not in place: full backward hooks forbid it
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

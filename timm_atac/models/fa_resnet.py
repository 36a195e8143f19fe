"""FA-ResNet: local self-attention in place of the stem and of every 3x3 convolution.

Paper: `Stand-Alone Self-Attention in Vision Models` - https://arxiv.org/abs/1906.05909
(Ramachandran, Parmar et al., NeurIPS 2019)
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import use_fused_attn
from timm.models import generate_default_cfgs

from ..units.exported_attention import CeilAvgPool2d, CeilMaxPool2d, convolution_of_mixtures, is_dynamic
from ..units.local_attention import local_attention, tile_attention
from ._build import build_model
from ._stages import LayeredResNet, SpatialBottleneck, StageBlock, imagenet_cfg

__all__ = ['AttentionStem', 'FAResNet', 'LocalAttention2d', 'MixedConv2d']

# torch.fx does not trace into these functions, since they compute with sizes
torch.fx.wrap('local_attention')
torch.fx.wrap('mixed_convolution')
torch.fx.wrap('tile_attention')


def _init_projection(weight: torch.Tensor, query_channels: int, num_heads: int) -> None:
    """Initialise a projection to queries, keys and values in place.

    This is He initialisation, with queries divided by the root of a head's channels. So logits have values around one,
    although the softmax has no scale.

    Args:
        weight: Weight of the projection, the queries' first.
        query_channels: Channels of the queries.
        num_heads: Number of heads.
    """
    nn.init.kaiming_normal_(weight)
    with torch.no_grad():
        weight[:query_channels] /= (query_channels / num_heads) ** 0.5


class LocalAttention2d(nn.Module):
    """Multi-head self-attention of each position to the window around it, (B, C, H, W) -> (B, D, H / s, W / s).

    Each head computes `softmax(q (k + r)) v`, where r is an embedding of the key's relative row and column. For stride
    s = 2 an average pool follows. Feature maps may have any size. See `local_attention`.

    Args:
        in_channels: C.
        out_channels: D, also the channels of queries, keys and values.
        stride: 1 or 2.
        dilation: 1; the attention has no dilation.
        num_heads: Number of heads.
        window: Height and width of the window, an odd number.

    Raises:
        ValueError: `out_channels` is not a multiple of `2 * num_heads`, `window` is even, or `stride` or `dilation` is
            not supported.

    Source:
        The paper's local attention, which has no scale in the softmax. Ours: the initialisation of the queries;
        embeddings are shared by the heads, as in Attention Augmented ResNets; positions outside the map are no keys.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        num_heads: int = 8,
        window: int = 7,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if out_channels % (2 * num_heads):
            raise ValueError(
                f'out_channels={out_channels}, num_heads={num_heads}: expected out_channels a multiple of '
                f'{2 * num_heads}, since half of the channels of a head have row embeddings, half column embeddings.'
            )
        if window % 2 == 0:
            raise ValueError(f'window={window}: expected an odd number, since a window has its position in the middle.')
        if stride not in (1, 2) or dilation != 1:
            raise ValueError(
                f'stride={stride}, dilation={dilation}: expected stride 1 or 2, and dilation 1. A network has '
                f'dilation 1 with output_stride=32.'
            )
        self.num_heads = num_heads
        self.qkv = nn.Conv2d(in_channels, 3 * out_channels, 1, bias=False, **dd)
        dim_head = out_channels // num_heads
        self.row_embed = nn.Parameter(torch.empty(dim_head // 2, window, **dd))
        self.col_embed = nn.Parameter(torch.empty(dim_head // 2, window, **dd))
        self.pool = CeilAvgPool2d() if stride == 2 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projection, and draw the embeddings from a standard normal distribution."""
        _init_projection(self.qkv.weight, self.qkv.out_channels // 3, self.num_heads)
        nn.init.normal_(self.row_embed)
        nn.init.normal_(self.col_embed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)
        return self.pool(local_attention(q, k, v, self.row_embed, self.col_embed, self.num_heads))


class MixedConv2d(nn.Conv2d):
    """1x1 convolution whose weight depends on the row and column in a tile, (B, C, H, W) -> (B, D, H, W).

    The weight of a row and column is a mixture of `mixtures` weights: `sum_m softmax_m((row + column) m) W_m`, with an
    embedding of the row, of the column and of each mixture.

    Args:
        in_channels: C.
        out_channels: D.
        tile: Height and width of a tile.
        mixtures: Number of weights.
        embed_dim: Channels of the embeddings of rows, columns and mixtures.

    Source:
        The paper's spatially-varying values of the stem.
    """

    def __init__(
        self, in_channels: int, out_channels: int, tile: int, mixtures: int, embed_dim: int, device=None, dtype=None
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(in_channels, mixtures * out_channels, 1, bias=False, **dd)
        self.tile = tile
        self.row_embed = nn.Parameter(torch.empty(tile, 1, embed_dim, **dd))
        self.col_embed = nn.Parameter(torch.empty(1, tile, embed_dim, **dd))
        self.mix_embed = nn.Parameter(torch.empty(embed_dim, mixtures, **dd))
        self.reset_embeddings()

    def reset_embeddings(self) -> None:
        """Draw the embeddings so that the logits of the mixtures have values around one."""
        for embedding in (self.row_embed, self.col_embed, self.mix_embed):
            nn.init.normal_(embedding, std=len(self.mix_embed) ** -0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = ((self.row_embed + self.col_embed) @ self.mix_embed).softmax(dim=-1)  # (tile, tile, mixtures)
        return mixed_convolution(x, self.weight, share)


def mixed_convolution(x: torch.Tensor, weight: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Compute the output of `MixedConv2d`. The arguments are those of `convolution_of_mixtures`."""
    if not torch.jit.is_scripting():
        if is_dynamic(x):
            return convolution_of_mixtures(x, weight, share)
    batch, channels, height, width = x.shape
    tile, mixtures = share.shape[1:]
    weight = torch.einsum('pqm,mdc->pqdc', share.to(weight.dtype), weight.view(mixtures, -1, channels))
    x = nn.functional.pad(x, (0, -width % tile, 0, -height % tile))  # cheap: images have few channels
    x = x.reshape(batch, channels, x.shape[2] // tile, tile, x.shape[3] // tile, tile)
    y = torch.einsum('bchpwq,pqdc->bdhpwq', x, weight)
    return y.flatten(4).flatten(2, 3)[:, :, :height, :width]


class AttentionStem(nn.Module):
    """Multi-head self-attention within each tile of the image, (B, C, H, W) -> (B, D, H, W).

    Each head computes `softmax(q k) v`. Distances have no embedding; instead `MixedConv2d` makes the values depend on
    their row and column in the tile. Images may have any size. It has second derivatives only if timm's fused attention
    is off (`TIMM_FUSED_ATTN=0`).

    Args:
        in_channels: C, the channels of the images.
        out_channels: D.
        num_heads: Number of heads.
        tile: Height and width of a tile.
        mixtures: Number of weights that `MixedConv2d` mixes.

    Source:
        The paper's attention stem, in tiles of 4 x 4, before a norm and a max pool of 4 x 4. Ours: the number of heads
        (8, as in the rest of the network), the number of mixtures, and the channels of the embeddings (those of a
        head).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 64,
        num_heads: int = 8,
        tile: int = 4,
        mixtures: int = 4,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.tile = tile
        self.fused_attn = use_fused_attn()
        self.qk = nn.Conv2d(in_channels, 2 * out_channels, 1, bias=False, **dd)
        self.value = MixedConv2d(in_channels, out_channels, tile, mixtures, embed_dim=out_channels // num_heads, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections and the embeddings."""
        _init_projection(self.qk.weight, self.qk.out_channels // 2, self.num_heads)
        nn.init.kaiming_normal_(self.value.weight)
        self.value.reset_embeddings()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.qk(x).chunk(2, dim=1)
        return tile_attention(q, k, self.value(x), self.num_heads, self.tile, self.fused_attn)


class FAResNet(LayeredResNet):
    """timm's ResNet with `LocalAttention2d` for every 3x3 convolution, for images of any size.

    It exports to ONNX by both exporters. A dynamic height and width of `torch.export` and of `torch.onnx.export` with
    `dynamo=True` must be at least 33 (`Dim('height', min=33)`), so that the last map has two rows and columns. Such a
    graph, and each graph of `dynamo=False`, copies keys and values 49 times; one for a fixed size of `dynamo=True`
    copies them 3.4 times. `torch.export` with `strict=True` only exports a fixed height and width.

    Args:
        layers: Blocks (timm's `Bottleneck`) in each stage.
        in_chans: Channels of the images.
        attention_stem: Use `AttentionStem` and a 4x4 max pool in place of timm's stem.
        **kwargs: Arguments of timm's `ResNet`.

    Raises:
        ValueError: `output_stride` is less than 32, which needs dilation, or options of timm's stem are given together
            with the attention stem.

    Source:
        FA-ResNet-50 of Table 4 of "Attention as Activation", from the Stand-Alone paper: windows of 7 x 7, 8 heads, a
        2x2 average pool after an attention of stride 2.
    """

    own_layers = (AttentionStem, LocalAttention2d)

    def __init__(self, layers: Sequence[int], in_chans: int = 3, attention_stem: bool = True, **kwargs: Any) -> None:
        stem = {name: kwargs[name] for name in ('aa_layer', 'stem_type', 'replace_stem_pool') if kwargs.get(name)}
        if attention_stem and stem:
            raise ValueError(
                f"{stem} together with attention_stem=True: expected one of the two, since it replaces timm's stem."
            )
        block = StageBlock(SpatialBottleneck, spatial_layer=LocalAttention2d)
        super().__init__(cast(Any, block), tuple(layers), in_chans=in_chans, **kwargs)
        if attention_stem:
            dd: dict[str, Any] = {name: kwargs.get(name) for name in ('device', 'dtype')}
            channels = cast(nn.Conv2d, self.conv1).out_channels
            self.conv1 = AttentionStem(in_chans, channels, **dd)  # type: ignore[assignment]
            self.maxpool = CeilMaxPool2d(4)  # type: ignore[assignment]
            self.feature_info[0]['reduction'] = 1


# `_register.py` registers the entry function named by each key.
default_cfgs = generate_default_cfgs(
    {
        'fa_resnet50.untrained': imagenet_cfg(
            first_conv=('conv1.qk', 'conv1.value'),
            paper_ids='arXiv:1906.05909',
            paper_name='Stand-Alone Self-Attention in Vision Models',
        ),
    }
)


def fa_resnet50(pretrained: bool = False, **kwargs) -> FAResNet:
    """ResNet-50 with self-attention in place of the stem and the 3x3 convolutions."""
    return build_model(FAResNet, 'fa_resnet50', pretrained, **{'layers': (3, 4, 6, 3), **kwargs})

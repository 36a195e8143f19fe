"""The attention of `local_attention.py` in forms for export, where a graph must work for maps of any height and width.

Results are the same. A size is never divided into tiles, because exporters must prove that sizes of views fit: a tile
may be the only one of a small map, and the last tiles may be larger than the rest of the map. The price is memory:
keys and values of a local attention are copied for each position, 49 times for a window of 7 x 7.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    'CeilAvgPool2d',
    'CeilMaxPool2d',
    'attention_by_neighbours',
    'attention_in_unfolded_tiles',
    'convolution_of_mixtures',
    'is_dynamic',
]


def is_dynamic(x: torch.Tensor) -> bool:
    """True while `torch.export` records a graph for maps (B, C, H, W) of other heights or widths too."""
    return not isinstance(x, torch.fx.Proxy) and any(isinstance(side, torch.SymInt) for side in x.shape[2:])


def attention_by_neighbours(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_embed: torch.Tensor,
    col_embed: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """As `local_attention`, with a copy of the window of each position."""
    batch, channels, height, width = q.shape
    half = row_embed.shape[0]
    window = len(row_embed.unbind(1))  # not from the shape, whose numbers are tensors while TorchScript traces
    reach = window // 2
    shape = (batch, num_heads, 2 * half, window * window, height * width)
    k = F.unfold(k, window, padding=reach).view(shape)
    v = F.unfold(v, window, padding=reach).view(shape)
    q = q.reshape(batch, num_heads, 2 * half, height * width)
    by_row = row_embed.t() @ q[:, :, :half]  # (B, heads, window, positions)
    by_col = col_embed.t() @ q[:, :, half:]
    bias = (by_row.unsqueeze(3) + by_col.unsqueeze(2)).flatten(2, 3)
    logits = (q.unsqueeze(3) * k).sum(2) + bias  # (B, heads, window^2, positions)
    inside = F.unfold(q.new_ones(1, 1, height, width), window, padding=reach) > 0
    shares = logits.masked_fill(~inside, float('-inf')).softmax(dim=2).to(v.dtype)
    return (shares.unsqueeze(2) * v).sum(3).view(batch, channels, height, width)


def attention_in_unfolded_tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, tile: int
) -> torch.Tensor:
    """As `tile_attention`, for maps of more than `tile` rows and columns."""
    batch, channels, height, width = q.shape
    rows, cols = (height - 1) // tile + 1, (width - 1) // tile + 1
    shape = (batch, num_heads, channels // num_heads, tile * tile, rows * cols)

    def unfolded(x: torch.Tensor) -> torch.Tensor:
        return F.unfold(
            F.pad(x, (0, tile - 1, 0, tile - 1)), tile, stride=tile
        )  # without a remainder smaller than this

    q, k, v = (unfolded(t).view(shape).permute(0, 1, 4, 3, 2) for t in (q, k, v))  # (B, heads, tiles, positions, D)
    inside = unfolded(q.new_ones(1, 1, height, width)).transpose(1, 2).unsqueeze(2) > 0  # (1, tiles, 1, positions)
    logits = (q @ k.transpose(-2, -1)).masked_fill(~inside, float('-inf'))
    y = logits.softmax(dim=-1).to(v.dtype) @ v
    y = F.pixel_shuffle(y.permute(0, 1, 4, 3, 2).reshape(batch, channels * tile * tile, rows, cols), tile)
    for dim, size in ((2, height), (3, width)):  # not a slice, whose size would have to be proven
        y = y.index_select(dim, torch.arange(size, device=y.device))
    return y


def convolution_of_mixtures(x: torch.Tensor, weight: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """As `MixedConv2d`, with a convolution for each mixture.

    Args:
        x: (B, C, H, W).
        weight: Weights of all mixtures, (mixtures * D, C, 1, 1).
        share: Share of each mixture by row and column in a tile, (tile, tile, mixtures).
    """
    tile, mixtures = share.shape[1:]
    row = torch.arange(x.shape[2], device=x.device) % tile
    col = torch.arange(x.shape[3], device=x.device) % tile
    share = share.to(x.dtype).permute(2, 0, 1).index_select(1, row).index_select(2, col)  # (mixtures, H, W)
    return (F.conv2d(x, weight).unflatten(1, (mixtures, -1)) * share.unsqueeze(1)).sum(1)


class CeilMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d(size, size, ceil_mode=True)`, which can be exported with a dynamic height and width."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, ceil_mode=True)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if is_dynamic(x):
                x = F.pad(x, (0, self.size - 1, 0, self.size - 1), value=float('-inf'))
                return F.max_pool2d(x, self.size)
        return F.max_pool2d(x, self.size, ceil_mode=True)


class CeilAvgPool2d(nn.AvgPool2d):
    """`nn.AvgPool2d(2, 2, ceil_mode=True)`, which can be exported with a dynamic height and width."""

    def __init__(self) -> None:
        super().__init__(2, 2, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if is_dynamic(x):  # at the border, the average of two copies
                return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode='replicate'), 2)
        return F.avg_pool2d(x, 2, ceil_mode=True)

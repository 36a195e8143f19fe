"""Self-attention of each position to its neighbourhood, without copying the neighbourhood for each position.

Paper: `Stand-Alone Self-Attention in Vision Models` - https://arxiv.org/abs/1906.05909
(Ramachandran, Parmar et al., NeurIPS 2019)

A map is divided into tiles. All positions of a tile use the same keys and values: those of the tile and of its
surroundings, 13 x 13 for a tile of 7 x 7 and a window of 7 x 7. Logits are products of small matrices, masked outside
of each position's window. Keys and values are copied 3.4 times instead of 49 times. The backward pass recomputes all of
this from queries, keys and values.

`exported_attention.py` has other forms for `torch.onnx.export` with `dynamo=False`, which does not know overlapping
tiles, and for `torch.export` with a dynamic height or width.
"""

import torch
import torch.nn.functional as F

from ..utils.recompute import recomputed
from .exported_attention import attention_by_neighbours, attention_in_unfolded_tiles, is_dynamic

__all__ = ['local_attention', 'tile_attention']


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_embed: torch.Tensor,
    col_embed: torch.Tensor,
    num_heads: int,
    tile: int = 7,
) -> torch.Tensor:
    """Multi-head attention of each position to the window around it: `softmax(q (k + r)) v`, without scale.

    Positions outside the map are not used as keys. The embedding r of a key is the embedding of its relative row for
    the first half of a head's channels, and of its relative column for the second half. In float16, logits must be less
    than 1.6e4. A NaN spreads to all positions of the tiles whose surroundings contain it.

    Args:
        q: Queries (B, C, H, W).
        k: Keys (B, C, H, W).
        v: Values (B, C, H, W).
        row_embed: Embeddings (D / 2, window) of the relative rows, top to bottom. D = C / num_heads, `window` is odd.
        col_embed: Embeddings (D / 2, window) of the relative columns, left to right.
        num_heads: Number of heads. Each has D consecutive channels.
        tile: Height and width of a tile. 7 divides the maps of a ResNet at 224 px.

    Returns:
        (B, C, H, W).
    """
    if torch.jit.is_scripting():
        return _local_attention(q, k, v, row_embed, col_embed, num_heads, tile)
    else:  # not compiled by TorchScript
        if is_dynamic(q) or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()):
            return attention_by_neighbours(q, k, v, row_embed, col_embed, num_heads)
        return recomputed(_local_attention, q, k, v, row_embed, col_embed, num_heads, tile)


def _local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_embed: torch.Tensor,
    col_embed: torch.Tensor,
    num_heads: int,
    tile: int,
) -> torch.Tensor:
    batch, channels, height, width = q.shape
    half, window = row_embed.shape
    reach = window // 2
    bottom, right = -height % tile, -width % tile
    rows, cols = (height + bottom) // tile, (width + right) // tile
    side = tile + 2 * reach
    channels_last = v.stride(1) == 1

    # (B * heads * tiles, positions, D) for the tiles, (B * heads * tiles, D, positions) for their surroundings
    q = _tiles(_padded(q, right, bottom), num_heads, tile).flatten(0, 1)
    k = _surroundings(k, num_heads, tile, reach, bottom, right)
    v = _surroundings(v, num_heads, tile, reach, bottom, right)

    tiles = (batch * num_heads, rows, cols, tile, tile, window)
    by_row = _by_key((q[..., :half] @ row_embed).view(tiles), 0, height)
    by_col = _by_key((q[..., half:] @ col_embed).view(tiles), 1, width)
    bias = (by_row.unsqueeze(-1) + by_col.unsqueeze(-2)).view(-1, tile * tile, side * side)
    attention = torch.baddbmm(bias, q, k).softmax(dim=-1).to(v.dtype)
    y = (attention @ v.transpose(-2, -1)).view(batch, num_heads, rows, cols, tile, tile, 2 * half)
    if channels_last:
        y = y.permute(0, 2, 4, 3, 5, 1, 6).reshape(batch, height + bottom, width + right, channels).permute(0, 3, 1, 2)
    else:
        y = y.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, channels, height + bottom, width + right)
    return y[:, :, :height, :width]


def _is_ragged(right: int, bottom: int) -> bool:
    """True if a map needs padding. Always true while tracing, because a trace must work for maps of other sizes."""
    return torch.jit.is_tracing() or right > 0 or bottom > 0


def _padded(x: torch.Tensor, right: int, bottom: int) -> torch.Tensor:
    return F.pad(x, (0, right, 0, bottom)) if _is_ragged(right, bottom) else x


def _surroundings(x: torch.Tensor, num_heads: int, tile: int, reach: int, bottom: int, right: int) -> torch.Tensor:
    """Return each tile with `reach` positions around it: (B * heads * tiles, D, positions), in memory order of x."""
    batch, channels = x.shape[:2]
    side = tile + 2 * reach
    channels_last = x.stride(1) == 1
    x = F.pad(x, (reach, right + reach, reach, bottom + reach))
    x = x.view(batch, num_heads, channels // num_heads, x.shape[2], x.shape[3])
    x = x.unfold(3, side, tile).unfold(4, side, tile)  # (B, heads, D, rows, columns, side, side), a view
    if channels_last:
        x = x.permute(0, 1, 3, 4, 5, 6, 2).reshape(-1, side * side, channels // num_heads)
        return x.transpose(1, 2)
    return x.permute(0, 1, 3, 4, 2, 5, 6).reshape(-1, channels // num_heads, side * side)


def _by_key(logits: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """Turn logits by relative position, (..., window), to logits by key in the surroundings, (..., tile + window - 1).

    Outside of the window and of the map, logits are so low that softmax returns zero there.

    Args:
        logits: (B * heads, rows of tiles, columns of tiles, tile, tile, window).
        axis: 0 for positions in a column, whose keys differ in the row; 1 for positions in a row.
        length: Height of the map for axis 0, width for axis 1.
    """
    tiles, tile, window = logits.shape[1 + axis], logits.shape[-2], logits.shape[-1]
    position = torch.arange(tile, device=logits.device).unsqueeze(1)
    key = torch.arange(tile + window - 1, device=logits.device)
    offset = key - position
    key_on_map = torch.arange(tiles, device=logits.device).view(-1, 1, 1) * tile + key - window // 2
    # (tiles, tile, tile + window - 1)
    inside = (offset >= 0) & (offset < window) & (key_on_map >= 0) & (key_on_map < length)
    if axis == 0:
        offset, inside = offset.unsqueeze(1), inside.unsqueeze(1).unsqueeze(3)
    else:
        inside = inside.unsqueeze(1)
    logits = logits.gather(-1, offset.clamp(0, window - 1).expand(logits.shape[:-1] + key.shape))
    # not -inf, because positions of the padding may have no key. The sum of two such values and a logit is still finite
    no_key = -1.6e4 if logits.dtype == torch.float16 else -8e37
    return logits.masked_fill(~inside, no_key)


def tile_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, tile: int, fused: bool = True
) -> torch.Tensor:
    """Multi-head attention within each tile of a map: `softmax(q k) v`, without scale.

    Args:
        q: Queries (B, C, H, W).
        k: Keys (B, C, H, W).
        v: Values (B, C, H, W).
        num_heads: Number of heads. Each has C / num_heads consecutive channels.
        tile: Height and width of a tile. The last tiles are smaller if it does not divide the map.
        fused: Use `scaled_dot_product_attention`, whose kernels have no second derivatives.

    Returns:
        (B, C, H, W).
    """
    if torch.jit.is_scripting():
        return _tile_attention(q, k, v, num_heads, tile, fused)
    else:  # not compiled by TorchScript
        if is_dynamic(q):
            return attention_in_unfolded_tiles(q, k, v, num_heads, tile)
        return recomputed(_tile_attention, q, k, v, num_heads, tile, fused)


def _tile_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, tile: int, fused: bool
) -> torch.Tensor:
    batch, channels, height, width = q.shape
    right, bottom = -width % tile, -height % tile
    rows, cols = (height + bottom) // tile, (width + right) // tile
    mask: torch.Tensor | None = None
    if _is_ragged(right, bottom):
        mask = _tiles(_padded(torch.ones_like(q[:1, :1]), right, bottom), 1, tile).transpose(-2, -1) != 0
    q, k, v = _padded(q, right, bottom), _padded(k, right, bottom), _padded(v, right, bottom)
    shape = v.shape
    q, k, v = _tiles(q, num_heads, tile), _tiles(k, num_heads, tile), _tiles(v, num_heads, tile)
    if fused:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    else:
        logits = q @ k.transpose(-2, -1)
        logits = logits if mask is None else logits.masked_fill(~mask, float('-inf'))  # each tile has at least one key
        y = logits.softmax(dim=-1).to(v.dtype) @ v
    y = y.view(batch, num_heads, rows, cols, tile, tile, channels // num_heads)
    return y.permute(0, 1, 6, 2, 4, 3, 5).reshape(shape)[:, :, :height, :width]


def _tiles(x: torch.Tensor, num_heads: int, tile: int) -> torch.Tensor:
    """Divide a map into tiles: (B, C, H, W) -> (B * heads, tiles, positions, D)."""
    batch, channels, height, width = x.shape
    x = x.view(batch, num_heads, channels // num_heads, height // tile, tile, width // tile, tile)
    x = x.permute(0, 1, 3, 5, 4, 6, 2)
    return x.reshape(batch * num_heads, -1, tile * tile, channels // num_heads)

#!/usr/bin/env python
"""The local attention of fa_resnet50, other ways to compute it, and the 3x3 convolution that it replaces.

    python benchmarks/local_attention.py                                # on a CPU: the table in log.md
    python benchmarks/local_attention.py --inference --forms '3x3 convolution' tiles unfold flex
    python benchmarks/local_attention.py --device cuda --dtype bfloat16 --batch-size 32 --rounds 30 --all

It times forward and backward pass of the operation alone; the forms take turns. `flex_attention` only has a backward
pass on GPUs. With `--inference` it also runs on a CPU.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measuring.timing import Spread, bytes_kept, device_name, interleaved, peak_memory, ratio
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from timm_atac.units.local_attention import local_attention

SHAPES = ('64x56x56', '128x28x28', '256x14x14', '512x7x7')
WINDOW, HEADS = 7, 8
Form = Callable[..., torch.Tensor]


def unfold(q, k, v, row_embed, col_embed, num_heads: int) -> torch.Tensor:
    """Copy the 49 neighbours of each position, as in the definition."""
    batch, channels, height, width = q.shape
    shape = (batch, num_heads, channels // num_heads, WINDOW * WINDOW, height * width)
    k, v = (F.unfold(t, WINDOW, padding=WINDOW // 2).view(shape) for t in (k, v))
    rows = row_embed[:, :, None].expand(-1, WINDOW, WINDOW)
    cols = col_embed[:, None, :].expand(-1, WINDOW, WINDOW)
    embedding = torch.cat([rows, cols]).flatten(1).unsqueeze(-1)
    logits = (q.reshape(*shape[:3], 1, shape[-1]) * (k + embedding)).sum(2)
    outside = F.unfold(q.new_ones(1, 1, height, width), WINDOW, padding=WINDOW // 2).view(1, 1, *shape[3:]) == 0
    shares = logits.masked_fill(outside, float('-inf')).softmax(dim=2)
    return (shares.unsqueeze(2) * v).sum(3).view(batch, channels, height, width)


def unfold_recomputed(*args) -> torch.Tensor:
    return checkpoint(unfold, *args, use_reentrant=False)


def flex(height: int, width: int, device: torch.device, compiled: bool = True) -> Form:
    """Return a form that calls `flex_attention` and adds the embeddings' logits to the scores.

    Args:
        height, width: Of the feature map.
        device: Device of the block mask.
        compiled: True to compile it. Without the compiler, all scores of the map are computed; for tests.
    """

    def offset(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return row and column of a key within the query's window, counted from 0."""
        return k // width - q // width + WINDOW // 2, k % width - q % width + WINDOW // 2

    def is_near(batch, head, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        row, col = offset(q, k)
        return (row >= 0) & (row < WINDOW) & (col >= 0) & (col < WINDOW)

    mask = create_block_mask(is_near, None, None, height * width, height * width, device=device)
    attend: Any = torch.compile(flex_attention) if compiled else flex_attention

    def form(q, k, v, row_embed, col_embed, num_heads: int) -> torch.Tensor:
        shape, half = q.shape, row_embed.shape[0]
        q, k, v = (t.reshape(shape[0], num_heads, 2 * half, height * width).transpose(2, 3) for t in (q, k, v))
        by_row, by_col = q[..., :half] @ row_embed, q[..., half:] @ col_embed

        def add_embedding(score, batch, head, q, k):
            row, col = (at.clamp(0, WINDOW - 1) for at in offset(q, k))
            return score + by_row[batch, head, q, row] + by_col[batch, head, q, col]

        padding = (0, max(0, 16 - 2 * half))  # flex_attention needs heads of at least 16 channels
        q, k, v = (F.pad(t, padding).contiguous() for t in (q, k, v))
        y = attend(q, k, v, score_mod=add_embedding, block_mask=mask, scale=1.0)
        return y[..., : 2 * half].transpose(2, 3).reshape(shape)

    return form


def forms(names: list[str], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Form]:
    channels, height, width = shape
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype, requires_grad=True)

    def convolution(q, *others) -> torch.Tensor:
        return F.conv2d(q, weight, padding=1)

    made: dict[str, Callable[[], Form]] = {
        '3x3 convolution': lambda: convolution,
        'tiles': lambda: local_attention,
        'unfold': lambda: unfold,
        'unfold, recomputed': lambda: unfold_recomputed,
        'flex': lambda: flex(height, width, device),
    }
    return {name: made[name]() for name in names}


FORMS = ('3x3 convolution', 'tiles', 'unfold', 'unfold, recomputed', 'flex')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', nargs='+', default=SHAPES, metavar='CxHxW', help=', '.join(SHAPES))
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=list(FORMS[:-1]))
    parser.add_argument(
        '--all', action='store_const', const=list(FORMS), dest='forms', help='all forms, including flex'
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--inference', action='store_true', help='only the forward pass, without gradients')
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if 'flex' in args.forms and device.type == 'cpu' and not args.inference:
        parser.error("flex: PyTorch's flex_attention has no backward pass on a CPU; add --inference")

    what = 'inference' if args.inference else 'forward and backward pass'
    print(f'{device_name(device)}, {args.dtype}, batch {args.batch_size}, torch {torch.__version__}: {what}')
    print(f'\n| C x H x W | form | ms | time over {args.forms[0]} | saved (MB) | peak (MB) |')
    print('| --- | --- | --- | --- | --- | --- |')
    for text in args.shapes:
        shape = tuple(map(int, text.split('x')))
        torch.compiler.reset()  # forget the previous shape
        measure(text, (shape[0], shape[1], shape[2]), args, device, dtype)


def measure(text: str, shape: tuple[int, int, int], args: argparse.Namespace, device, dtype) -> None:
    half = shape[0] // HEADS // 2
    sizes = [(args.batch_size, *shape)] * 3 + [(half, WINDOW)] * 2
    tensors = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]
    made = forms(args.forms, shape, device, dtype)
    runs: dict[str, Callable[[], object]] = {}
    for name, form in made.items():
        runs[name] = partial(_infer if args.inference else step, form, tensors)
    times = interleaved(runs, args.rounds, device, at_least=0.02)
    for name, form in made.items():
        saved = '-'
        if not args.inference:
            saved = f'{bytes_kept(partial(form, *tensors, HEADS), torch.nn.ParameterList(tensors)) / 1e6:.1f}'
        print(
            f'| {text} | {name} | {1e3 * Spread.of(times[name]).median:.2f} | {ratio(times, name, args.forms[0])} '
            f'| {saved} | {peak_memory(runs[name], device) / 1e6:.1f} |',
            flush=True,
        )


def step(form: Form, tensors: list[torch.Tensor]) -> None:
    y = form(*tensors, HEADS)
    torch.autograd.grad(y, tensors, torch.ones_like(y), allow_unused=True)  # the convolution only uses q


@torch.no_grad()
def _infer(form: Form, tensors: list[torch.Tensor]) -> torch.Tensor:
    return form(*tensors, HEADS)


if __name__ == '__main__':
    main()

"""Gates as a picture: for each unit a heat map over the image and a histogram, with matplotlib."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .._files import replaced_file
from .page import Layer, draw

__all__ = ['plot_comparison', 'plot_gates']

_DPI = 120


def plot_gates(
    gates: dict[str, torch.Tensor],
    image: 'Image.Image | np.ndarray',
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Draw the gates of the first image of a batch: for each layer a heat map and a histogram.

    A map is the mean over the channels at each position, over the image in grey. All maps have one colour scale, from
    the 1st to the 99th percentile of all of them. The histogram has the gates of all channels.

    Args:
        gates: As `gate_maps` returns them, values finite. Tokens (B, C, L) are taken for a grid of the image's shape in
            reading order, if L or L - 1 (a class token first) is one. Layers without positions, or with others, have
            no map.
        image: What the model saw. An array is (H, W), (H, W, 1) or (H, W, 3), uint8 or from 0 to 1; the range of others
            is that of their values.
        path: The picture, a PNG of at most 1600 pixels in width. It is there complete or not at all.
        title: Head line.

    Raises:
        ValueError: `gates` is empty, one is not (B, C, ...) with B >= 1 or not finite; the image has another shape.
        ImportError: matplotlib is not installed.
    """
    pixels = _pixels(image)
    layers = [_layer(name, gate, pixels.shape[1] / pixels.shape[0]) for name, gate in gates.items()]
    if not layers:
        raise ValueError('gates={}: expected those of at least one layer, as timm_atac.viz.gate_maps returns them.')
    _save(pixels, layers, path, title)


def plot_comparison(
    gates: Mapping[str, Mapping[str, torch.Tensor]],
    image: 'Image.Image | np.ndarray',
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Draw gates of several models side by side: a column for each model, each cell as `plot_gates` has it.

    One gate a channel for all positions is a map of one colour, their mean.

    Args:
        gates: For each model, by what stands above its column, gates as `gate_maps` returns them: as many of each, the
            first of all in the first row.
        image: As in `plot_gates`.
        path: The picture, a PNG; at most 500 pixels in width for each model.
        title: Head line.

    Raises:
        ValueError: There are no gates, or not as many of each model; as `plot_gates`.
        ImportError: matplotlib is not installed.
    """
    counts = {label: len(column) for label, column in gates.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f'gates of {counts or "no model"}: expected as many layers of each model, at least one.')
    pixels = _pixels(image)
    aspect = pixels.shape[1] / pixels.shape[0]
    rows = zip(*(column.items() for column in gates.values()), strict=True)
    layers = [_layer(name, gate, aspect, is_flat_drawn=True) for row in rows for name, gate in row]
    _save(pixels, layers, path, title, heads=list(gates))


def _save(
    pixels: np.ndarray,
    layers: list[Layer],
    path: str | os.PathLike[str],
    title: str | None,
    heads: Sequence[str] = (),
) -> None:
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install 'timm_atac[viz]'") from error
    with matplotlib.style.context('default'):  # whatever the user's own; no pyplot, whose state is the user's too
        figure = Figure(dpi=_DPI)
        FigureCanvasAgg(figure)
        draw(figure, pixels, layers, title, heads)
        png = io.BytesIO()
        figure.savefig(png, format='png')
    with replaced_file(Path(path)) as file:
        file.write(png.getvalue())


def _layer(name: str, gate: torch.Tensor, aspect: float, is_flat_drawn: bool = False) -> Layer:
    """What is drawn of a layer's gates (B, C, ...) over an image of `aspect` W / H.

    Args:
        is_flat_drawn: Whether one gate a channel makes a map, of one colour.
    """
    if gate.ndim < 3 or not gate.numel() or not gate.isfinite().all():
        raise ValueError(
            f'Gates of {name!r}, of shape {tuple(gate.shape)}: expected finite numbers (B, C, H, W) or (B, C, L).'
        )
    first = gate[0].float().cpu()
    positions = tuple(first.shape[1:])
    grid, note = _grid(positions, aspect)
    mean = first.mean(0).flatten()
    if is_flat_drawn and len(mean) == 1:
        grid, note = (1, 1), 'one gate a channel'
    heat = mean[len(mean) - math.prod(grid) :].reshape(grid).numpy() if grid else None
    return Layer(name, 'x'.join(map(str, first.shape)), first.flatten().numpy(), heat, note)


def _grid(positions: tuple[int, ...], aspect: float) -> tuple[tuple[int, ...], str]:
    """Rows and columns of positions over an image of `aspect`; or () and why there are none."""
    if math.prod(positions) == 1:
        return (), 'no map:\none gate a channel\nfor the whole image'
    if len(positions) == 2 and 0.5 <= positions[1] / positions[0] / aspect <= 2:  # strides round
        return positions, ''
    if len(positions) == 1:
        for tokens in (positions[0], positions[0] - 1):
            rows = max(1, round(math.sqrt(tokens / aspect)))
            if tokens % rows == 0 and math.isclose(tokens / rows / rows, aspect, rel_tol=0.01):
                return (rows, tokens // rows), ''
        return (), f"no map:\n{positions[0]} tokens are\nno grid of the\nimage's shape"
    return (), f"no map:\n{'x'.join(map(str, positions))} is not\nthe image's shape"


def _pixels(image: 'Image.Image | np.ndarray') -> np.ndarray:
    """An image as float (H, W) or (H, W, 3) in 0..1."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert('L' if image.mode in ('1', 'L', 'LA') else 'RGB'))
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))) or not image.size:
        raise ValueError(f'image of shape {image.shape}: expected (H, W), (H, W, 1) or (H, W, 3).')
    pixels = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if pixels.dtype == np.uint8:
        return pixels / 255
    low, high = min(0.0, float(pixels.min())), max(1.0, float(pixels.max()))
    return (pixels - low) / (high - low)

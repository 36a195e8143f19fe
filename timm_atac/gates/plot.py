"""Pictures of gates: for each layer a heat map over the image and a histogram, with matplotlib."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .._files import replaced_file
from .figure import Panel, draw
from .maps import GatesError

__all__ = ['plot_comparison', 'plot_gates']


def plot_gates(
    gates: Mapping[str, torch.Tensor],
    image: 'Image.Image | np.ndarray',
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Draw the gates of the first image of a batch: for each layer a heat map and a histogram.

    A heat map is the mean over the channels at each position, over the image in grey. All maps have one colour scale,
    from the 1st to the 99th percentile of their values. A histogram counts the gates of all channels.

    Args:
        gates: Finite gates by name, as `gate_maps` returns them. L tokens (B, C, L) are drawn in reading order as a
            grid of the image's shape, if L or, with a class token first, L - 1 is the size of one. Layers without
            positions, or with positions of another shape, have no map.
        image: The image that the model gets. An array is (H, W), (H, W, 1) or (H, W, 3), uint8 or from 0 to 1. Arrays
            of other values are scaled by their minimum and maximum.
        path: The PNG file, at most 1600 pixels wide. It is written as a whole, or not at all.
        title: Title of the picture.

    Raises:
        GatesError: `gates` is empty, one is not (B, C, ...) with B >= 1 or not finite; the image has another shape.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(gates, Mapping):
        raise TypeError(
            f'gates is a {type(gates).__name__}: expected a mapping name -> gates, as gate_maps returns it.'
        )
    pixels = _pixels(image)
    panels = [_panel(name, gate, pixels.shape[1] / pixels.shape[0]) for name, gate in gates.items()]
    if not panels:
        raise GatesError('gates={}: expected those of at least one layer, as timm_atac.viz.gate_maps returns them.')
    _save(pixels, panels, path, title)


def plot_comparison(
    gates: Mapping[str, Mapping[str, torch.Tensor]],
    image: 'Image.Image | np.ndarray',
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Draw the gates of several models side by side: a column for each model, with the cells of `plot_gates`.

    A layer with one gate per channel has a map of one colour, the mean of its gates.

    Args:
        gates: For each model, by the title of its column, gates as `gate_maps` returns them. All models have the same
            number of layers. The first row shows the first layer of each model.
        image: As in `plot_gates`.
        path: The PNG file, at most 500 pixels wide for each model.
        title: Title of the picture.

    Raises:
        GatesError: There are no gates, the models have different numbers of layers, or as in `plot_gates`.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(gates, Mapping) or not all(isinstance(column, Mapping) for column in gates.values()):
        raise TypeError('gates: expected a mapping label -> gates of a model, such as {label: gate_maps(model, x)}.')
    counts = {label: len(column) for label, column in gates.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise GatesError(f'gates of {counts or "no model"}: expected as many layers of each model, at least one.')
    pixels = _pixels(image)
    aspect = pixels.shape[1] / pixels.shape[0]
    rows = zip(*(column.items() for column in gates.values()), strict=True)
    panels = [_panel(name, gate, aspect, with_flat_maps=True) for row in rows for name, gate in row]
    _save(pixels, panels, path, title, heads=list(gates))


def _save(
    pixels: np.ndarray,
    panels: list[Panel],
    path: str | os.PathLike[str],
    title: str | None,
    heads: Sequence[str] = (),
) -> None:
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError('Drawing needs matplotlib: pip install matplotlib') from error
    png = io.BytesIO()
    with matplotlib.style.context('default'):  # instead of the user's style
        figure = draw(pixels, panels, title, heads)
        figure.savefig(png, format='png', bbox_inches='tight', pad_inches=0.1)
    with replaced_file(Path(path)) as file:
        file.write(png.getvalue())


def _panel(name: str, gate: torch.Tensor, aspect: float, with_flat_maps: bool = False) -> Panel:
    """Return what is drawn for the gates (B, C, ...) of a layer over an image of `aspect` W / H.

    Args:
        with_flat_maps: True if one gate per channel gives a map, of one colour.
    """
    if gate.ndim < 3 or not gate.numel() or not gate.isfinite().all():
        raise GatesError(
            f'Gates of {name!r}, of shape {tuple(gate.shape)}: expected finite numbers (B, C, H, W) or (B, C, L).'
        )
    first = gate[0].float().cpu()
    positions = tuple(first.shape[1:])
    grid, note = _grid(positions, aspect)
    if with_flat_maps and math.prod(positions) == 1:
        grid, note = (1, 1), 'one gate per channel'
    mean = first.mean(0).flatten()
    heat = mean[len(mean) - math.prod(grid) :].reshape(grid).numpy() if grid else None
    return Panel(name, 'x'.join(map(str, first.shape)), first.flatten().numpy(), heat, note)


def _grid(positions: tuple[int, ...], aspect: float) -> tuple[tuple[int, ...], str]:
    """Return rows and columns of positions over an image of `aspect`; or () and the reason why there is no grid."""
    if math.prod(positions) == 1:
        return (), 'no map:\none gate per channel\nfor the whole image'
    if len(positions) == 2 and 0.5 <= positions[1] / positions[0] / aspect <= 2:  # strides round the size
        return positions, ''
    if len(positions) == 1:
        for tokens in (positions[0], positions[0] - 1):
            rows = max(1, round(math.sqrt(tokens / aspect)))
            if tokens % rows == 0 and math.isclose(tokens / rows / rows, aspect, rel_tol=0.01):
                return (rows, tokens // rows), ''
        return (), f"no map:\n{positions[0]} tokens are\nno grid of the\nimage's shape"
    return (), f"no map:\n{'x'.join(map(str, positions))} is not\nthe image's shape"


def _pixels(image: 'Image.Image | np.ndarray') -> np.ndarray:
    """Return an image as float (H, W) or (H, W, 3) from 0 to 1."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert('L' if image.mode in ('1', 'L', 'LA') else 'RGB'))
    if not isinstance(image, np.ndarray):
        raise TypeError(f'image is a {type(image).__name__}: expected a PIL image or a NumPy array.')
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))) or not image.size:
        raise GatesError(f'image of shape {image.shape}: expected (H, W), (H, W, 1) or (H, W, 3).')
    pixels = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if pixels.dtype == np.uint8:
        return pixels / 255
    low, high = min(0.0, float(pixels.min())), max(1.0, float(pixels.max()))
    return (pixels - low) / (high - low)

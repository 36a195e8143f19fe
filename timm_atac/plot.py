"""Gates as a picture: for each unit a heat map over the image and a histogram, with matplotlib."""

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .atomic import replaced_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ['plot_gates']

_DPI = 120
_PAGE, _MAP, _HISTOGRAM, _GAP, _TITLE, _TICKS = 13.3, 1.5, 1.3, 0.12, 0.22, 0.3  # sizes in inches
_EXTENT = (0, 1, 1, 0)  # every image fills its axes, whatever its size
_ALPHA = 0.55  # of a map over the image: the map's in hue, the image's in brightness


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
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install 'timm_atac[viz]'") from error
    with matplotlib.style.context('default'):  # whatever the user's own; no pyplot, whose state is the user's too
        figure = Figure(dpi=_DPI)
        FigureCanvasAgg(figure)
        _draw(figure, pixels, layers, title)
        png = io.BytesIO()
        figure.savefig(png, format='png')
    with replaced_file(Path(path)) as file:
        file.write(png.getvalue())


class _Layer(NamedTuple):
    name: str
    shape: str
    values: np.ndarray  # of all gates, flat
    heat: np.ndarray | None  # (H, W), mean over the channels
    why_not: str  # there is no map


def _layer(name: str, gate: torch.Tensor, aspect: float) -> _Layer:
    """What is drawn of a layer's gates (B, C, ...) over an image of `aspect` W / H."""
    if gate.ndim < 3 or not gate.numel() or not gate.isfinite().all():
        raise ValueError(
            f'Gates of {name!r}, of shape {tuple(gate.shape)}: expected finite numbers (B, C, H, W) or (B, C, L).'
        )
    first = gate[0].float().cpu()
    positions = tuple(first.shape[1:])
    grid, why_not = _grid(positions, aspect)
    mean = first.mean(0).flatten()
    heat = mean[len(mean) - math.prod(grid) :].reshape(grid).numpy() if grid else None
    return _Layer(name, 'x'.join(map(str, first.shape)), first.flatten().numpy(), heat, why_not)


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


class _Page:
    """Cells in rows, each as a map with a histogram beside it, the maps of the image's shape.

    Args:
        figure: Gets its size.
        count: Number of cells.
        aspect: W / H of the image.
        title: Head line.
    """

    def __init__(self, figure: 'Figure', count: int, aspect: float, title: str | None) -> None:
        aspect = min(max(aspect, 0.4), 2.5)
        self.width, self.height = _MAP * math.sqrt(aspect), _MAP / math.sqrt(aspect)
        self._cell = (self.width + _HISTOGRAM + 3 * _GAP, _TITLE + self.height + _TICKS)
        self._columns = min(int((_PAGE - _GAP) / self._cell[0]), max(2, math.ceil(math.sqrt(count))))
        self._head = 0.4 if title else 0.1
        rows = math.ceil(count / self._columns)
        self._figure, self._size = figure, (self._columns * self._cell[0] + _GAP, rows * self._cell[1] + self._head)
        figure.set_size_inches(self._size)
        figure.text(_GAP / self._size[0], 1 - 0.12 / self._size[1], title or '', size=11, va='top', parse_math=False)

    def map(self, cell: int) -> 'Axes':
        return self._axes(cell, 0, self.width)

    def beside(self, cell: int, width: float) -> 'Axes':
        return self._axes(cell, self.width + _GAP, width)

    def _axes(self, cell: int, left: float, width: float) -> 'Axes':
        left += _GAP + cell % self._columns * self._cell[0]
        bottom = self._size[1] - self._head - cell // self._columns * self._cell[1] - _TITLE - self.height
        w, h = self._size
        return self._figure.add_axes((left / w, bottom / h, width / w, self.height / h))


def _draw(figure: 'Figure', pixels: np.ndarray, layers: list[_Layer], title: str | None) -> None:
    """The image with the colour bar, then each layer's map with its histogram."""
    page = _Page(figure, len(layers) + 1, pixels.shape[1] / pixels.shape[0], title)
    _show(page.map(0), pixels, f'image  {"x".join(map(str, pixels.shape[:2]))}')
    span = _colour_range([layer.heat for layer in layers if layer.heat is not None])
    grey = pixels if pixels.ndim == 2 else pixels @ np.array([0.299, 0.587, 0.114])
    chars = int(16 * (page.width + _HISTOGRAM - 0.5))  # of a title, before it meets that of the histogram
    maps = [_map(page.map(cell), grey, layer, span, chars) for cell, layer in enumerate(layers, 1)]
    for cell, layer in enumerate(layers, 1):
        _histogram(page.beside(cell, _HISTOGRAM), layer)
    shown = next((m for m in maps if m is not None), None)
    if shown is not None:
        bar = figure.colorbar(shown, cax=page.beside(0, 0.12))
        bar.ax.set_facecolor('0.5')  # as between black and white of the image
        bar.set_label('mean gate', fontsize=7)
        bar.ax.tick_params(labelsize=7)


def _colour_range(heats: list[np.ndarray]) -> tuple[float, float]:
    """1st and 99th percentile over all maps, of which each counts the same, however large."""
    if not heats:
        return 0, 1
    low, high = np.quantile([np.quantile(heat, np.linspace(0, 1, 101)) for heat in heats], (0.01, 0.99))
    return (low, high) if high - low > 1e-4 else (low - 0.01, high + 0.01)  # the same everywhere


def _map(axes: 'Axes', grey: np.ndarray, layer: _Layer, span: tuple[float, float], chars: int) -> 'AxesImage | None':
    room = max(8, chars - len(layer.shape) - 2)
    name = layer.name if len(layer.name) <= room else f'…{layer.name[1 - room :]}'
    _show(axes, grey if layer.heat is not None else np.full((1, 1), 1.3), f'{name}  {layer.shape}', fade=0.3)
    if layer.heat is None:
        axes.text(0.5, 0.5, layer.why_not, fontsize=7, ha='center', va='center', color='0.4')
        return None
    options: dict[str, Any] = {'cmap': 'turbo', 'vmin': span[0], 'vmax': span[1], 'alpha': _ALPHA}
    return axes.imshow(layer.heat, interpolation='bilinear', extent=_EXTENT, aspect='auto', **options)


def _show(axes: 'Axes', pixels: np.ndarray, title: str, fade: float = 0) -> None:
    axes.imshow(pixels, cmap='gray', vmin=-fade, vmax=1 + fade, extent=_EXTENT, aspect='auto')
    axes.set_title(title, fontsize=7.5, loc='left', pad=3)
    axes.set_xticks([])
    axes.set_yticks([])


def _histogram(axes: 'Axes', layer: _Layer) -> None:
    """How often each value of a gate is; the line is the mean."""
    span = (min(0.0, float(layer.values.min())), max(1.0, float(layer.values.max())))  # a gate_layer may leave 0..1
    bins = min(50, max(10, math.isqrt(layer.values.size)))
    counts, edges = np.histogram(layer.values, bins=bins, range=span)
    axes.stairs(counts / counts.max(), edges, fill=True, color='0.55')
    mean = float(layer.values.mean())
    axes.axvline(mean, color='C3', linewidth=1)
    axes.set_title(f'mean {mean:.2f}', fontsize=7, loc='right', pad=3, color='C3')
    axes.set_xlim(span)
    axes.set_xticks([0, 0.5, 1], ['0', '0.5', '1'])
    axes.set_yticks([])
    axes.tick_params(labelsize=7, length=2, pad=1)
    axes.spines[['top', 'left', 'right']].set_visible(False)

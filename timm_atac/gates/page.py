"""What a picture of gates has on its page: cells of a heat map over the image with a histogram, with matplotlib."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ['Layer', 'draw']

_PAGE, _MAP, _HISTOGRAM, _GAP, _TITLE, _TICKS = 13.3, 1.5, 1.3, 0.12, 0.22, 0.3  # sizes in inches
_HEADS = 0.3  # above the first row of a comparison
_EXTENT = (0, 1, 1, 0)  # every image fills its axes, whatever its size
_ALPHA = 0.55  # of a map over the image: the map's in hue, the image's in brightness


class Layer(NamedTuple):
    """What is drawn of the gates of a layer."""

    name: str
    shape: str
    values: np.ndarray  # of all gates, flat
    heat: np.ndarray | None  # (H, W), mean over the channels
    note: str  # on the map, or why there is none


class _Page:
    """Cells in rows, each as a map with a histogram beside it, the maps of the image's shape.

    Args:
        figure: Gets its size.
        count: Number of cells.
        aspect: W / H of the image.
        title: Head line.
        heads: What stands above each column, below the first row; none for as many columns as fit.
    """

    def __init__(
        self, figure: 'Figure', count: int, aspect: float, title: str | None, heads: Sequence[str] = ()
    ) -> None:
        aspect = min(max(aspect, 0.4), 2.5)
        self.width, self.height = _MAP * math.sqrt(aspect), _MAP / math.sqrt(aspect)
        self._cell = (self.width + _HISTOGRAM + 3 * _GAP, _TITLE + self.height + _TICKS)
        fitting = min(int((_PAGE - _GAP) / self._cell[0]), max(2, math.ceil(math.sqrt(count))))
        self._columns = len(heads) or fitting
        self._heads = _HEADS if heads else 0.0
        self._head = 0.4 if title else 0.1
        rows = math.ceil(count / self._columns)
        self._figure = figure
        self._size = (self._columns * self._cell[0] + _GAP, rows * self._cell[1] + self._heads + self._head)
        figure.set_size_inches(self._size)
        figure.text(_GAP / self._size[0], 1 - 0.12 / self._size[1], title or '', size=11, va='top', parse_math=False)
        top = 1 - (self._head + self._cell[1] + 0.06) / self._size[1]
        for column, head in enumerate(heads):
            left = (_GAP + column * self._cell[0]) / self._size[0]
            text = _end(head, int(11 * (self._cell[0] - _GAP)))
            figure.text(left, top, text, size=9.5, weight='bold', va='top', parse_math=False)

    def map(self, cell: int) -> 'Axes':
        return self._axes(cell, 0, self.width)

    def beside(self, cell: int, width: float) -> 'Axes':
        return self._axes(cell, self.width + _GAP, width)

    def _axes(self, cell: int, left: float, width: float) -> 'Axes':
        left += _GAP + cell % self._columns * self._cell[0]
        row = cell // self._columns
        bottom = self._size[1] - self._head - row * self._cell[1] - _TITLE - self.height - (self._heads if row else 0)
        w, h = self._size
        return self._figure.add_axes((left / w, bottom / h, width / w, self.height / h))


def draw(
    figure: 'Figure', pixels: np.ndarray, layers: list[Layer], title: str | None, heads: Sequence[str] = ()
) -> None:
    """The image with the colour bar, then each layer's map with its histogram; under heads in the second row."""
    start = len(heads) or 1
    page = _Page(figure, len(layers) + start, pixels.shape[1] / pixels.shape[0], title, heads)
    _show(page.map(0), pixels, f'image  {"x".join(map(str, pixels.shape[:2]))}')
    span = _colour_range([layer.heat for layer in layers if layer.heat is not None])
    grey = pixels if pixels.ndim == 2 else pixels @ np.array([0.299, 0.587, 0.114])
    chars = int(16 * (page.width + _HISTOGRAM - 0.5))  # of a title, before it meets that of the histogram
    maps = [_map(page.map(cell), grey, layer, span, chars) for cell, layer in enumerate(layers, start)]
    for cell, layer in enumerate(layers, start):
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


def _map(axes: 'Axes', grey: np.ndarray, layer: Layer, span: tuple[float, float], chars: int) -> 'AxesImage | None':
    name = _end(layer.name, max(8, chars - len(layer.shape) - 2))
    _show(axes, grey if layer.heat is not None else np.full((1, 1), 1.3), f'{name}  {layer.shape}', fade=0.3)
    if layer.heat is None:
        axes.text(0.5, 0.5, layer.note, fontsize=7, ha='center', va='center', color='0.4')
        return None
    if layer.note:
        box = {'facecolor': 'white', 'alpha': 0.8, 'edgecolor': 'none', 'pad': 1.5}
        axes.text(0.5, 0.95, layer.note, fontsize=7, ha='center', va='bottom', color='0.2', bbox=box)
    options: dict[str, Any] = {'cmap': 'turbo', 'vmin': span[0], 'vmax': span[1], 'alpha': _ALPHA}
    return axes.imshow(layer.heat, interpolation='bilinear', extent=_EXTENT, aspect='auto', **options)


def _end(text: str, room: int) -> str:
    """A text, or the end of it that has room."""
    return text if len(text) <= room else f'…{text[1 - room :]}'


def _show(axes: 'Axes', pixels: np.ndarray, title: str, fade: float = 0) -> None:
    axes.imshow(pixels, cmap='gray', vmin=-fade, vmax=1 + fade, extent=_EXTENT, aspect='auto')
    axes.set_title(title, fontsize=7.5, loc='left', pad=3)
    axes.set_xticks([])
    axes.set_yticks([])


def _histogram(axes: 'Axes', layer: Layer) -> None:
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

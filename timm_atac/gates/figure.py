"""A matplotlib figure of gates: for each layer a heat map over the image, with a histogram on its right."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ['Panel', 'draw']

_DPI = 120
_MAX_WIDTH = 13.0  # inches of the figure without its margin
_MAP = 1.5  # inches: square root of the area of a map
_HISTOGRAM = 1.3  # inches: width of a histogram
_LUMA = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue in grey

_BOX = {'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.8, 'pad': 1.5}  # behind a note


class Panel(NamedTuple):
    """What is drawn for one layer.

    Attributes:
        name: Name of the layer.
        shape: Shape of its gates, such as '64x8x8'.
        values: All gates, (N,).
        heat: Mean gate at each position, (H, W), or None for no map.
        note: Text on the map, or the reason why there is none.
    """

    name: str
    shape: str
    values: np.ndarray
    heat: np.ndarray | None
    note: str


def draw(pixels: np.ndarray, panels: Sequence[Panel], title: str | None, heads: Sequence[str] = ()) -> 'Figure':
    """Return a figure with the image and the colour bar, then a map and a histogram for each panel.

    Args:
        pixels: The image, (H, W) or (H, W, 3), from 0 to 1.
        panels: The panels in reading order.
        title: Title of the figure.
        heads: Title of each column. If given, the panels start in the second row. Otherwise the number of columns
            depends on the number of panels.
    """
    from matplotlib.figure import Figure  # pyplot would change the global state of the user
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    aspect = min(max(pixels.shape[1] / pixels.shape[0], 0.4), 2.5)
    height = _MAP / math.sqrt(aspect)
    width = height * aspect + _HISTOGRAM + 0.35
    columns = len(heads) or min(int(_MAX_WIDTH / width), max(2, math.ceil(math.sqrt(len(panels) + 1))))
    first = len(heads) or 1  # cell of the first panel
    rows = math.ceil((first + len(panels)) / columns)
    size = (columns * width, rows * (height + 0.6) + 0.3 * bool(heads) + 0.3 * bool(title))
    figure = Figure(size, _DPI, layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.06, compress=True))
    figure.suptitle(title or '', x=0.005, ha='left', fontsize=11, parse_math=False)
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[height * aspect, _HISTOGRAM] * columns)
    cells = axes.reshape(-1, 2)  # the axes of a map and of its histogram
    for unused in (cells[0, 1], *cells[1:first].flat, *cells[first + len(panels) :].flat):
        unused.set_axis_off()

    extent = (0.0, aspect, 1.0, 0.0)
    _show(cells[0, 0], pixels, extent, f'image  {"x".join(map(str, pixels.shape[:2]))}')
    low, high = _colour_range([panel.heat for panel in panels if panel.heat is not None])
    grey = pixels if pixels.ndim == 2 else pixels @ _LUMA
    grey = (grey + 0.3) / 1.6  # less contrast: the hue of a map shows on black and on white too
    room = int(16 * (width - 0.9))  # letters that fit on the left of 'mean 0.50'
    shown = None
    for panel, (left, right) in zip(panels, cells[first : first + len(panels)], strict=True):
        name = _shorten(panel.name, max(8, room - len(panel.shape) - 2))
        _show(left, np.ones((1, 1)) if panel.heat is None else grey, extent, f'{name}  {panel.shape}')
        if panel.heat is not None:
            shown = left.imshow(
                panel.heat, 'turbo', alpha=0.55, vmin=low, vmax=high, interpolation='bilinear', extent=extent
            )
        y = 0.5 if panel.heat is None else 0.9
        left.text(aspect / 2, y, panel.note, fontsize=7, ha='center', va='center', bbox=_BOX)
        _histogram(right, panel.values, height / _HISTOGRAM)
    for head, left in zip(heads, cells[first:, 0], strict=False):
        text = _shorten(head, int(11 * width))
        left.set_title(f'\n{text}', fontsize=9.5, loc='left', weight='bold', parse_math=False)
    if shown is not None:
        _colour_bar(figure, cells[0, 1], shown, height / _HISTOGRAM)
    return figure


def _colour_range(heats: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the 1st and the 99th percentile of all maps; each map has the same weight, whatever its size."""
    if not heats:
        return 0, 1
    low, high = np.quantile([np.quantile(heat, np.linspace(0, 1, 101)) for heat in heats], (0.01, 0.99))
    return (low, high) if high - low > 1e-4 else (low - 0.01, high + 0.01)  # maps of one and the same value


def _show(axes: 'Axes', pixels: np.ndarray, extent: tuple[float, float, float, float], label: str) -> None:
    axes.imshow(pixels, cmap='gray', vmin=0, vmax=1, extent=extent)
    axes.set_xlabel(label, fontsize=7.5, loc='left', labelpad=4, parse_math=False)
    axes.xaxis.set_label_position('top')
    axes.set_xticks([])
    axes.set_yticks([])


def _histogram(axes: 'Axes', values: np.ndarray, aspect: float) -> None:
    """Draw how often each value occurs, with a line at the mean."""
    # the output of a gate_layer may be outside of 0..1
    span = (min(0.0, float(values.min())), max(1.0, float(values.max())))
    axes.hist(values, bins=min(50, max(10, math.isqrt(values.size))), range=span, histtype='stepfilled', color='0.55')
    mean = float(values.mean())
    axes.axvline(mean, color='C3', linewidth=1)
    axes.set_title(f'mean {mean:.2f}', fontsize=7.5, loc='right', pad=4, color='C3')
    axes.set_box_aspect(aspect)
    axes.set_xlim(span)
    axes.set_xticks([0, 0.5, 1], ['0', '0.5', '1'])
    axes.set_yticks([])
    axes.tick_params(labelsize=7, length=2, pad=1)
    axes.spines[['top', 'left', 'right']].set_visible(False)


def _colour_bar(figure: 'Figure', axes: 'Axes', shown: 'AxesImage', aspect: float) -> None:
    axes.set_box_aspect(aspect)
    bar = figure.colorbar(shown, cax=axes.inset_axes((0, 0, 0.1, 1)))
    bar.ax.set_facecolor('0.5')  # the middle between black and white of the image
    bar.set_label('mean gate', fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _shorten(text: str, room: int) -> str:
    """Return the text, or its end after '…' if it has more than `room` letters."""
    return text if len(text) <= room else f'…{text[1 - room :]}'

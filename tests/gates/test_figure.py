"""timm_atac/gates/figure.py: what a person needs to see is there, and nothing overlaps."""

from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from timm_atac.gates.figure import Panel, draw

LONG = 'a.very.long.name.of.a.layer.in.a.deep.model'


def panels(count: int, heat: tuple[int, int] | None = (3, 4)) -> list[Panel]:
    """Panels with long names and gates from 0 to 1; the last one has a note in place of a map."""
    rng = np.random.default_rng(0)
    note = "no map:\n4097 tokens are\nno grid of the\nimage's shape"
    full = [Panel(f'{LONG}.{i}', '2048x16x16', rng.random(99), rng.random(heat or ()), '') for i in range(count - 1)]
    return [*full, Panel(LONG, '64x4097', rng.random(99), None, note)]


def rendered(figure: Any) -> Any:
    FigureCanvasAgg(figure).draw()
    return figure


def boxes(figure: Any) -> list[tuple[str, Any]]:
    """Names and boxes of all axes and of all texts that are outside axes, in pixels."""
    found = [(axes.get_label() or 'axes', axes.get_window_extent()) for axes in figure.axes if axes.axison]
    for axes in figure.axes:
        texts = [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title, axes._right_title]
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
        texts = [text for text in texts if axes.axison and text.get_visible() and text.get_text().strip()]
        found += [(text.get_text(), text.get_window_extent()) for text in texts]
    if figure._suptitle.get_text():
        found.append(('title', figure._suptitle.get_window_extent()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize('image', [(64, 64, 3), (32, 96), (100, 20)])
@pytest.mark.parametrize('count, columns', [(1, 0), (6, 0), (14, 0), (4, 2), (6, 3), (5, 5)])
def test_nothing_overlaps(image, count, columns) -> None:
    heads = [f'{i} of the {LONG.replace(".", " ")}' for i in range(columns)]
    figure = rendered(draw(np.zeros(image), panels(count), 'a title', heads))
    width, height = figure.get_size_inches() * figure.dpi
    assert width <= (490 * len(heads) if heads else 1570)  # and a margin
    found = boxes(figure)
    for i, (name, box) in enumerate(found):
        assert box.x0 > -8 and box.x1 < width + 8 and box.y0 > -8 and box.y1 < height + 8, name
        for other, other_box in found[i + 1 :]:
            overlap = [
                min(box.x1, other_box.x1) - max(box.x0, other_box.x0),
                min(box.y1, other_box.y1) - max(box.y0, other_box.y0),
            ]
            assert min(overlap) < 1.5, (name, other)


@pytest.mark.slow
@pytest.mark.parametrize('image, aspect', [((64, 64), 1), ((32, 64), 2), ((96, 48), 0.5), ((10, 100), 2.5)])
def test_maps_have_the_aspect_of_the_image(image, aspect) -> None:
    """Except for extreme images, which are stretched."""
    figure = rendered(draw(np.zeros(image), panels(5), None))
    maps = [axes.get_window_extent() for axes in figure.axes if axes.images]
    assert len(maps) == 6
    assert all(abs(box.width / box.height - aspect) < 0.02 for box in maps)
    assert all(box.width * box.height > 150**2 for box in maps)


@pytest.mark.slow
def test_every_layer_is_there_with_its_gates() -> None:
    given = panels(6)
    figure = rendered(draw(np.zeros((32, 32)), given, 'odd $ title', ['ReLU', 'SE $ and']))
    assert figure._suptitle.get_text() == 'odd $ title'
    maps = [axes for axes in figure.axes if axes.images]
    histograms = [axes for axes in figure.axes if axes.lines]
    assert maps[0].get_xlabel() == 'image  32x32'
    assert [axes.get_title('left').strip() for axes in maps] == ['', 'ReLU', 'SE $ and', '', '', '', '']
    colours: list[Any] = [axes.images[-1] for axes in maps[1:-1]]
    assert all((shown.get_array() == panel.heat).all() for shown, panel in zip(colours, given, strict=False))
    assert len({shown.get_clim() for shown in colours}) == 1  # one colour scale
    assert [text.get_text() for text in maps[-1].texts] == [given[-1].note]
    for axes, panel in zip(histograms, given, strict=True):
        assert axes.get_title('right') == f'mean {panel.values.mean():.2f}'
        assert abs(axes.lines[0].get_xdata()[0] - panel.values.mean()) < 1e-6
        counts, _ = np.histogram(panel.values, bins=10, range=(0, 1))
        assert abs(axes.dataLim.y1 - counts.max()) < 1e-6
    for axes, panel in zip(maps[1:], given, strict=True):
        assert axes.get_xlabel().endswith(f'model{panel.name.removeprefix(LONG)}  {panel.shape}')


@pytest.mark.slow
def test_colour_bar_only_with_a_map() -> None:
    def bars(found: list[Panel]) -> int:
        figure = rendered(draw(np.zeros((8, 8)), found, None))
        return sum(axes.get_ylabel() == 'mean gate' for parent in figure.axes for axes in [parent, *parent.child_axes])

    assert (bars(panels(3)), bars(panels(1))) == (1, 0)


def test_maps_of_one_value_have_a_colour() -> None:
    flat = Panel('act', '8x2x2', np.full(32, 0.5), np.full((2, 2), 0.5), '')
    figure = draw(np.zeros((8, 8)), [flat], None)
    low, high = figure.axes[2].images[-1].get_clim()
    assert low < 0.5 < high

"""The training curve of a card as a picture, with matplotlib."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from .._files import replaced_file

__all__ = ['CURVE', 'draw_curve']

CURVE = 'training.png'


def draw_curve(curve: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw values after each epoch, with one panel for each name.

    Args:
        curve: For each name the values after epoch 1, 2, ...
        path: The PNG file. It is written as a whole, or not at all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # pyplot would open windows and keep the figure

    figure = Figure(figsize=(4.2 * len(curve), 2.8), layout='constrained')
    (panels,) = figure.subplots(1, len(curve), squeeze=False)
    for panel, (name, values) in zip(panels, curve.items(), strict=True):
        panel.plot(range(1, len(values) + 1), values, marker='.' if len(values) < 60 else None)
        panel.set(xlabel='epoch', title=name)
        panel.title.set_fontsize('medium')
        panel.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format='png', dpi=110, metadata={'Software': None})
    with replaced_file(path) as file:
        file.write(picture.getvalue())

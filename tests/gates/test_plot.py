"""timm_atac/gates/plot.py: from gates to PNG files."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from timm_atac.gates.pictures import plot_comparison, plot_gates
from timm_atac.gates.plot import _panel


def draw(gates: dict[str, torch.Tensor], image: Any, path: Any, title: str | None = None) -> np.ndarray:
    plot_gates(gates, image, path, title)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing left beside it
    with Image.open(path) as picture:
        assert picture.format == 'PNG' and picture.width <= 1600
        return np.asarray(picture.convert('RGB')).astype(int)


@pytest.mark.slow
def test_the_map_follows_the_gates(tmp_path) -> None:
    """The gates are high in one corner, or by a rotation in the opposite one: only these corners of the map differ."""
    gates = torch.full((1, 4, 8, 8), 0.4)
    gates[:, :, :3, :3] = 0.9
    image = np.full((32, 32), 128, dtype=np.uint8)
    corner, turned = (draw({'act': g}, image, tmp_path / 'gates.png') for g in (gates, gates.flip(2, 3)))
    differs = np.abs(corner - turned).sum(2) > 30
    rows, columns = np.nonzero(differs)
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    corner, turned, differs = corner[box], turned[box], differs[box]
    h, w = differs.shape
    assert min(h, w) > 150 and differs[: h // 4, : w // 4].all() and differs[-h // 4 :, -w // 4 :].all()
    assert not differs[: h // 3, -w // 3 :].any() and not differs[-h // 3 :, : w // 3].any()
    assert np.abs(corner - turned[::-1, ::-1])[4:-4, 4:-4].mean() < 2  # inside the frame
    red, _, blue = corner[: h // 4, : w // 4].mean((0, 1)) - corner[-h // 4 :, -w // 4 :].mean((0, 1))
    assert red > 30 > -30 > blue  # high gates are red, low ones blue


@pytest.mark.slow
@pytest.mark.parametrize(
    'shapes, image',
    [
        ([(8, 7, 7)], (64, 64)),
        ([(8, 4, 8), (4, 32), (4, 33), (4, 35)], (32, 64, 3)),
        ([(8, 5, 1)] * 7, (50, 10)),
        ([(4, 3, 3)] * 18, (9, 9, 1)),
        ([(16, 1, 1)] * 3, (9, 9)),  # no map at all
        ([(8, 2, 3, 4), (8, 1, 100)], (9, 9)),
    ],
)
def test_any_number_and_shape(tmp_path, shapes, image) -> None:
    gates = {f'a.very.long.name.of.a.layer.in.a.deep.model.{i}': torch.rand(2, *s) for i, s in enumerate(shapes)}
    picture = draw(gates, np.zeros(image), tmp_path / 'gates.png', 'odd $ title')
    assert picture.std() > 20
    assert (picture[:, :8] == 255).all() and (picture[:, -3:] == 255).all()  # nothing is cut off


def grids(*shapes: tuple[int, ...], image: tuple[int, int]) -> list[Any]:
    heats = [_panel('', torch.rand(1, *s), image[1] / image[0]).heat for s in shapes]
    return [None if heat is None else heat.shape for heat in heats]


def test_which_positions_are_a_map() -> None:
    assert grids((8, 7, 7), (8, 196), (8, 197), (8, 201), image=(224, 224)) == [(7, 7), (14, 14), (14, 14), None]
    assert grids((8, 1, 1), (8, 1), (8, 16, 196), (8, 3, 4, 4), image=(224, 224)) == [None] * 4
    assert grids((8, 2, 4), (8, 32), (8, 33), (8, 36), image=(64, 128)) == [(2, 4), (4, 8), (4, 8), None]
    assert grids((8, 4, 2), (8, 32), (8, 16, 11), image=(128, 64)) == [(4, 2), (8, 4), (16, 11)]


def test_tokens_are_in_reading_order_after_the_class_token() -> None:
    gates = torch.arange(5.0).reshape(1, 1, 5)
    heat = _panel('', gates, 1.0).heat
    assert heat is not None and heat.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    'gates, image, message',
    [
        ({}, np.zeros((8, 8)), 'expected those of at least one layer'),
        ({'act': torch.rand(2, 8)}, np.zeros((8, 8)), r"'act', of shape \(2, 8\): expected finite"),
        ({'act': torch.rand(0, 8, 2, 2)}, np.zeros((8, 8)), 'expected finite'),
        ({'act': torch.full((1, 8, 2, 2), torch.nan)}, np.zeros((8, 8)), 'expected finite'),
        ({'act': torch.rand(1, 8, 2, 2)}, np.zeros((3, 8, 8)), r'image of shape \(3, 8, 8\)'),
        ({'act': torch.rand(1, 8, 2, 2)}, np.zeros((0, 8)), r'image of shape \(0, 8\)'),
    ],
)
def test_drawing_errors(tmp_path, gates, image, message) -> None:
    with pytest.raises(ValueError, match=message):
        plot_gates(gates, image, tmp_path / 'gates.png')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / 'gates.png'
    path.write_bytes(b'old')

    def fail(*args: Any) -> None:
        raise OSError('no space')

    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError, match='no space'):
        plot_gates({'act': torch.rand(1, 8, 2, 2)}, np.zeros((8, 8)), path)
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_one_gate_a_channel_is_a_map_of_one_colour(tmp_path) -> None:
    """Where the gates per position equal the gate of the whole image, both maps have the same colour."""
    local = torch.full((1, 4, 8, 8), 0.2)
    local[..., 4:] = 0.8
    gates = {'local': {'act': local}, 'global': {'se': torch.full((1, 4, 1, 1), 0.8)}}
    plot_comparison(gates, np.full((32, 32), 128, dtype=np.uint8), tmp_path / 'gates.png')
    with Image.open(tmp_path / 'gates.png') as picture:
        pixels = np.asarray(picture.convert('RGB')).astype(int)
    top = pixels.shape[0] - 120  # inside the maps of the only row
    left, right = pixels[top, 40], pixels[top, 170]
    column = pixels.shape[1] // 2
    assert np.abs(left - right).sum() > 60
    assert np.abs(pixels[top, column + 40] - right).max() < 5 and np.abs(pixels[top, column + 170] - right).max() < 5


@pytest.mark.slow
@pytest.mark.parametrize('count, image', [(2, (9, 30)), (3, (30, 9)), (5, (9, 9))])
def test_any_number_of_columns(tmp_path, count, image) -> None:
    layers = {
        f'a.very.long.name.of.a.layer.{i}': torch.rand(1, *s) for i, s in enumerate([(8, 3, 3), (8, 1, 1), (8, 5)])
    }
    gates = {f'{"a very long name of a model " * 3}{i}': layers for i in range(count)}
    plot_comparison(gates, np.zeros(image), tmp_path / 'gates.png', 'odd $ title')
    with Image.open(tmp_path / 'gates.png') as picture:
        pixels = np.asarray(picture.convert('RGB'))
        assert picture.width <= 500 * count
    assert (pixels[:, :8] == 255).all() and (pixels[:, -3:] == 255).all()  # nothing is cut off

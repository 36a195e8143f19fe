"""train_scripts/image_data.py and digits.py"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

image_data = pytest.importorskip('image_data', reason="needs the packages of the extra 'ablation'")
pytest.importorskip('sklearn', reason="needs the packages of the extra 'ablation'")


def make(count: int, size: int = 8, in_chans: int = 3) -> Any:
    """Random images, each with its own number as its label."""
    images = torch.randint(256, (count, in_chans, size, size), dtype=torch.uint8)
    split = (images, torch.arange(count))
    return image_data.ImageData(split, split, [str(i) for i in range(count)], (0.2,) * in_chans, (0.5,) * in_chans)


def test_digits() -> None:
    data = image_data.load('digits', 16, Path('none'), download=False)
    images, labels = data.train
    assert (len(images), len(data.test[0])) == (1000, 797)
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 16, 16)
    assert (images.min(), images.max()) == (0, 255)
    assert set(labels.tolist()) == set(range(10)) and len(data.classes) == 10
    everything = torch.cat([images, data.test[0]]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # nothing is in both
    assert (data.normalize(images).min(), data.normalize(images).max()) == (0, 1)


def test_cifar(monkeypatch, tmp_path) -> None:
    """What torchvision's classes hold, as the network takes it."""
    pixels = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).reshape(2, 32, 32, 3).astype(np.uint8)
    asked = []

    def cifar(root: Path, train: bool, download: bool) -> SimpleNamespace:
        asked.append((root, train, download))
        return SimpleNamespace(data=pixels if train else pixels[:1], targets=[3, 7][: 2 if train else 1], classes=['a'])

    monkeypatch.setitem(image_data.CIFAR, 'cifar10', cifar)
    data = image_data.load('cifar10', 32, tmp_path, download=True)
    assert asked == [(tmp_path, True, True), (tmp_path, False, True)]
    assert data.train[1].tolist() == [3, 7] and len(data.test[0]) == 1
    expected = (pixels[1, 5, 6] / 255 - [0.4914, 0.4822, 0.4465]) / [0.2023, 0.1994, 0.2010]  # train_cifar.py
    np.testing.assert_allclose(data.normalize(data.train[0])[1, :, 5, 6], expected, rtol=1e-5)


def test_no_cifar(tmp_path) -> None:
    with pytest.raises(image_data.DataError, match=r'cifar100 is not in .*give its place by --data-dir, or --download'):
        image_data.load('cifar100', 32, tmp_path, download=False)


def folder(root: Path, mode: str = 'RGB', splits: tuple[str, ...] = ('train', 'val')) -> Path:
    for split in splits:
        for i, name in enumerate(('cat', 'dog')):
            (root / split / name).mkdir(parents=True)
            for j in range(2):
                Image.new(mode, (20 + j, 30), 'white' if i else 'black').save(root / split / name / f'{j}.png')
    return root


@pytest.mark.parametrize('mode, in_chans', [('RGB', 3), ('L', 1)])
@pytest.mark.parametrize('test_split', ['val', 'validation', 'test'])
def test_folder(mode, in_chans, test_split, tmp_path) -> None:
    data = image_data.load(str(folder(tmp_path, mode, ('train', test_split))), 12, tmp_path, download=False)
    assert data.classes == ['cat', 'dog'] and data.in_chans == in_chans
    assert data.train[0].shape == (4, in_chans, 12, 12)
    assert data.train[1].tolist() == [0, 0, 1, 1]
    assert data.mean == pytest.approx([0.5] * in_chans)
    normalized = data.normalize(data.train[0])
    assert normalized.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalized.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_grey_images_among_others(tmp_path) -> None:
    Image.new('L', (9, 9)).save(folder(tmp_path) / 'train' / 'cat' / '0.png')
    assert image_data.load(str(tmp_path), 12, tmp_path, download=False).in_chans == 3


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda root: (root / 'val').rename(root / 'valid'), 'expected an image folder with train and one of val'),
        (lambda root: (root / 'train').rename(root / 'training'), 'expected an image folder with train'),
        (lambda root: (root / 'val' / 'dog').rename(root / 'val' / 'wolf'), 'only in one: dog, wolf'),
        (
            lambda root: [path.unlink() for path in (root / 'train' / 'cat').iterdir()],
            'no valid file for the classes cat',
        ),
        (lambda root: (root / 'val' / 'cat' / '0.png').write_bytes(b'x'), r'0\.png cannot be read: cannot identify'),
        (lambda root: Image.new('I;16', (9, 9)).save(root / 'val' / 'dog' / '1.png'), r'1\.png has more than 8 bits'),
    ],
)
def test_wrong_folder(spoil, message, tmp_path) -> None:
    spoil(folder(tmp_path))
    with pytest.raises(image_data.DataError, match=message):
        image_data.load(str(tmp_path), 12, tmp_path, download=False)


def test_crop_and_flip() -> None:
    """The same as torchvision's functions, image by image."""
    data = make(6, size=7)
    tops, lefts = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([4, 0, 3, 1, 2, 4])
    flips = torch.tensor([True, False] * 3)
    index = torch.tensor([5, 0, 3, 3, 1, 2])
    padded = torch.nn.functional.pad(data.train[0], (2, 2, 2, 2))
    found = image_data.crop_and_flip(padded, index, tops, lefts, flips, 7)
    for i in range(6):
        expected = TF.crop(TF.pad(data.train[0][index[i]], [2]), int(tops[i]), int(lefts[i]), 7, 7)
        assert torch.equal(found[i], TF.hflip(expected) if flips[i] else expected)


def test_batches_without_augmentation() -> None:
    data = make(23)
    images, labels = zip(*image_data.batches(data, 5, augment=False, seed=1), strict=True)
    assert [len(batch) for batch in images] == [5] * 4  # the last three are left out
    seen = torch.cat(labels)
    assert len(seen.unique()) == 20
    torch.testing.assert_close(torch.cat(images), data.normalize(data.train[0])[seen])
    again = torch.cat([labels for _, labels in image_data.batches(data, 5, augment=False, seed=1)])
    other = torch.cat([labels for _, labels in image_data.batches(data, 5, augment=False, seed=2)])
    assert torch.equal(again, seen) and not torch.equal(other, seen)


@pytest.mark.parametrize('augment', [False, True])
def test_processes_share_the_batches_of_one(augment) -> None:
    data = make(23)
    whole = list(image_data.batches(data, 6, augment, seed=3))
    parts = [list(image_data.batches(data, 6, augment, seed=3, rank=rank, processes=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(images, torch.cat([share for share, _ in shares]))
        assert torch.equal(labels, torch.cat([share for _, share in shares]))


def test_augmentation_is_that_of_the_authors() -> None:
    """Pad 4, crop at random, flip half: one bright pixel in the middle turns up everywhere it can, and nowhere else."""
    images = torch.zeros(4000, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 15, 10] = 255
    split = (images, torch.zeros(4000, dtype=torch.long))
    data = image_data.ImageData(split, split, ['0'], (0.0,), (1.0,))
    ((batch, _),) = image_data.batches(data, 4000, augment=True, seed=0)
    _, _, rows, columns = batch.nonzero(as_tuple=True)
    assert len(rows) == 4000
    assert sorted(rows.unique().tolist()) == list(range(11, 20))
    assert sorted(columns.unique().tolist()) == [*range(6, 15), *range(17, 26)]
    assert (columns > 15).float().mean().item() == pytest.approx(0.5, abs=0.03)
    counts = torch.bincount(rows - 11)
    assert counts.min() > 4000 / 9 * 0.8  # no place is favoured

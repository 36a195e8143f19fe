"""scikit-learn's digits, 1,797 real scans of 8x8, as a data set, and as a folder of images for timm's scripts.

    python train_scripts/digits.py OUT_DIR

writes that folder, the --data-dir of train.py and validate.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from timm_atac.atomic import new_folder

NUM_TRAIN = 1000
SPLIT_SEED = 0  # the same split for every run


def load_digits(size: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Training and test set: images (N, 1, size, size) as uint8, bilinearly scaled from 8x8, and labels (N,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode='bilinear', align_corners=False)
    images = (images * 255).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return (images[train], labels[train]), (images[test], labels[test])


def write_image_folder(folder: Path) -> None:
    """Write the digits as folder/train/0/0001.png ... folder/val/9/0797.png, 8x8 in grey: complete or not at all.

    Raises:
        FileExistsError: There is something at `folder`, and it is no empty folder.
    """
    with new_folder(folder) as new:
        for split, (images, labels) in zip(('train', 'val'), load_digits(8), strict=True):
            for label in range(10):
                (new / split / str(label)).mkdir(parents=True)
            for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True), start=1):
                Image.fromarray(image[0].numpy()).save(new / split / str(label) / f'{number:04}.png')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write scikit-learn's digits as a folder of images, OUT_DIR/train/0/*.png ... OUT_DIR/val/9/*.png, "
        "which is the --data-dir of timm's train.py and validate.py.",
    )
    parser.add_argument('folder', type=Path, metavar='OUT_DIR', help='a new folder, or an empty one')
    args = parser.parse_args(argv)
    try:
        write_image_folder(args.folder)
    except OSError as error:
        parser.error(str(error))
    print(f"{args.folder}: scikit-learn's digits, {NUM_TRAIN} to train and the rest to validate")


if __name__ == '__main__':
    main()

#!/usr/bin/env python
"""Write scikit-learn's digits, 1,797 real scans of 8x8, as a folder of images for timm's train.py and validate.py.

    python train_scripts/digits.py OUT_DIR

The images are OUT_DIR/train/0/*.png ... OUT_DIR/val/9/*.png. OUT_DIR is the --data-dir of timm's scripts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ablations.digits import NUM_TRAIN, load_digits
from PIL import Image

from timm_atac._files import new_folder
from timm_atac.cli.parser import Parser


def write_image_folder(folder: Path) -> None:
    """Write the digits as folder/train/0/0001.png ... folder/val/9/0797.png, 8x8 in grey. An error leaves no files.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    with new_folder(folder) as new:
        for split, (images, labels) in zip(('train', 'val'), load_digits(8), strict=True):
            for label in range(10):
                (new / split / str(label)).mkdir(parents=True)
            for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True), start=1):
                Image.fromarray(image[0].numpy()).save(new / split / str(label) / f'{number:04}.png')


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='OUT_DIR', help='a new folder, or an empty one')
    args = parser.parse_args(argv)
    try:
        write_image_folder(args.folder)
    except (ImportError, OSError) as error:
        sys.exit(f'{parser.prog}: error: {error}')
    print(f"{args.folder}: scikit-learn's digits, {NUM_TRAIN} images for training, the others for validation")


if __name__ == '__main__':
    main()

"""Random images of CIFAR's size for the benchmarks of the ablation. train_scripts has to be on sys.path."""

import torch
from ablations.image_data import CIFAR_MEAN, CIFAR_STD, ImageData


def random_images(count: int, device: torch.device) -> ImageData:
    """Return a data set of ten classes whose training set and test set are the same (count, 3, 32, 32) images."""
    split = (torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10)
    return ImageData(split, split, [str(i) for i in range(10)], CIFAR_MEAN, CIFAR_STD).to(device)

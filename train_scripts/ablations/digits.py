"""scikit-learn's digits: 1,797 real scans of 8x8 in ten classes."""

import torch
import torch.nn.functional as F

NUM_TRAIN = 1000
SPLIT_SEED = 0  # the same split for every run


def load_digits(size: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return the training set and the test set, each as images (N, 1, size, size) in uint8 and labels (N,).

    The images are scaled bilinearly from 8x8.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f'The digits need scikit-learn ({error}): pip install scikit-learn') from error

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode='bilinear', align_corners=False)
    images = (images * 255).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return (images[train], labels[train]), (images[test], labels[test])

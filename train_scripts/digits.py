"""scikit-learn's digits, 1,797 real scans of 8x8, as a data set, and networks trained on them as Hub folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision import transforms

NUM_TRAIN = 1000
SPLIT_SEED = 0  # the same split for every run
ADDRESS = 'https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html'


def load_digits(size: int, device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """The digits as (N, 1, size, size) in 0..1 with labels, split into training and test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode='bilinear', align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    images, labels = images.to(device), labels.to(device)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def write_folder(
    model: nn.Module,
    folder: Path,
    *,
    network: str,
    model_args: dict[str, Any],
    accuracy: float,
    source: str,
    hyperparameters: Mapping[str, Any],
    test_images: torch.Tensor,
) -> None:
    """A trained network as a folder in the format of the Hugging Face Hub, with its card and picture.

    Args:
        model: One of the CIFAR networks, on the CPU.
        folder: Where to; must not be there.
        network: What it is, for a sentence of the card.
        model_args: Arguments of `create_model` that it was made with.
        accuracy: Top-1 in per cent of the test set.
        source: Who measured that.
        hyperparameters: Of its training.
        test_images: Of the test set (N, 1, size, size) in 0..1; the first is that of the picture.
    """
    from timm_atac.export import export

    size = test_images.shape[-1]
    facts = {
        'description': (
            f'The CIFAR network of "Attention as Activation" {network}, trained on handwritten digits: the ablation of '
            f'the paper in miniature.'
        ),
        'license': 'apache-2.0',
        'datasets': [{'name': f"scikit-learn's digits ({ADDRESS}), scaled to {size} x {size}"}],
        'results': [
            {
                'dataset': 'Digits',
                'id': 'digits',
                'split': f'test ({len(test_images)} images)',
                'metrics': {'top-1 accuracy': accuracy},
                'source': {'name': source, 'url': ADDRESS},
            }
        ],
        'hyperparameters': dict(hyperparameters),
        'picture_credit': 'the image is one of the test set',
    }
    image = transforms.functional.to_pil_image(test_images[0].cpu())
    export(model, folder, facts, image, model_args, {'label_names': [str(digit) for digit in range(10)]})

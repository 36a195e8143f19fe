#!/usr/bin/env python
"""Epochs per second of the ablation on random images of CIFAR's size, with two ways to load the images.

`device` is what train_scripts/ablation.py does: it keeps the data set on the device as uint8 and augments it there.
`loader` is the usual way: a DataLoader with workers, and torchvision's transforms of PIL images for the same
augmentation. Both train the same network with the same optimizer in one process, and take turns.

    python benchmarks/ablation_epoch.py --images 2000
    python benchmarks/ablation_epoch.py --images 50000 --device cuda --amp --channels-last --workers 8
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent / 'train_scripts'))

import torch
from ablations import trainer as ablation_trainer
from ablations.cuda_graph import GradientGraph
from ablations.grid import RECIPES, Run, activation
from ablations.image_data import CIFAR_MEAN, CIFAR_STD, Split
from ablations.provenance import device_name
from ablations.trainer import Machine, Trainer
from measuring.random_images import random_images
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class PilImages(Dataset):
    """The images that torchvision's CIFAR10 returns with the authors' transforms."""

    def __init__(self, split: Split) -> None:
        self.pixels = split[0].permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels = split[1].tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(transforms.functional.to_pil_image(self.pixels[index])), self.labels[index]


def loader_batches(loader: DataLoader, device: torch.device) -> Iterator[Split]:
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def epoch_seconds(trainer: Trainer, network: torch.nn.Module | GradientGraph, loader: DataLoader | None) -> float:
    """Return the seconds of one epoch of training, without the test set."""
    batches = ablation_trainer.batches if loader is None else lambda *_: loader_batches(loader, trainer.machine.device)
    with mock.patch.object(ablation_trainer, 'batches', batches):
        start = time.perf_counter()
        trainer.train_epoch(network)  # it ends when the loss is read from the device
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=2000, help='images per epoch (default: 2000)')
    parser.add_argument('--blocks', type=int, default=3, choices=(1, 2, 3, 4), help='blocks per stage (default: 3)')
    parser.add_argument(
        '--rounds', type=int, default=5, help='measured epochs, after one that is not counted (default: 5)'
    )
    parser.add_argument('--workers', type=int, default=2, help='workers of the DataLoader (default: 2)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='train in float16')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()
    if args.images < RECIPES['authors'].batch_size:
        parser.error(f'argument --images: {args.images} is less than a batch of {RECIPES["authors"].batch_size}')

    device = torch.device(args.device)
    data = random_images(args.images, device)
    machine = Machine(device, channels_last=args.channels_last, compile=args.compile)
    precision = 'float16' if args.amp else 'float32'
    loader = DataLoader(
        PilImages(data.train),
        RECIPES['authors'].batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == 'cuda',
    )
    subjects: dict[tuple[str, str], tuple[Trainer, torch.nn.Module | GradientGraph, DataLoader | None]] = {}
    for name in ('relu', 'atac'):
        run = Run('cifar10', name, args.blocks, 4, 0, **RECIPES['authors']._asdict(), precision=precision)
        trainer = Trainer(run, data, machine)
        network = trainer.wrap_model()
        subjects[name, 'device'] = (trainer, network, None)
        subjects[name, 'loader'] = (trainer, network, loader)
    found: dict[tuple[str, str], list[float]] = {key: [] for key in subjects}
    for _ in range(args.rounds + 1):
        for key, subject in subjects.items():
            found[key].append(epoch_seconds(*subject))

    print(
        f'{args.images} images, b = {args.blocks}, batch {RECIPES["authors"].batch_size}, {precision}, '
        f'{device_name(device)}, {args.workers} workers; medians of {args.rounds} epochs (range)\n'
    )
    base = statistics.median(found['relu', 'device'][1:])
    print('| activation | images from | epochs/s | seconds per epoch | over ReLU, device |')
    print('| --- | --- | --- | --- | --- |')
    for (name, source), seconds in found.items():
        counted = seconds[1:]
        median = statistics.median(counted)
        span = f'{min(counted):.2f}..{max(counted):.2f}'
        print(
            f'| {activation(name).label} | {source} | {1 / median:.3f} | {median:.2f} ({span}) | {median / base:.2f} |'
        )


if __name__ == '__main__':
    main()

#!/usr/bin/env python
"""Epochs a second of the ablation on CIFAR-sized random images, ReLU and ATAC, beside the usual way to feed them.

`device` is what train_scripts/ablation.py does: the whole data set on the device as uint8, augmented there. `loader` is
the peer: torchvision's transforms of the same augmentation on PIL images in a DataLoader with workers. Both train the
same network with the same optimizer, in one process, in turns.

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
from ablations import trainer as training
from ablations.grid import RECIPES, Run, activation
from ablations.image_data import CIFAR_MEAN, CIFAR_STD, ImageData, Split
from ablations.provenance import device_name
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class PilImages(Dataset):
    """What torchvision's CIFAR10 with the authors' transforms gives."""

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


def random_images(count: int, device: torch.device) -> ImageData:
    split = (torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10)
    return ImageData(split, split, [str(i) for i in range(10)], CIFAR_MEAN, CIFAR_STD).to(device)


def epoch_seconds(trainer: training.Trainer, network: torch.nn.Module, loader: DataLoader | None) -> float:
    """One epoch of training, without the test set."""
    feed = training.batches if loader is None else lambda *_: loader_batches(loader, trainer.machine.device)
    with mock.patch.object(training, 'batches', feed):
        start = time.perf_counter()
        trainer.train_epoch(network)  # ends with reading the loss from the device
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=2000, help='default: 2000')
    parser.add_argument('--blocks', type=int, default=3, choices=(1, 2, 3, 4), help='default: 3')
    parser.add_argument('--rounds', type=int, default=5, help='default: 5, after one that is not counted')
    parser.add_argument('--workers', type=int, default=2, help='of the loader (default: 2)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='float16')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()
    if args.images < RECIPES['authors'].batch_size:
        parser.error(f'argument --images: {args.images} is less than a batch of {RECIPES["authors"].batch_size}')

    device = torch.device(args.device)
    data = random_images(args.images, device)
    machine = training.Machine(device, channels_last=args.channels_last, compile=args.compile)
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
    subjects: dict[tuple[str, str], tuple[training.Trainer, torch.nn.Module, DataLoader | None]] = {}
    for name in ('relu', 'atac'):
        run = Run('cifar10', name, args.blocks, 4, 0, **RECIPES['authors']._asdict(), precision=precision)
        trainer = training.Trainer(run, data, machine)
        network = trainer.wrapped()
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
    print('| activation | images from | epochs/s | seconds an epoch | over ReLU, device |')
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

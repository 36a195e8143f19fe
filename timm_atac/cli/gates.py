"""Draw the gates of a network on an image.

The picture shows for each unit the mean gate at each position, as a heat map over the image, and the distribution of
all its gates.

    timm-atac gates photo.jpg --model atac_resnet50 -o gates.png
    timm-atac gates photo.jpg --model resnet18 --model-kwargs act_layer=atac --checkpoint model_best.pth.tar

With several models, the picture shows their gates side by side, block by block. For each model these are the gates of
its ATAC units; if it has none, of its SE modules; if it has none of these either, of its activations, such as ReLU.

    timm-atac gates photo.jpg --model resnet50 seresnet50 atac_resnet50 -o gates.png

Give the image first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import MODEL_KWARGS_HELP, NAME_HELP, CliError, check_file, open_image, parse_model_kwargs
from .table import print_table

__all__ = ['add_arguments', 'run']

_HEAD = f'{"gates":>14}  mean   std'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('image', type=Path, metavar='IMAGE', help='any image that Pillow reads')
    parser.add_argument(
        '--model',
        required=True,
        nargs='+',
        action='extend',
        metavar='NAME',
        help=f'{NAME_HELP}, any model of timm with ATAC units, local-dir:OUT_DIR, hf-hub:OWNER/NAME; several models '
        'that have the same blocks, with or without ATAC, are drawn side by side',
    )
    parser.add_argument('--model-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help=MODEL_KWARGS_HELP)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        '--checkpoint',
        type=Path,
        nargs='+',
        action='extend',
        default=[],
        metavar='FILE',
        help="checkpoint of timm's train.py, or .params file, one for each model (default: published weights)",
    )
    weights.add_argument('--untrained', action='store_true', help='use random weights')
    parser.add_argument(
        '-o', '--output', type=Path, default=Path('gates.png'), metavar='PNG', help='default: gates.png'
    )
    parser.usage = (  # argparse would put the image last, where it would be read as one more model
        '%(prog)s IMAGE --model NAME [NAME ...] [--model-kwargs KEY=VALUE [KEY=VALUE ...]]\n'
        '       [--checkpoint FILE [FILE ...] | --untrained] [-o PNG] [-h]'
    )


def run(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != '.png' or args.output.is_dir():
        raise CliError(f'-o {args.output}: expected the name of a PNG file.')
    names = _labels(args.model, args.checkpoint)
    from ..gates.pictures import compare_picture, gates_picture

    image = open_image(args.image, 'IMAGE')
    models = _create(names, args)
    note = 'random weights' if args.untrained else None
    if len(models) > 1:
        rows = _comparison_rows(compare_picture(models, image, args.output, title=note))
    else:
        ((label, model),) = models.items()
        gates = gates_picture(model, image, args.output, title=f'{label}, {note}' if note else label)
        rows = [('unit', _HEAD), *((name, _statistics(gate)) for name, gate in gates.items())]
    print_table(rows)
    print(f'Wrote {args.output}')


def _labels(names: Sequence[str], checkpoints: Sequence[Path]) -> dict[str, str]:
    """Return the name of each model by its label in the picture.

    The label is the name. With several models, that of 'local-dir:PATH' is the last part of the path, if it is unique;
    the checkpoint is added if a model is given several times.
    """
    if checkpoints and len(checkpoints) != len(names):
        files = f'{len(checkpoints)} file{"s" * (len(checkpoints) > 1)}'
        models = f'{len(names)} model{"s" * (len(names) > 1)}'
        raise CliError(f'--checkpoint has {files} for {models}: expected one for each, in that order.')
    labels = [
        Path(name.removeprefix('local-dir:')).name if len(names) > 1 and name.startswith('local-dir:') else name
        for name in names
    ]
    if len(set(labels)) < len(set(names)):
        labels = list(names)
    if checkpoints:
        labels = [
            f'{label} {path}' if names.count(name) > 1 else label
            for label, name, path in zip(labels, names, checkpoints, strict=True)
        ]
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise CliError(
            f'--model has {repeated[0]} twice: expected different models, or --checkpoint with different files.'
        )
    return dict(zip(labels, names, strict=True))


def _comparison_rows(gates: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [('place', 'model', 'gate', _HEAD)]
    for row in zip(*(column.items() for column in gates.values()), strict=True):
        for label, (name, gate) in zip(gates, row, strict=True):
            place, _, own = name.rpartition('.')
            rows.append((place or own, label, own, _statistics(gate)))
    return rows


def _statistics(gate: Any) -> str:
    return f'{"x".join(map(str, gate.shape[1:])):>14}  {gate.mean():.3f}  {gate.std():.3f}'


def _create(names: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """Return the models with their weights by label."""
    from ..hub.convert_files import ModelError, create_model
    from ..weights.folder import read_config

    for name in names.values():
        if Path(name).is_dir():
            raise CliError(f'{name} is a folder: give --model local-dir:{name}')
        if name.startswith('local-dir:'):
            folder = Path(name.removeprefix('local-dir:'))
            if not folder.is_dir():
                problem = 'it is not a folder' if folder.exists() else 'the folder does not exist'
                raise CliError(f'--model {name}: {problem}; expected one that `timm-atac convert` has written.')
            read_config(folder)
    for path in args.checkpoint:
        check_file(path, '--checkpoint', "a checkpoint of timm's train.py or a .params file")
    pretrained = not args.untrained and not args.checkpoint
    kwargs = parse_model_kwargs(args.model_kwargs)
    _check_models(names, kwargs)
    try:
        models = {label: create_model(name, pretrained=pretrained, **kwargs) for label, name in names.items()}
    except ModelError as error:
        hint = ' Give other weights with --checkpoint FILE, or random ones with --untrained.' if pretrained else ''
        raise CliError(f'{str(error).rstrip(".")}.{hint}') from error
    for label, path in zip(models, args.checkpoint, strict=False):  # there are no files, or as many as models
        _load_checkpoint(names[label], models[label], path)
    return models


def _check_models(names: dict[str, str], kwargs: dict[str, Any]) -> None:
    """Check before a download that the gates of the models can be drawn."""
    from ..gates.pictures import check_comparable, gated_units
    from ..hub.convert_files import check_names, create_model

    known = {label: name for label, name in names.items() if ':' not in name}
    check_names(list(known.values()))
    if len(known) < len(names):
        return  # models of folders and of the Hub are checked when they are loaded
    models = {label: create_model(name, device='meta', **kwargs) for label, name in known.items()}
    if len(models) > 1:
        check_comparable(models)
    elif not gated_units(*models.values()):
        (name,) = known.values()
        raise CliError(
            f'{name} has no unit with a gate; --model-kwargs act_layer=atac gives some to a model of timm. Several '
            f'models are drawn side by side with whatever gates they have.'
        )


def _load_checkpoint(name: str, model: Any, path: Path) -> None:
    """Load a `.params` file, or a checkpoint in a format of timm without running code from it."""
    from timm.models import load_checkpoint, load_state_dict
    from torch.serialization import safe_globals

    from ..utils.words import one_line
    from ..weights.convert import ConversionError, array_shapes, to_state_dict
    from ..weights.mismatch import describe_mismatch
    from ..weights.params import is_params, read_params

    head = str(model.pretrained_cfg.get('classifier') or '')
    if is_params(path):
        arrays = read_params(path)
        try:
            model.load_state_dict(to_state_dict(arrays, model))
        except ConversionError:
            shapes = {key: array.shape for key, array in arrays.items()}
            expected = array_shapes(model)  # an error if the authors have no such network
            head = 'output' if 'output.bias' in expected else head
            raise CliError(f'{path} does not fit {name}: {describe_mismatch(shapes, expected, head)}') from None
        return
    with safe_globals([argparse.Namespace]):  # train.py saves its arguments
        try:
            load_checkpoint(model, str(path), weights_only=True)
        except Exception as error:
            try:
                found = {key: tensor.shape for key, tensor in load_state_dict(str(path), weights_only=True).items()}
            except Exception:  # the file is not a checkpoint, or is damaged
                raise CliError(f'{path} is not a checkpoint that can be read: {_first_line(error)}') from error
            own = {key: tensor.shape for key, tensor in model.state_dict().items()}
            if found == own:
                raise CliError(f'{path} does not load into {name}: {one_line(error)}') from error
            raise CliError(f'{path} does not fit {name}: {describe_mismatch(found, own, head)}') from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

"""Print which activations of a model `replace_activations` would replace, and what that costs.

The table has for each unit its name, what it replaces, its width, parameters and multiply-adds. Then come the sums
before and after, and the stages of the model. Nothing is changed, downloaded or written.

    timm-atac replace resnet50 --where paper
    timm-atac replace efficientnet_b0 --where -1 --rd-ratio auto
    timm-atac replace resnet50 --where 'layer4.*.act[12]' --act nin

Give patterns in quotes.
"""

import argparse

from .arguments import MODEL_KWARGS_HELP, CliError, parse_model_kwargs

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', metavar='MODEL', help='any model of timm')
    parser.add_argument(
        '--where',
        nargs='+',
        action='extend',
        metavar='CHOICE',
        help="'paper', 'all', 'attention', patterns of names, stage numbers: as in replace_activations (default: "
        'paper)',
    )
    parser.add_argument(
        '--rd-ratio',
        metavar='RATIO',
        help="width of the units' bottleneck over the channels (default: 0.5), a number of parameters that the units "
        "may add, or 'auto' for a tenth of the parameters of the model",
    )
    parser.add_argument(
        '--act',
        default='atac',
        help="'atac', 'se_act', 'nin' or 'xunit', or one of these with a norm: 'atac_layernorm2d' (default: atac)",
    )
    parser.add_argument('--model-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help=MODEL_KWARGS_HELP)


def run(args: argparse.Namespace) -> None:
    rd_ratio = _rd_ratio(args.rd_ratio)
    import torch

    from ..hub.convert_files import create_model
    from ..replace.activations import replace_activations

    if ':' in args.model:
        raise CliError(f'{args.model!r}: expected the name of a model of timm, without a folder or repository.')
    where = [_choice(text) for text in args.where or ['paper']]
    with torch.device('meta'):
        model = create_model(args.model, **parse_model_kwargs(args.model_kwargs))
    try:
        report = replace_activations(
            model, args.act, where=where if len(where) > 1 else where[0], rd_ratio=rd_ratio, dry_run=True
        )
    except ValueError as error:
        raise CliError(str(error)) from error
    print(report)


def _choice(text: str) -> str | int:
    """Return a stage number as a number, and anything else as it is."""
    try:
        return int(text)
    except ValueError:
        return text


def _rd_ratio(text: str | None) -> float | str | None:
    if text is None or text == 'auto':
        return text
    try:
        return float(text.replace('_', '').replace(',', ''))
    except ValueError:
        raise CliError(
            f"--rd-ratio {text}: expected a ratio such as 0.25, a number of parameters, or 'auto'."
        ) from None

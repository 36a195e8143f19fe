"""The command line: arguments in, one call, a result or an error in one line out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__, _autoload
from . import commands

__all__ = ['main']

_NAME = 'ARCH or ARCH.TAG, as `timm-atac list` shows them'
_KWARGS = 'arguments of timm.create_model that the network was made with, as act_layer=relu num_classes=10; comes last'
_IMAGE = "image for the picture of the gates (default: matplotlib's sample)"

_CONVERT = """\
Convert a .params file of the authors' MXNet networks into a folder in the format of the Hugging Face Hub (config.json,
model.safetensors, README.md, gates.png), or such a folder into a .params file.

    timm-atac convert FILE.params OUT_DIR --model atac_resnet50
    timm-atac convert OUT_DIR FILE.params

The folder is loaded by timm.create_model('local-dir:OUT_DIR', pretrained=True) and pushed by `timm-atac push OUT_DIR`.
"""
_PUSH = """\
Push a folder of `timm-atac convert` to the Hugging Face Hub, in one commit: card, config, weights and picture. Or, with
--model, the published weights of a tag. The repository is made if need be; pushing the same again changes nothing.

    timm-atac push OUT_DIR --repo OWNER/NAME

Takes the token of `hf auth login`, or HF_TOKEN.
"""
_CARD = """\
Write the model card of a folder anew: README.md from its config.json and the facts in its card.yaml, gates.png where
there is none or with --image, and card.yaml with --facts. README.md is replaced: keep your own text in the facts.
Or print the card of a registered tag.

    timm-atac card OUT_DIR --facts card.yaml
    timm-atac card atac_resnet50.open_atac_in1k

Facts are description, license, license_name, license_link, license_note, origin, datasets, papers, results,
hyperparameters, comparison, citations, picture_credit; hub_configs/ in the package or its repository has an example.
"""
_GATES = """\
Draw what the gates of a network do on an image: for each unit the mean gate per position, as a heat map over the image,
and the distribution of all its gates.

    timm-atac gates photo.jpg --model atac_resnet50 -o gates.png
    timm-atac gates photo.jpg --model resnet18 --model-kwargs act_layer=atac --checkpoint model_best.pth.tar

Or, with several models, their gates side by side, block by block: those of ATAC, of SE, or of the activations, such as
ReLU, whichever a model has first in this order.

    timm-atac gates photo.jpg --model resnet50 seresnet50 atac_resnet50 -o gates.png

The image comes first.
"""
_LIST = """\
List the models that this package registers: parameters, multiply-adds of one image, tags, and where their weights are.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-atac`.

    Args:
        argv: Arguments, those of the process by default.

    Returns:
        Exit status: 0, 1 after an error, 130 after an interruption; wrong arguments exit with 2.
    """
    args = _parser().parse_args(argv)
    try:
        if _autoload._disabled():
            raise commands.CliError('TIMM_ATAC_DISABLE is set, so timm does not know the models; unset it.')
        args.run(args)
    except KeyboardInterrupt:
        print('\nInterrupted; nothing is left half written.', file=sys.stderr)
        return 130
    except (commands.CliError, ValueError, OSError, ImportError, RuntimeError) as error:
        print(f'timm-atac {args.command}: error: {str(error) or type(error).__name__}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='timm-atac', description='Weights, model cards and pictures of the ATAC networks in timm.'
    )
    parser.add_argument('--version', action='version', version=f'timm_atac {__version__}')
    subparsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, run: Any, text: str, summary: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    sub = command('convert', commands.convert, _CONVERT, "the authors' .params file into a Hub folder, or back")
    sub.add_argument('source', type=Path, metavar='SOURCE', help='.params file, or folder')
    sub.add_argument('target', type=Path, metavar='TARGET', help='folder, or .params file; must not be there')
    sub.add_argument('--model', metavar='NAME', help=f'{_NAME}; needed for a .params file')
    sub.add_argument('--model-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help=_KWARGS)
    sub.add_argument(
        '--tag', help='tag of the weights (default: none); for a published ARCH.TAG, the file has to be that file'
    )
    sub.add_argument('--image', type=Path, metavar='IMAGE', help=_IMAGE)

    sub = command('push', commands.push, _PUSH, 'a folder, or published weights, to the Hugging Face Hub')
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument(
        'folder',
        nargs='?',
        type=Path,
        metavar='OUT_DIR',
        help='folder of `timm-atac convert`, or any after `timm-atac card`',
    )
    what.add_argument('--model', metavar='ARCH.TAG', help='download, convert and push the published weights of a tag')
    sub.add_argument(
        '--repo',
        metavar='OWNER/NAME',
        help='default: ARCH.TAG of the organisation in TIMM_ATAC_HUB_ORG',
    )
    sub.add_argument('--private', action='store_true', help='make a new repository private')
    sub.add_argument('--dry-run', action='store_true', help='say what would be pushed, and push nothing')
    sub.add_argument('--yes', action='store_true', help='do not ask, where the weights have no licence')

    sub = command('card', commands.card, _CARD, 'the model card of a folder or a tag')
    sub.add_argument('target', metavar='OUT_DIR|ARCH.TAG', help='a folder, or a tag with a card of its own')
    sub.add_argument(
        '--facts',
        type=Path,
        metavar='YAML',
        help='facts, copied to card.yaml (default: those of the folder, or of its tag)',
    )
    sub.add_argument('--image', type=Path, metavar='IMAGE', help=_IMAGE)

    sub = command('gates', commands.gates, _GATES, 'a picture of what the gates do on an image')
    sub.add_argument('image', type=Path, metavar='IMAGE', help='any image that Pillow reads')
    sub.add_argument(
        '--model',
        required=True,
        nargs='+',
        action='extend',
        metavar='NAME',
        help=f'{_NAME}, any model of timm with ATAC units, local-dir:OUT_DIR, hf-hub:OWNER/NAME; several that have the '
        f'same blocks, with ATAC or without, side by side',
    )
    sub.add_argument(
        '--model-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help=f'{_KWARGS}, and is for every model'
    )
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument(
        '--checkpoint',
        type=Path,
        nargs='+',
        action='extend',
        default=[],
        metavar='FILE',
        help="of timm's train.py, or a .params file, one for each model (default: published weights)",
    )
    weights.add_argument('--untrained', action='store_true', help='random weights')
    sub.add_argument('-o', '--output', type=Path, default=Path('gates.png'), metavar='PNG', help='default: gates.png')
    sub.usage = (  # argparse puts the image last, where it would be taken for one more model
        '%(prog)s IMAGE --model NAME [NAME ...] [--model-kwargs KEY=VALUE [KEY=VALUE ...]]\n'
        '       [--checkpoint FILE [FILE ...] | --untrained] [-o PNG] [-h]'
    )

    sub = command('list', commands.list_models, _LIST, 'the registered models')
    sub.add_argument('pattern', nargs='?', default='*', help="of names, as 'atac_resnet*' (default: all)")
    return parser

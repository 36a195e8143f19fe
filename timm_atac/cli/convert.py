"""Convert a .params file of the authors' MXNet networks into a Hub folder, or back.

The folder has the format of the Hugging Face Hub: config.json, model.safetensors, README.md, card.yaml and gates.png.

    timm-atac convert FILE.params OUT_DIR --model atac_resnet50
    timm-atac convert OUT_DIR FILE.params

timm.create_model('local-dir:OUT_DIR', pretrained=True) loads the folder, `timm-atac push OUT_DIR` pushes it.
"""

import argparse
import re
from pathlib import Path

from .arguments import IMAGE_HELP, MODEL_KWARGS_HELP, NAME_HELP, CliError, check_file, open_image, parse_model_kwargs

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', type=Path, metavar='SOURCE', help='.params file, or folder')
    parser.add_argument('target', type=Path, metavar='TARGET', help='new folder, or new .params file')
    parser.add_argument('--model', metavar='NAME', help=f'{NAME_HELP}; needed for a .params file')
    parser.add_argument('--model-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help=MODEL_KWARGS_HELP)
    parser.add_argument(
        '--tag', help='tag of the weights (default: none); with a published ARCH.TAG, SOURCE must be the published file'
    )
    parser.add_argument('--image', type=Path, metavar='IMAGE', help=IMAGE_HELP)


def run(args: argparse.Namespace) -> None:
    if args.source.is_dir():
        _to_params(args)
    else:
        check_file(args.source, 'SOURCE', 'a .params file, or a folder')
        _to_folder(args)


def _to_params(args: argparse.Namespace) -> None:
    if args.model or args.tag or args.model_kwargs or args.image:
        raise CliError('--model, --tag, --model-kwargs and --image are for a .params file; a folder has a config.json.')
    if args.target.suffix != '.params':
        raise CliError(f'{args.target}: expected FILE.params, because {args.source} is a folder.')
    from ..hub.convert_files import folder_to_params

    folder_to_params(args.source, args.target)
    print(f'Wrote {args.target}')


def _to_folder(args: argparse.Namespace) -> None:
    if not args.model:
        raise CliError('--model is needed for a .params file: ARCH or ARCH.TAG, as `timm-atac list` shows them.')
    architecture, _, tag = args.model.partition('.')
    if tag and args.tag and tag != args.tag:
        raise CliError(f'--model {args.model} and --tag {args.tag} give two tags; give one.')
    tag = tag or args.tag
    if tag and not re.fullmatch(r'\w[\w.-]*', tag):
        raise CliError(f'the tag {tag!r} is not valid: expected letters, digits, _, - and dots.')
    from ..hub.convert_files import params_to_folder

    name = f'{architecture}.{tag}' if tag else architecture
    params_to_folder(args.source, args.target, name, parse_model_kwargs(args.model_kwargs), open_image(args.image))
    print(f'Wrote {args.target}: {", ".join(sorted(path.name for path in args.target.iterdir()))}')

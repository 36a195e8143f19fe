"""The command line: arguments in, one call, a result or an error in one line out."""

import argparse
import ast
import re
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = ['main']

# Nothing heavy is imported before the arguments are known: a help text takes no seconds.

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
Write the model card of a folder, README.md and gates.png, after its config or the facts have changed; or print that of
a registered tag.

    timm-atac card OUT_DIR --facts card.yaml
    timm-atac card atac_resnet50.open_atac_in1k
"""
_GATES = """\
Draw what the gates of a network do on an image: for each unit the mean gate per position, as a heat map over the image,
and the distribution of all its gates.

    timm-atac gates photo.jpg --model atac_resnet50 -o gates.png
    timm-atac gates photo.jpg --model resnet18 --model-kwargs act_layer=atac --checkpoint model_best.pth.tar
"""
_LIST = """\
List the models that this package registers: parameters, multiply-adds of one image, tags, and where their weights are.
"""


class CliError(Exception):
    """A command that was not carried out: why, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-atac`.

    Args:
        argv: Arguments, those of the process by default.

    Returns:
        Exit status: 0, 1 after an error, 130 after an interruption; wrong arguments exit with 2.
    """
    args = _parser().parse_args(argv)
    try:
        _check_registered()
        args.run(args)
    except KeyboardInterrupt:
        print('\nInterrupted; nothing is left half written.', file=sys.stderr)
        return 130
    except (CliError, ValueError, OSError, ImportError, RuntimeError) as error:
        print(f'timm-atac {args.command}: error: {error or type(error).__name__}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog='timm-atac', description='Weights, model cards and pictures of the ATAC networks in timm.'
    )
    parser.add_argument('--version', action='version', version=f'timm_atac {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, run: Any, text: str, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    sub = command('convert', _convert, _CONVERT, "the authors' .params file into a Hub folder, or back")
    sub.add_argument('source', type=Path, metavar='SOURCE', help='.params file, or folder')
    sub.add_argument('target', type=Path, metavar='TARGET', help='folder, or .params file; must not be there')
    sub.add_argument('--model', metavar='NAME', help=f'{_NAME}; needed for a .params file')
    sub.add_argument('--model-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help=_KWARGS)
    sub.add_argument(
        '--tag', help="tag of the weights; open_atac_in1k is the authors' own file, and no other (default: none)"
    )
    sub.add_argument('--image', type=Path, metavar='IMAGE', help=_IMAGE)

    sub = command('push', _push, _PUSH, 'a folder, or published weights, to the Hugging Face Hub')
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument('folder', nargs='?', type=Path, metavar='OUT_DIR', help='folder of `timm-atac convert`')
    what.add_argument('--model', metavar='ARCH.TAG', help='download, convert and push the published weights of a tag')
    sub.add_argument(
        '--repo',
        metavar='OWNER/NAME',
        help='default: ARCH.TAG of the organisation in TIMM_ATAC_HUB_ORG',
    )
    sub.add_argument('--private', action='store_true', help='make a new repository private')
    sub.add_argument('--dry-run', action='store_true', help='say what would be pushed, and push nothing')
    sub.add_argument('--yes', action='store_true', help='do not ask, where the weights have no licence')

    sub = command('card', _card, _CARD, 'the model card of a folder or a tag')
    sub.add_argument('target', metavar='OUT_DIR|ARCH.TAG', help='a folder, or a tag with a card of its own')
    sub.add_argument(
        '--facts', type=Path, metavar='YAML', help='facts of the card (default: card.yaml in the folder, or of its tag)'
    )
    sub.add_argument('--image', type=Path, metavar='IMAGE', help=_IMAGE)

    sub = command('gates', _gates, _GATES, 'a picture of what the gates do on an image')
    sub.add_argument('image', type=Path, metavar='IMAGE', help='any image that Pillow reads')
    sub.add_argument(
        '--model',
        required=True,
        metavar='NAME',
        help=f'{_NAME}, any model of timm with ATAC units, local-dir:OUT_DIR, hf-hub:OWNER/NAME',
    )
    sub.add_argument('--model-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help=_KWARGS)
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help="weights of timm's train.py (default: published)"
    )
    weights.add_argument('--untrained', action='store_true', help='random weights')
    sub.add_argument('-o', '--output', type=Path, default=Path('gates.png'), metavar='PNG', help='default: gates.png')

    sub = command('list', _list, _LIST, 'the registered models')
    sub.add_argument('pattern', nargs='?', default='*', help="of names, as 'atac_resnet*' (default: all)")
    return parser


def _check_registered() -> None:
    from . import _autoload

    if _autoload._disabled():
        raise CliError('TIMM_ATAC_DISABLE is set, so timm does not know the models; unset it.')


def _convert(args: argparse.Namespace) -> None:
    if args.source.is_dir():
        if args.model or args.tag or args.model_kwargs or args.image:
            raise CliError(
                '--model, --tag, --model-kwargs and --image are for a .params file; a folder has a config.json.'
            )
        from .open_atac import convert_folder

        convert_folder(args.source, args.target)
        print(f'Wrote {args.target}')
        return
    if not args.model:
        raise CliError(f'--model is needed for a .params file: {_NAME}.')
    architecture, _, tag = args.model.partition('.')
    if tag and args.tag and tag != args.tag:
        raise CliError(f'--model {args.model} and --tag {args.tag} name two tags; give one.')
    tag = tag or args.tag
    if tag and not re.fullmatch(r'\w[\w.-]*', tag):
        raise CliError(f'the tag {tag!r} is no part of a name: expected letters, digits, _, - and dots.')
    from .open_atac import convert_params

    convert_params(
        args.source,
        args.target,
        f'{architecture}.{tag}' if tag else architecture,
        _model_kwargs(args.model_kwargs),
        _open(args.image),
        log=_log,
    )
    print(f'Wrote {args.target}: {", ".join(sorted(path.name for path in args.target.iterdir()))}')


def _push(args: argparse.Namespace) -> None:
    from .hub import check, check_token, push, resolve_repo
    from .weights.folder import read_config

    if args.model:
        name = _check_published(args.model)
    else:
        from .card import name_of

        name = name_of(read_config(args.folder))
    repo = resolve_repo(args.repo, name)  # before there is a download
    if not args.dry_run:
        check_token()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or _published(args.model, Path(made, 'folder'))
        _log(f'Checking {folder}')
        package = check(folder, repo)
        print(f'{package.name} -> {package.repo}{" (private, if it is new)" if args.private else ""}')
        for file, size in package.files.items():
            print(f'  {file:18} {size / 1e6:9.2f} MB')
        print(f'  licence: {package.license or "none stated"}')
        if package.license_note:
            print(f'  {package.license_note}')
        if args.dry_run:
            print('Nothing was pushed (--dry-run).')
            return
        if package.license_note and not args.yes:
            _ask(f'Upload weights that have no licence to {package.repo} all the same?')
        _log(f'Pushing to {package.repo}')
        pushed = push(package, args.private)
        print(f'{"Pushed to" if pushed.changed else "Nothing has changed in"} {pushed.url}')


def _check_published(name: str) -> str:
    from .published import PUBLISHED

    if name not in PUBLISHED:
        raise CliError(
            f'{name!r} has no published weights; {", ".join(PUBLISHED)} has. For others: convert, then push.'
        )
    return name


def _published(name: str, folder: Path) -> Path:
    """Download and convert the weights of a tag, from where they come from and not from the Hub."""
    from .export import export
    from .open_atac import create
    from .published import PUBLISHED

    _log(f'Loading {PUBLISHED[name].url}')
    export(create(name, pretrained=True, pretrained_cfg_overlay={'hf_hub_id': ''}), folder, log=_log)
    return folder


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise CliError(f'{question} Nobody is there to answer; say --yes to do so.')
    if input(f'{question} [y/N] ').strip().lower() not in ('y', 'yes'):
        raise CliError('Nothing was pushed.')


def _card(args: argparse.Namespace) -> None:
    from .card import render
    from .export import CARD, PICTURE, write_card
    from .facts import config_folder, read_facts
    from .weights.folder import read_config

    folder = Path(args.target)
    if not folder.is_dir():
        tag_folder = config_folder(args.target)
        if tag_folder is None:
            raise CliError(f'{args.target!r} is neither a folder nor a tag with a card of its own.')
        if args.image:
            raise CliError('--image is for a folder, which has the weights.')
        print(render(read_config(tag_folder), read_facts(args.facts or tag_folder / 'card.yaml'), PICTURE), end='')
        return
    write_card(folder, read_facts(args.facts) if args.facts else None, _open(args.image), log=_log)
    print(f'Wrote {folder / CARD}')


def _gates(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != '.png' or args.output.is_dir():
        raise CliError(f'-o {args.output}: expected the name of a PNG file.')
    from .viz import gates_picture

    image = _open(args.image)
    model = _create(args)
    gates = gates_picture(model, image, args.output, title=args.model)
    width = max(map(len, gates))
    print(f'{"unit":{width}}  {"gates":>14}  mean   std')
    for name, gate in gates.items():
        shape = 'x'.join(map(str, gate.shape[1:]))
        print(f'{name:{width}}  {shape:>14}  {gate.mean():.3f}  {gate.std():.3f}')
    print(f'Wrote {args.output}')


def _create(args: argparse.Namespace) -> Any:
    """The network to draw, with its weights."""
    from .open_atac import create

    if Path(args.model).is_dir():
        raise CliError(f'{args.model} is a folder: say --model local-dir:{args.model}')
    if args.checkpoint and not args.checkpoint.is_file():
        raise CliError(f'{args.checkpoint} is no file.')
    pretrained = not args.untrained and args.checkpoint is None
    try:
        model = create(args.model, pretrained=pretrained, **_model_kwargs(args.model_kwargs))
    except ValueError as error:
        hint = ' For other weights than the published: --checkpoint FILE, or --untrained.' if pretrained else ''
        raise CliError(f'{error}{hint}') from error
    if args.checkpoint:
        _load_checkpoint(model, args.checkpoint)
    return model


def _load_checkpoint(model: Any, path: Path) -> None:
    """Weights in a format of timm's or of the authors'; nothing in them is run."""
    from timm.models import load_checkpoint
    from torch.serialization import safe_globals

    from .weights.convert import to_state_dict
    from .weights.params import is_params, read_params

    if is_params(path):
        model.load_state_dict(to_state_dict(read_params(path), model))
        return
    try:
        with safe_globals([argparse.Namespace]):  # train.py's arguments
            load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CliError(f'{path} does not load into {type(model).__name__}: {line}') from error


def _list(args: argparse.Namespace) -> None:
    from timm import create_model, list_models

    from ._register import MODULES
    from .profile import profile

    rows = [('model', 'params', 'MACs', 'tags', 'weights')]
    for name in list_models(module=list(MODULES)):
        if not any(fnmatch(text, args.pattern) for text in (name, *(f'{name}.{tag}' for tag, _ in _tags(name)))):
            continue
        stats = profile(create_model(name, device='meta'))
        for tag, weights in _tags(name):
            first = not rows[-1][0] or rows[-1][0] != name
            cells = (name, f'{stats.params:.2f} M', f'{stats.gmacs:.3f} G') if first else ('', '', '')
            rows.append((*cells, tag, weights))
    if len(rows) == 1:
        raise CliError(f'no model of ours is named {args.pattern!r}.')
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print('  '.join([f'{cell:{width}}' for cell, width in zip(row, widths, strict=False)] + [row[-1]]).rstrip())


def _tags(name: str) -> list[tuple[str, str]]:
    """Tags of a model, and where each has its weights."""
    from timm.models import get_arch_pretrained_cfgs

    cfgs = get_arch_pretrained_cfgs(name).items()
    return [
        (full.partition('.')[2], f'hf-hub:{cfg.hf_hub_id}' if cfg.hf_hub_id else str(cfg.url or 'none'))
        for full, cfg in cfgs
    ]


def _model_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` as timm's scripts read them: a Python literal, or else text."""
    if not pairs:
        return {}
    from .weights.folder import RESERVED

    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals or not key.isidentifier():
            raise CliError(f'--model-kwargs {pair!r}: expected KEY=VALUE.')
        if key in RESERVED or key in ('device', 'dtype'):
            raise CliError(f'--model-kwargs {pair!r}: {key} is no argument of the network itself.')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs


def _open(path: Path | None) -> Any:
    from PIL import Image, UnidentifiedImageError

    if path is None:
        return None
    try:
        with Image.open(path) as file:
            file.load()
            return file
    except UnidentifiedImageError:
        raise CliError(f'{path} is no image that Pillow reads.') from None


def _log(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())

"""Push a folder, or published weights, to the Hugging Face Hub.

The card, config, weights and picture of the folder, or of the published weights of a tag with --model, are pushed in
one commit. The repository is created if it does not exist. Pushing the same files again changes nothing.

    timm-atac push OUT_DIR --repo OWNER/NAME

The token comes from `hf auth login`, or from HF_TOKEN.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from ..weights.published import PUBLISHED
from .arguments import CliError

__all__ = ['add_arguments', 'run']


_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    help = 'folder that `timm-atac convert` has written, or any other after `timm-atac card`'
    what.add_argument('folder', nargs='?', type=Path, metavar='OUT_DIR', help=help)
    what.add_argument(
        '--model', metavar='ARCH.TAG', help='push the published weights of a tag, in this package or downloaded'
    )
    help = 'default: ARCH.TAG of the organisation in TIMM_ATAC_HUB_ORG'
    parser.add_argument('--repo', metavar='OWNER/NAME', help=help)
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--dry-run', action='store_true', help='print what would be pushed, and push nothing')
    parser.add_argument('--yes', action='store_true', help='do not ask before weights without a licence are pushed')


def run(args: argparse.Namespace) -> None:
    from huggingface_hub.constants import ENDPOINT

    from ..hub.push import check_folder, check_token, push, resolve_repo
    from ..utils.words import did_you_mean

    if args.model and args.model not in PUBLISHED:
        hint = did_you_mean(args.model, PUBLISHED) or f'{" and ".join(PUBLISHED)} has.'
        raise CliError(f'{args.model!r} has no published weights; {hint} Convert other weights, then push.')
    if args.folder and not args.folder.is_dir():
        problem = 'it is not a folder' if args.folder.exists() else 'the folder does not exist'
        raise CliError(f'OUT_DIR {args.folder}: {problem}; expected one that `timm-atac convert` has written.')
    if args.model:  # before the download
        resolve_repo(args.repo, args.model)
        if not args.dry_run:
            check_token()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or _download(args.model, Path(temporary, 'folder'))
        _logger.info('Checking %s', folder)
        checked = check_folder(folder, args.repo)
        repo = checked.repo
        if not args.dry_run:
            check_token()
        print(f'{checked.name} -> {repo}{" (private, if it is new)" if args.private else ""}')
        for file, size in checked.files.items():
            print(f'  {file:18} {size / 1e3:10,.1f} kB')
        print(f'  {checked.license_note or f"licence: {checked.license}"}')
        if args.dry_run:
            print('Nothing was pushed (--dry-run).')
            return
        if checked.license_note and not args.yes:
            _ask(repo)
        _logger.info('Pushing to %s', repo)
        is_changed = push(checked, args.private)
        print(f'{"Pushed to" if is_changed else "Nothing has changed in"} {ENDPOINT}/{repo}')


def _download(name: str, folder: Path) -> Path:
    """Write the published weights of a tag to a folder: those in this package or the authors', never the Hub's."""
    from ..hub.convert_files import create_model
    from ..hub.export import export

    _logger.info('Loading %s', PUBLISHED[name].url or name)
    export(create_model(name, pretrained=True, pretrained_cfg_overlay={'hf_hub_id': ''}), folder)
    return folder


def _ask(repo: str) -> None:
    if not sys.stdin.isatty():
        raise CliError(f'{repo}: the weights have no licence; give --yes to push them anyway.')
    if input(f'Push weights that have no licence to {repo} anyway? [y/N] ').strip().lower() not in ('y', 'yes'):
        raise CliError('Nothing was pushed.')

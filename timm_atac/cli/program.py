"""The entry point of `timm-atac`: assembles the parser, runs a command, reports errors in one line."""

import argparse
import logging
import sys
from collections.abc import Sequence

from .. import __version__, _autoload
from . import card, convert, gates, list_models, push
from .arguments import CliError

__all__ = ['main']

_COMMANDS = {'convert': convert, 'push': push, 'card': card, 'gates': gates, 'list': list_models}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-atac`.

    Args:
        argv: Arguments. None means those of the process.

    Returns:
        Exit status: 0, 1 after an error, 130 after an interruption. Wrong arguments exit with 2.
    """
    args = _parser().parse_args(argv)
    progress = logging.StreamHandler()  # to sys.stderr
    logger = logging.getLogger('timm_atac')
    logger.addHandler(progress)
    for name in ('cli', 'hub'):  # the other packages log what nobody has asked for
        logger.getChild(name).setLevel(logging.INFO)
    try:
        if _autoload._disabled():
            raise CliError('TIMM_ATAC_DISABLE is set, so timm does not know the models; unset it.')
        args.run(args)
    except KeyboardInterrupt:
        print('\nInterrupted; no file is incomplete.', file=sys.stderr)
        return 130
    except (CliError, ValueError, OSError, ImportError, RuntimeError) as error:
        print(f'timm-atac {args.command}: error: {str(error) or type(error).__name__}', file=sys.stderr)
        return 1
    finally:
        logger.removeHandler(progress)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='timm-atac', description='Weights, model cards and pictures of the ATAC networks in timm.'
    )
    parser.add_argument('--version', action='version', version=f'timm_atac {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, module in _COMMANDS.items():
        description = module.__doc__ or ''
        command = commands.add_parser(
            name,
            help=description.partition('.\n')[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser

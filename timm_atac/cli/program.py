"""The entry point of `timm-atac`: assembles the parser, runs a command, reports errors in one line."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from .. import __version__, _autoload
from . import card, convert, env, gates, list_models, push, replace
from .arguments import CliError
from .parser import Parser

__all__ = ['main']

_COMMANDS = {
    'convert': convert,
    'push': push,
    'card': card,
    'gates': gates,
    'list': list_models,
    'replace': replace,
    'env': env,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-atac`.

    Args:
        argv: Arguments. None means those of the process.

    Returns:
        Exit status: 0, 1 after an error, 70 after a fault of this package, 130 after an interruption. Wrong arguments
        exit with 2.
    """
    args = _parser().parse_args(argv)
    progress = logging.StreamHandler()  # to sys.stderr
    logger = logging.getLogger('timm_atac')
    logger.addHandler(progress)
    for name in ('cli', 'hub'):  # the other packages log what nobody has asked for
        logger.getChild(name).setLevel(logging.INFO)
    try:
        if _autoload._disabled() and args.command != 'env':  # which says so
            raise CliError('TIMM_ATAC_DISABLE is set, so timm does not know the models; unset it.')
        args.run(args)
    except KeyboardInterrupt:
        print('\nInterrupted; no file is incomplete.', file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get('TIMM_ATAC_DEBUG', '').lower() in ('1', 'true', 'yes', 'on'):
            traceback.print_exc()
        is_fault = not _is_known(error)
        text = _fault_message(error) if is_fault else _message(error)
        print(f'timm-atac {args.command}: error: {text}', file=sys.stderr)
        return 70 if is_fault else 1
    finally:
        logger.removeHandler(progress)
    return 0


def _is_known(error: Exception) -> bool:
    """True for an error of the user or of the machine, False for a fault of this package."""
    if isinstance(error, (CliError, OSError, ImportError)):
        return True
    from ..gates.maps import GatesError
    from ..hub.convert_files import ModelError
    from ..hub.facts import CardError
    from ..hub.push import HubError
    from ..weights.convert import ConversionError
    from ..weights.folder import FolderError
    from ..weights.params import ParamsError

    return isinstance(error, (CardError, ConversionError, FolderError, GatesError, HubError, ModelError, ParamsError))


def _message(error: Exception) -> str:
    """Return the message of a known error. It is one line, except for a list of arrays that do not fit."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f'{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}.'
    lines = [' '.join(line.split()) for line in str(error).splitlines()]
    if type(error).__name__ == 'ConversionError':
        return '\n  '.join(lines)
    return ' '.join(lines) or type(error).__name__


def _fault_message(error: Exception) -> str:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    return (
        f'this is a fault of timm_atac ({reason}). Please report it with the output of `timm-atac env`; '
        f'TIMM_ATAC_DEBUG=1 in the environment shows the traceback.'
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog='timm-atac', description='Weights, model cards and pictures of the ATAC networks in timm.')
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

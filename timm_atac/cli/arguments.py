"""Arguments that several commands take, and the error for arguments that a command cannot use."""

import ast
from pathlib import Path
from typing import Any

__all__ = [
    'IMAGE_HELP',
    'MODEL_KWARGS_HELP',
    'NAME_HELP',
    'CliError',
    'check_file',
    'open_image',
    'parse_model_kwargs',
]

NAME_HELP = 'ARCH or ARCH.TAG, as `timm-atac list` shows them'
IMAGE_HELP = "image for the picture of the gates (default: matplotlib's sample)"
MODEL_KWARGS_HELP = (
    'arguments of timm.create_model that the network was made with, such as act_layer=relu num_classes=10; several '
    'models all get them; give this option last'
)


class CliError(Exception):
    """A command cannot run; the message says why, and what to do."""


def parse_model_kwargs(pairs: list[str]) -> dict[str, Any]:
    """Parse `key=value` as timm's scripts do: the value is a Python literal, or else text."""
    if not pairs:
        return {}
    from ..weights.folder import RESERVED

    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals or not key.isidentifier():
            raise CliError(f'--model-kwargs {pair!r}: expected KEY=VALUE.')
        if key in RESERVED or key in ('device', 'dtype'):
            raise CliError(f'--model-kwargs {pair!r}: {key} is not an argument of the network itself.')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs


def check_file(path: Path, argument: str, expected: str) -> None:
    """Check that an argument is the path of a file that can be read.

    Args:
        path: The path that was given.
        argument: Name of the argument, for the message.
        expected: What the file should be, for the message.
    """
    if path.is_file():
        return
    problem = 'it is not a file' if path.exists() else 'the file does not exist'
    problem = 'it is a folder' if path.is_dir() else problem
    raise CliError(f'{argument} {path}: {problem}; expected {expected}.')


def open_image(path: Path | None, argument: str = '--image') -> Any:
    """Return the image in a file, None if `path` is None. `argument` is the argument of the command, for messages."""
    if path is None:
        return None
    check_file(path, argument, 'an image that Pillow reads')
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            file.load()
            return file
    except UnidentifiedImageError:
        raise CliError(f'{argument} {path}: Pillow cannot read it as an image.') from None
    except OSError as error:  # truncated or damaged
        raise CliError(f'{argument} {path} cannot be read: {error.strerror or error}.') from None

"""Converts the authors' `.params` files into Hub folders and back."""

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs

from .._files import check_free
from ..weights.convert import to_arrays, to_state_dict
from ..weights.folder import load_folder
from ..weights.identity import record_source
from ..weights.params import read_params, write_params
from ..weights.pretrained import check_published
from ..weights.published import PUBLISHED
from .export import export

__all__ = ['create_model', 'folder_to_params', 'params_to_folder']

_logger = logging.getLogger(__name__)


def params_to_folder(
    path: str | Path,
    folder: str | Path,
    name: str,
    model_args: Mapping[str, Any] | None = None,
    image: Any = None,
) -> None:
    """Convert a `.params` file of the authors' networks into a folder as `timm_atac.hub.export.export` writes it.

    Args:
        path: The file.
        folder: The new folder. After an error it does not exist.
        name: ARCH or ARCH.TAG. A registered tag sets the number of classes and the preprocessing. If the tag stands for
            a published file, `path` must be that file.
        model_args: Arguments of `create_model` that the network was trained with.
        image: PIL image for the picture of the gates. None means matplotlib's sample.

    Raises:
        ValueError: `name` is not one of the authors' networks, or the file is not the published one, is not a valid
            `.params` file (`ParamsError`) or has other arrays than the network (`ConversionError`).
        FileExistsError: `folder` exists and is not empty.
    """
    check_free(Path(folder))
    architecture, _, tag = name.partition('.')
    known = timm.list_models(module=['atac_resnet', 'cifar_resnet'])
    if architecture not in known:
        similar = get_close_matches(architecture, known, n=2) or known
        raise ValueError(f"{architecture!r} is not one of the authors' networks; expected {' or '.join(similar)}.")
    if name in PUBLISHED:
        _logger.info('Checking the git blob id of %s', path)
        check_published(path, name)
    elif tag in {published.partition('.')[2] for published in PUBLISHED}:
        raise ValueError(f'the tag {tag!r} belongs to {" and ".join(PUBLISHED)}; give another tag, or none.')
    arrays = read_params(path)
    size = sum(array.nbytes for array in arrays.values())
    _logger.info('Read %s: %d arrays, %.1f MB', path, len(arrays), size / 1e6)
    model = create_model(architecture, **_cfg_args(name), **(model_args or {}))
    state_dict = to_state_dict(arrays, model)
    model.load_state_dict(state_dict)
    if name in PUBLISHED:
        record_source(model, name, state_dict)
    _logger.info('Writing %s: weights, config, picture and card', folder)
    facts = None  # those that are known of published weights
    if name not in PUBLISHED:
        facts = {'description': f'{architecture}, converted from the MXNet file {Path(path).name}.'}
        facts |= {'name': name} if tag else {}
    export(model, folder, facts, image, model_args)


def _cfg_args(name: str) -> dict[str, Any]:
    """Return arguments of `create_model` for the pretrained cfg; the cfg of an unregistered tag names no origin."""
    tag = name.partition('.')[2]
    if name in get_arch_pretrained_cfgs(name) and tag != 'untrained':
        return {'pretrained_cfg': tag}
    return {'pretrained_cfg_overlay': {'tag': tag or None, **dict.fromkeys(('license', 'description', 'origin_url'))}}


def folder_to_params(folder: str | Path, path: str | Path) -> None:
    """Convert a folder into a `.params` file of float32 arrays for MXNet's `load_parameters`.

    Args:
        folder: Folder in timm's Hub format with one of the authors' networks.
        path: The new file. After an error it does not exist.

    Raises:
        FileExistsError: `path` exists.
        ValueError: The folder is incomplete or damaged (`FolderError`), or the authors' networks have no counterpart of
            a part of the model.
    """
    check_free(Path(path))
    write_params(path, to_arrays(load_folder(folder)))


def create_model(name: str, **kwargs: Any) -> Any:
    """Call `timm.create_model` with a name and arguments that a user has given.

    Raises:
        ValueError: The model cannot be created: timm does not know the name, the model does not take an argument, or it
            has no weights.
    """
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # a wrong argument can raise any exception
        reason = str(error) or type(error).__name__
        raise ValueError(f'{name} cannot be created: {reason}') from error

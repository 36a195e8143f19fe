"""The authors' `.params` files into Hub folders, and back."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs

from .._files import check_free
from ..weights.convert import to_arrays, to_state_dict
from ..weights.folder import load_folder
from ..weights.params import read_params, write_params
from ..weights.pretrained import check_published
from ..weights.published import PUBLISHED
from .export import export, facts_of

__all__ = ['convert_folder', 'convert_params', 'create']


def convert_params(
    path: str | Path,
    folder: str | Path,
    name: str,
    model_args: Mapping[str, Any] | None = None,
    image: Any = None,
    log: Callable[[str], object] = lambda line: None,
) -> None:
    """Convert a `.params` file of the authors' networks into a folder, as `timm_atac.hub.export.export` writes it.

    Args:
        path: The file.
        folder: Where to; complete at the end, or not there.
        name: ARCH or ARCH.TAG. A tag that is registered brings its classes and preprocessing and, where it stands for a
            published file, has to be that file.
        model_args: Arguments of `create_model` that the network was trained with.
        image: As of `export`.
        log: Is told what is being done.

    Raises:
        ValueError: No network of ours has that name, or it is another file than the published one; the file is no
            `.params` file (`ParamsError`); its arrays are not those of the network (`ConversionError`).
        FileExistsError: There is something at `folder` already.
    """
    check_free(Path(folder))
    architecture = name.partition('.')[0]
    theirs = timm.list_models(module=['atac_resnet', 'cifar_resnet'])
    if architecture not in theirs:
        similar = get_close_matches(architecture, theirs, n=2) or theirs
        raise ValueError(f"{architecture!r} is none of the authors' networks; expected {' or '.join(similar)}.")
    tag = name.partition('.')[2]
    if name not in PUBLISHED and tag in {published.partition('.')[2] for published in PUBLISHED}:
        raise ValueError(f'the tag {tag!r} is that of {" and ".join(PUBLISHED)}; give another, or none.')
    if name in PUBLISHED:
        log(f'Checking the git blob id of {path}')
        check_published(path, name)
    arrays = read_params(path)
    size = sum(array.nbytes for array in arrays.values())
    log(f'Read {path}: {len(arrays)} arrays, {size / 1e6:.1f} MB')
    model = create(architecture, **_cfg_args(name), **(model_args or {}))
    model.load_state_dict(to_state_dict(arrays, model))
    log(f'Writing {folder}: weights, config, picture and card')
    facts = facts_of(name) or {'description': f'{architecture}, converted from the MXNet file {Path(path).name}.'}
    export(model, folder, facts, image, model_args, log=log)


def _cfg_args(name: str) -> dict[str, Any]:
    """Arguments of `create_model` for the pretrained cfg; of a tag that is not registered, no origin is claimed."""
    _, _, tag = name.partition('.')
    if name in get_arch_pretrained_cfgs(name) and tag != 'untrained':
        return {'pretrained_cfg': tag}
    return {'pretrained_cfg_overlay': {'tag': tag or None, **dict.fromkeys(('license', 'description', 'origin_url'))}}


def convert_folder(folder: str | Path, path: str | Path) -> None:
    """Convert a folder back into a `.params` file, float32, for MXNet's `load_parameters`.

    Args:
        folder: In timm's Hub format, of one of the authors' networks.
        path: The file; complete at the end, or not there.

    Raises:
        FileExistsError: There is something at `path` already.
        ValueError: The folder is not whole (`FolderError`), or the network has parts that the authors' have not.
    """
    check_free(Path(path))
    write_params(path, to_arrays(load_folder(folder)))


def create(name: str, **kwargs: Any) -> Any:
    """`timm.create_model`, for names and arguments that come from outside.

    Raises:
        ValueError: It cannot be: timm does not know the name, the model does not take an argument, it has no weights.
    """
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # an argument can break anything
        reason = str(error) or type(error).__name__
        raise ValueError(f'{name} cannot be made: {reason}') from error

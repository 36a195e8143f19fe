"""A network as all that a Hub repository has: weights, config, model card, and the picture of its gates."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, is_model

from .atomic import check_free, new_folder
from .card import config_folder, name_of, read_facts, render
from .published import PUBLISHED
from .weights.convert import to_arrays, to_state_dict
from .weights.folder import load_folder, read_config, save_folder
from .weights.params import read_params, write_params
from .weights.pretrained import check_published

__all__ = ['CARD', 'PICTURE', 'convert_folder', 'convert_params', 'create', 'draw', 'export', 'facts_of']

CARD = 'README.md'
PICTURE = 'gates.png'
_CREDIT = "the image is matplotlib's sample, a portrait of Grace Hopper by the U.S. Navy, in the public domain"


def export(
    model: Any,
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    image: Any = None,
    model_args: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads and `timm-atac push` uploads.

    Args:
        model: A network made by `timm.create_model`.
        folder: Where to; complete at the end, or not there.
        facts: Of the card, as `timm_atac.card.read_facts` has them; None for those of `hub_configs`, where it has some.
        image: PIL image for the picture, None for matplotlib's sample. Without matplotlib there is no picture.
        model_args: Arguments of `create_model` that the network was made with; timm knows them since 1.0.31.
        model_config: More entries of `config.json`, as of timm's `save_for_hf`.

    Raises:
        FileExistsError: There is something at `folder` already.
        CardError: A fact is not of its form.
    """
    with new_folder(Path(folder)) as new:
        save_folder(model, new, model_args, model_config)
        config = read_config(new)
        facts = dict(facts_of(name_of(config)) if facts is None else facts)
        credit = draw(model, new / PICTURE, image)
        if credit:
            facts['picture_credit'] = credit
        picture = PICTURE if (new / PICTURE).exists() else None
        (new / CARD).write_text(render(config, facts, picture), encoding='utf-8')


def convert_params(
    path: str | Path,
    folder: str | Path,
    name: str,
    model_args: Mapping[str, Any] | None = None,
    image: Any = None,
    log: Callable[[str], object] = lambda line: None,
) -> None:
    """Convert a `.params` file of the authors' networks into a folder, as `export` writes it.

    Args:
        path: The file.
        folder: Where to; complete at the end, or not there.
        name: ARCH or ARCH.TAG. A tag that is registered brings its preprocessing and, where it stands for a published
            file, has to be that file.
        model_args: Arguments of `create_model` that the network was trained with.
        image: As of `export`.
        log: Is told what is being done.

    Raises:
        ValueError: No network of ours has that name, or it is another file than the published one; the file is no
            `.params` file (`ParamsError`); its arrays are not those of the network (`ConversionError`).
        FileExistsError: There is something at `folder` already.
    """
    check_free(Path(folder))
    architecture, _, tag = name.partition('.')
    if not is_model(architecture):
        similar = ' or '.join(get_close_matches(architecture, timm.list_models(), n=2)) or '`timm-atac list`'
        raise ValueError(f'timm knows no model {architecture!r}; see {similar}.')
    if name in PUBLISHED:
        log(f'Checking the git blob id of {path}')
        check_published(path, name)
    arrays = read_params(path)
    size = sum(array.nbytes for array in arrays.values())
    log(f'Read {path}: {len(arrays)} arrays, {size / 1e6:.1f} MB')
    model = create(architecture, pretrained_cfg_overlay=_overlay(name, tag), **(model_args or {}))
    model.load_state_dict(to_state_dict(arrays, model))
    log(f'Writing {folder}: weights, config, picture and card')
    facts = facts_of(name) or {'description': f'{architecture}, converted from the MXNet file {Path(path).name}.'}
    export(model, folder, facts, image, model_args)


def create(name: str, **kwargs: Any) -> Any:
    """`timm.create_model`, for names and arguments that come from outside.

    Raises:
        ValueError: timm does not know the name, the model does not take an argument, or has no weights.
    """
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f'{name} cannot be made: {error}') from error


def _overlay(name: str, tag: str) -> dict[str, Any]:
    """What goes over the pretrained cfg of an architecture: of a tag that is not registered, no origin is claimed."""
    try:
        known = bool(tag) and get_pretrained_cfg(name) is not None
    except RuntimeError:
        known = False
    if known:
        return {'tag': tag, **{key: getattr(get_pretrained_cfg(name), key) for key in ('mean', 'std')}}
    return {'tag': tag or None, **dict.fromkeys(('license', 'description', 'origin_url'))}


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


def facts_of(name: str) -> dict[str, Any]:
    """The facts that `hub_configs` has of ARCH.TAG, none where it has none."""
    folder = config_folder(name)
    return read_facts(folder / 'card.yaml') if folder else {}


def draw(model: Any, path: Path, image: Any = None) -> str | None:
    """Draw the picture of a network's gates, where there is matplotlib and the network has gates.

    Returns:
        What the card has to say of the image, None where it is the user's.
    """
    from . import viz

    if find_spec('matplotlib') is None or not viz.gated_units(model):
        return None
    credit = None
    if image is None:
        from matplotlib.cbook import get_sample_data
        from PIL import Image

        path_of_sample: Any = get_sample_data('grace_hopper.jpg', asfileobj=False)
        with Image.open(path_of_sample) as file:
            image = file.convert('RGB')
        credit = _CREDIT
    viz.gates_picture(model, image, path)
    return credit

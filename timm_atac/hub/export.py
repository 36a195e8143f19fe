"""A network as all that a Hub repository has: weights, config, model card, and the picture of its gates."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from .._files import new_folder, replaced_file
from ..weights.folder import load_folder, read_config, save_folder
from .card import name_of, render
from .facts import check_facts, config_folder, read_facts

__all__ = ['CARD', 'FACTS', 'PICTURE', 'export', 'facts_of', 'write_card']

CARD = 'README.md'
FACTS = 'card.yaml'
PICTURE = 'gates.png'
_CREDIT = "the image is matplotlib's sample, a portrait of Grace Hopper by the U.S. Navy, in the public domain"

Log = Callable[[str], object]


def _silent(line: str) -> None:
    pass


def export(
    model: Any,
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    image: Any = None,
    model_args: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    log: Log = _silent,
) -> None:
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads and `timm-atac push` uploads.

    Args:
        model: A network made by `timm.create_model`.
        folder: Where to; complete at the end, or not there. It has `config.json`, `model.safetensors`, `README.md`,
            the facts in `card.yaml`, and where there is a picture `gates.png`.
        facts: Of the card, as `timm_atac.hub.facts.read_facts` has them; None for those of `hub_configs`.
        image: PIL image for the picture, None for matplotlib's sample.
        model_args: Arguments of `create_model` that the network was made with; timm knows them since 1.0.31.
        model_config: More entries of `config.json`, as of timm's `save_for_hf`.
        log: Is told why there is no picture.

    Raises:
        FileExistsError: There is something at `folder` already.
        CardError: A fact is not of its form.
    """
    with new_folder(Path(folder)) as new:
        save_folder(model, new, model_args, model_config)
        facts = facts_of(name_of(read_config(new))) if facts is None else facts
        write_card(new, facts, image, model, log)


def write_card(
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    image: Any = None,
    model: Any = None,
    log: Log = _silent,
) -> list[str]:
    """Write `README.md` and `card.yaml` of a folder anew, and the picture where there is none or `image` is given.

    Args:
        folder: With `config.json` and `model.safetensors`.
        facts: As `timm_atac.hub.facts.read_facts` has them; None for those that the folder has, else of `hub_configs`.
        image: PIL image for the picture, None for matplotlib's sample.
        model: The network in the folder, None to load it if need be.
        log: Is told why there is no picture.

    Returns:
        The files that were written.

    Raises:
        CardError: A fact is not of its form. Nothing has changed.
        FolderError: The folder is not whole.
    """
    folder = Path(folder)
    config = read_config(folder)
    if facts is None:
        own = folder / FACTS
        facts = read_facts(own) if own.exists() else facts_of(name_of(config))
    facts = check_facts(dict(facts))
    render(config, facts)  # before anything is changed
    written = [CARD, FACTS]
    if image is not None or not (folder / PICTURE).exists():
        why_not = _draw(model or load_folder(folder), folder / PICTURE, image)
        if why_not:
            log(f'No picture of the gates: {why_not}')
        else:
            written.append(PICTURE)
        if image is None and not why_not:
            facts['picture_credit'] = _CREDIT
        elif facts.get('picture_credit') == _CREDIT:
            del facts['picture_credit']
    picture = PICTURE if (folder / PICTURE).exists() else None
    with replaced_file(folder / FACTS) as file:
        file.write(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).encode())
    with replaced_file(folder / CARD) as file:
        file.write(render(config, facts, picture).encode())
    return written


def facts_of(name: str) -> dict[str, Any]:
    """The facts that `hub_configs` has of ARCH.TAG, none where it has none."""
    folder = config_folder(name)
    return read_facts(folder / FACTS) if folder else {}


def _draw(model: Any, path: Path, image: Any) -> str | None:
    """Draw the picture of a network's gates, or say why not."""
    from .. import _timm
    from ..gates import pictures as viz

    if find_spec('matplotlib') is None:
        return "matplotlib is not installed (pip install 'timm_atac[viz]')"
    if not viz.gated_units(model):
        return 'the network has none'
    channels = _timm.input_size(model)[0]
    if channels not in (1, 3):
        return f'the network takes images of {channels} channels'
    if image is None:
        from matplotlib.cbook import get_sample_data
        from PIL import Image

        path_of_sample: Any = get_sample_data('grace_hopper.jpg', asfileobj=False)
        with Image.open(path_of_sample) as file:
            image = file.convert('RGB')
    try:
        viz.gates_picture(model, image, path)
    except ValueError as error:  # of a network that puts out NaN, for one
        return str(error)
    return None

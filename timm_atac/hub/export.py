"""Writes a network as a folder for the Hub: weights, config, model card and a picture of its gates."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._files import new_folder, replaced_file
from ..weights.folder import load_folder, read_config, save_folder
from .card import full_name, render
from .facts import config_folder, read_facts

__all__ = ['CARD', 'FACTS', 'PICTURE', 'export', 'shipped_facts', 'write_card']

CARD = 'README.md'
FACTS = 'card.yaml'
PICTURE = 'gates.png'
_SAMPLE_CREDIT = "the image is matplotlib's sample, a portrait of Grace Hopper by the U.S. Navy, in the public domain"

_logger = logging.getLogger(__name__)


def export(
    model: Any,
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    image: Any = None,
    model_args: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads and `timm-atac push` uploads.

    The folder has `config.json`, `model.safetensors`, `README.md`, `card.yaml` with the facts of the card, and
    `gates.png`, unless no picture can be drawn; then a warning is logged.

    Args:
        model: A network made by `timm.create_model`.
        folder: The new folder. After an error it does not exist.
        facts: Facts of the card, as `timm_atac.hub.facts.read_facts` returns them. None means those in `hub_configs`.
        image: PIL image for the picture. None means matplotlib's sample.
        model_args: Arguments of `create_model` that the network was made with; since 1.0.31 timm keeps them itself.
        model_config: More entries of `config.json`, as for timm's `save_for_hf`.

    Raises:
        FileExistsError: `folder` exists and is not empty.
        CardError: Facts are unknown, incomplete or of the wrong type.
    """
    with new_folder(Path(folder)) as new:
        save_folder(model, new, model_args, model_config)
        write_card(new, facts, image, model)


def write_card(
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    image: Any = None,
    model: Any = None,
) -> list[str]:
    """Write `README.md` and `card.yaml` of a folder, and `gates.png` if it does not exist or `image` is given.

    A warning is logged if no picture can be drawn.

    Args:
        folder: Folder with `config.json` and `model.safetensors`.
        facts: As `timm_atac.hub.facts.read_facts` returns them. None means those in the folder's `card.yaml`, or, if it
            has none, in `hub_configs`.
        image: PIL image for the picture. None means matplotlib's sample.
        model: The network in the folder. None loads it if it is needed.

    Returns:
        Names of the files that were written.

    Raises:
        CardError: Facts are unknown, incomplete or of the wrong type. The folder has not changed.
        FolderError: The folder is incomplete or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    if facts is None:
        own = folder / FACTS
        facts = read_facts(own) if own.exists() else shipped_facts(full_name(config))
    facts = {name: value for name, value in facts.items() if value is not None}
    render(config, facts)  # wrong facts raise here, before anything is written
    written = [CARD, FACTS]
    picture = folder / PICTURE
    if image is not None or not picture.exists():
        if facts.get('picture_credit') == _SAMPLE_CREDIT:
            del facts['picture_credit']
        model = model or load_folder(folder)
        try:
            _draw(model, picture, image)
        except ImportError:
            _logger.warning("No picture of the gates: matplotlib is not installed (pip install 'timm_atac[viz]')")
        except ValueError as error:  # no unit has a gate, the gates are not finite, the input is not an image
            _logger.warning('No picture of the gates: %s', error)
        else:
            written.append(PICTURE)
            if image is None:
                facts['picture_credit'] = _SAMPLE_CREDIT
    with replaced_file(folder / FACTS) as file:
        file.write(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).encode())
    with replaced_file(folder / CARD) as file:
        file.write(render(config, facts, PICTURE if picture.exists() else None).encode())
    return written


def shipped_facts(name: str) -> dict[str, Any]:
    """Return the facts that `hub_configs` has for ARCH.TAG, {} if it has none."""
    folder = config_folder(name)
    return read_facts(folder / FACTS) if folder else {}


def _draw(model: Any, path: Path, image: Any) -> None:
    from ..gates.pictures import gates_picture

    if image is None:
        from matplotlib.cbook import get_sample_data
        from PIL import Image

        sample: Any = get_sample_data('grace_hopper.jpg', asfileobj=False)
        with Image.open(sample) as file:
            image = file.convert('RGB')
    gates_picture(model, image, path)

"""Writes a network as a folder for the Hub: weights, config, model card and pictures."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._files import new_folder, replaced_file
from ..weights.folder import CONFIG, dump_config, identify_folder, load_folder, mend_config, read_config, save_for_hf
from ..weights.identity import Identity
from ..weights.published import PUBLISHED
from .card import render
from .curve import CURVE, draw_curve
from .facts import CardError, config_folder, read_facts

__all__ = ['ASKED', 'CARD', 'FACTS', 'PICTURE', 'export', 'shipped_facts', 'write_card']

CARD = 'README.md'
FACTS = 'card.yaml'
PICTURE = 'gates.png'
# facts that only those who trained the weights know, with an example; `card.yaml` asks for those that are missing
ASKED = {
    'license': 'apache-2.0',
    'datasets': '[{name: My data}]',
    'results': '[{dataset: My data, id: my-data, split: test, metrics: {top-1 accuracy: 75.3}, '
    'source: {name: my log, url: https://example.org}}]',
    'hyperparameters': '{optimizer: SGD, epochs: 100}',
}
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
    `gates.png`, unless no picture can be drawn; then a warning is logged. `training.png` shows the training curve, if
    the facts have one.

    Args:
        model: A network made by `timm.create_model`.
        folder: The new folder. After an error it does not exist.
        facts: Facts of the card, as `timm_atac.hub.facts.read_facts` returns them. None means those that are known of
            the weights, as for `write_card`.
        image: PIL image for the picture. None means matplotlib's sample.
        model_args: Arguments of `create_model` that the network was made with; since 1.0.31 timm keeps them itself.
        model_config: More entries of `config.json`, as for timm's `save_for_hf`.

    Raises:
        FileExistsError: `folder` exists and is not empty.
        CardError: Facts are unknown, incomplete or of the wrong type.
    """
    with new_folder(Path(folder)) as new:
        save_for_hf(model, new, model_config, model_args)
        write_card(new, facts, image, model)


def write_card(
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    image: Any = None,
    model: Any = None,
) -> list[str]:
    """Write `README.md` and `card.yaml` of a folder, and `gates.png` if it is not there or shows other weights.

    `training.png` shows the training curve of the facts, and is removed if they have none.

    `config.json` is corrected if timm or transformers would fail to load it, or if it says what is true of other
    weights only. A warning is logged if no picture can be drawn.

    Args:
        folder: Folder with `config.json` and `model.safetensors`.
        facts: As `timm_atac.hub.facts.read_facts` returns them. None means those in the folder's `card.yaml`. If it has
            none, they are those of `hub_configs` for published weights, and for other weights what is recorded.
        image: PIL image for the picture. None means matplotlib's sample.
        model: The network in the folder. None loads it.

    Returns:
        Names of the files that were written.

    Raises:
        CardError: Facts are unknown, incomplete, of the wrong type, or of other weights. The folder has not changed.
        FolderError: The folder is incomplete or damaged.
    """
    folder = Path(folder)
    identity = identify_folder(folder)
    own = folder / FACTS
    previous = read_facts(own) if own.exists() else {}
    if facts is None:
        facts = previous or known_facts(identity)
    check_weights(facts, identity, own)
    facts = {name: value for name, value in facts.items() if value is not None} | {'weights': identity.weights}
    model = model or load_folder(folder)
    old_config = read_config(folder)
    config = mend_config(old_config, model)
    name = facts.get('name') or identity.name
    render(config, facts, name=name)  # wrong facts raise here, before anything is written
    written = [CARD, FACTS]
    picture = folder / PICTURE
    if image is not None or not picture.exists() or previous.get('weights', identity.weights) != identity.weights:
        if facts.get('picture_credit') == _SAMPLE_CREDIT:
            del facts['picture_credit']
        try:
            _draw(model, picture, image)
        except ImportError:
            _logger.warning('No picture of the gates: matplotlib is not installed (pip install matplotlib).')
        except ValueError as error:  # no unit has a gate, the gates are not finite, the input is not an image
            _logger.warning('No picture of the gates: %s', error)
        else:
            written.append(PICTURE)
            if image is None:
                facts['picture_credit'] = _SAMPLE_CREDIT
    curve = folder / CURVE
    curve.unlink(missing_ok=True)
    if facts.get('curve'):
        try:
            draw_curve(facts['curve'], curve)
        except ImportError:
            _logger.warning('No picture of the training curve: matplotlib is not installed (pip install matplotlib).')
        else:
            written.append(CURVE)
    if config != old_config:
        written.append(CONFIG)
        _write(folder / CONFIG, dump_config(config))
    _write(folder / FACTS, yaml.safe_dump(facts, sort_keys=False, allow_unicode=True) + _questions(facts))
    shown = {key: path.name for key, path in (('picture', picture), ('curve', curve)) if path.exists()}
    _write(folder / CARD, render(config, facts, **shown, name=name))
    return written


def check_weights(facts: Mapping[str, Any], identity: Identity, path: str | Path) -> None:
    """Check that facts describe the weights of a folder, or do not say which weights they describe.

    Args:
        facts: As `timm_atac.hub.facts.read_facts` returns them.
        identity: What is known of the weights.
        path: File of the facts, for the message.

    Raises:
        CardError: They describe other weights.
    """
    if facts.get('weights') not in (None, identity.weights):
        raise CardError(
            f'{path} describes other weights (their hash is {facts["weights"][:12]}, that of the folder '
            f'{identity.weights[:12]}). Correct its facts and remove the line `weights`, or remove the file.'
        )
    if (name := facts.get('name')) in PUBLISHED and name != identity.published:
        raise CardError(f'{path}: the name {name!r} belongs to published weights, which these are not. Give another.')


def known_facts(identity: Identity) -> dict[str, Any]:
    """Return what is known of weights: the facts of `hub_configs` if they are published, else where they come from."""
    if identity.published:
        return shipped_facts(identity.published)
    if identity.base is None:
        return {}
    base = PUBLISHED[identity.base]
    terms = shipped_facts(identity.base).get('license_note')
    description = (
        f'Fine-tuned from the weights `{identity.base}`, {base.trained or f"which are at {base.url}"}. How they were '
        f'changed is not recorded.'
    )
    note = {'license_note': f'Of the weights that it was fine-tuned from: {terms}'} if terms else {}
    return {'description': description, **note}


def _questions(facts: Mapping[str, Any]) -> str:
    """Return comments for `card.yaml` that ask for the facts that are missing, '' if none is."""
    missing = [f'# {name}: {example}\n' for name, example in ASKED.items() if name not in facts]
    if not missing:
        return ''
    return f'\n# Add what you know of these weights, and run `timm-atac card` again:\n{"".join(missing)}'


def _write(path: Path, text: str) -> None:
    with replaced_file(path) as file:
        file.write(text.encode())


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

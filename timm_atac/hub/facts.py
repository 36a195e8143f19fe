"""Facts of model cards: read from YAML files, and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ['CardError', 'check_facts', 'config_folder', 'read_facts', 'with_defaults']

_CITATION = """\
@inproceedings{dai2020attention,
  title     = {Attention as Activation},
  author    = {Dai, Yimian and Oehmcke, Stefan and Gieseke, Fabian and Wu, Yiquan and Barnard, Kobus},
  booktitle = {International Conference on Pattern Recognition (ICPR)},
  year      = {2020}
}"""

# name of a fact -> its type, and what it is when nobody says
_FACTS: dict[str, tuple[type, Any]] = {
    'description': (str, 'A network with attentional activations (ATAC).'),
    'license': (str, None),
    'license_name': (str, None),
    'license_link': (str, None),
    'license_note': (str, None),
    'origin': (str, None),
    'datasets': (list, []),
    'papers': (list, [{'title': 'Attention as Activation', 'url': 'https://arxiv.org/abs/2007.07729'}]),
    'results': (list, []),
    'hyperparameters': (dict, {}),
    'comparison': (dict, {}),
    'citations': (list, [_CITATION]),
    'picture_credit': (str, None),
}
# what each entry of a fact has, and of a part of an entry
_PARTS = {
    'datasets': ('name',),
    'papers': ('title', 'url'),
    'results': ('dataset', 'id', 'split', 'metrics', 'source'),
    'results.source': ('name', 'url'),
    'comparison': ('text', 'rows'),
    'comparison.rows': ('model', 'params', 'gmacs', 'top1', 'top5', 'source'),
}


class CardError(ValueError):
    """Facts that make no card."""


def config_folder(name: str) -> Path | None:
    """The folder of `hub_configs` with `config.json` and `card.yaml` of a tag, None where there is none.

    Args:
        name: ARCH.TAG.
    """
    here = Path(__file__).parent.parent
    # in a wheel they are inside of the package
    found = (root / 'hub_configs' / name for root in (here, here.parent))
    return next((folder for folder in found if (folder / 'card.yaml').is_file()), None)


def read_facts(path: str | Path) -> dict[str, Any]:
    """The facts of a card.

    Args:
        path: YAML file, as in `hub_configs`. Facts are 'description', 'license' (an id of the Hub's, 'other' with
            'license_name' and 'license_link'), 'license_note', 'origin', 'datasets' ('name', 'id' on the Hub), 'papers'
            ('title', 'url'), 'results' ('dataset', 'id', 'split', 'metrics', 'source' with 'name' and 'url'),
            'hyperparameters', 'comparison' ('text', 'rows'), 'citations', 'picture_credit'.

    Raises:
        CardError: It is not YAML, or a fact is unknown or not of its form.
        OSError: It cannot be read.
    """
    try:
        facts = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CardError(f'{path} is not YAML: {error}') from None
    try:
        return check_facts(facts)
    except CardError as error:
        raise CardError(f'{path}: {error}') from None


def check_facts(facts: Any) -> dict[str, Any]:
    """Facts as `read_facts` describes them; those without a value are left out.

    Raises:
        CardError: One is unknown or not of its form.
    """
    if not isinstance(facts, dict):
        raise CardError(f'the facts of a card are a {type(facts).__name__}, expected a mapping.')
    facts = {name: value for name, value in facts.items() if value is not None}
    for name, value in facts.items():
        if name not in _FACTS:
            raise CardError(f'{name} is not a fact of a card; expected {", ".join(_FACTS)}.')
        if not isinstance(value, _FACTS[name][0]):
            raise CardError(f'{name} is {value!r}, expected a {_FACTS[name][0].__name__}.')
    for path, parts in _PARTS.items():
        for entry in _entries(facts, path):
            missing = [part for part in parts if not isinstance(entry, dict) or part not in entry]
            if missing:
                raise CardError(f'{path} has an entry without {", ".join(missing)}: {entry!r}')
    for result in facts.get('results', []):
        metrics = result['metrics']
        if not isinstance(metrics, dict) or not all(isinstance(value, (int, float)) for value in metrics.values()):
            raise CardError(f'results has metrics {metrics!r}, expected numbers by name.')
    return facts


def _entries(facts: Mapping[str, Any], path: str) -> list[Any]:
    """The entries at 'papers', or at 'results.source' of all results."""
    found: list[Any] = [facts]
    for part in path.split('.'):
        values = [entry[part] for entry in found if part in entry]
        found = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    return found


def with_defaults(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """All facts of a card: those given, once they are checked, and what stands for the others."""
    return {name: default for name, (_, default) in _FACTS.items()} | check_facts(dict(facts or {}))

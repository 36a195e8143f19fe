"""The facts of a model card: their types and defaults, and how they are read from YAML and checked."""

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ..utils.words import did_you_mean
from .licenses import license_problem

__all__ = ['CardError', 'CardFacts', 'check_facts', 'config_folder', 'config_names', 'read_facts']

_EXPECTED = {str: 'a text', float: 'a number', list: 'a list', dict: 'a mapping'}


class CardError(ValueError):
    """Facts that cannot be used for a card; the message lists all that is wrong with them."""


@dataclass
class Dataset:
    """A data set that the network was trained on; `id` is its name on the Hub."""

    name: str
    id: str | None = None


@dataclass
class Paper:
    """A paper that describes the network."""

    title: str
    url: str


@dataclass
class Source:
    """Where results come from."""

    name: str
    url: str


@dataclass
class Result:
    """Figures of the network on one split of a data set; `id` is the data set's name on the Hub."""

    dataset: str
    id: str
    split: str
    metrics: dict[str, float]
    source: Source


@dataclass
class ComparisonRow:
    """A model to compare with; accuracies in percent, parameters in millions."""

    model: str
    params: float
    gmacs: float
    top1: float
    source: str
    top5: float | None = None


@dataclass
class Comparison:
    """A table of models, and the text above it."""

    text: str
    rows: list[ComparisonRow]


@dataclass
class CardFacts:
    """All facts of a card. A card without description, papers or citations gets those of the network's units.

    Attributes:
        weights: Hash of the tensors that the facts describe. `timm-atac card` writes it, and refuses facts that
            describe other weights.
        name: Title of the card, and of its repository if no other is given. None means the architecture, with the tag
            of the config unless the tag stands for other weights.
        base_model: Repository on the Hub of the weights that these were fine-tuned from, OWNER/NAME.
        license: An id of the Hub, such as 'apache-2.0', or 'other' together with `license_name` and `license_link`.
        license_note: A sentence after the licence.
        origin: Address of the project that the weights come from.
        hyperparameters: Lines about the training, by name.
        curve: The training curve: values after each epoch, by name.
        citations: BibTeX entries.
        picture_credit: Where the image in the picture of the gates comes from.
    """

    description: str | None = None
    weights: str | None = None
    name: str | None = None
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_note: str | None = None
    origin: str | None = None
    datasets: list[Dataset] = field(default_factory=list)
    papers: list[Paper] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, list[float]] = field(default_factory=dict)
    comparison: Comparison | None = None
    citations: list[str] = field(default_factory=list)
    picture_credit: str | None = None


def config_folder(name: str) -> Path | None:
    """Return the folder of `hub_configs` that has `config.json` and `card.yaml` of a tag, None if there is none.

    Args:
        name: ARCH.TAG.
    """
    folders = [root / name for root in _config_roots()]
    return next((folder for folder in folders if (folder / 'card.yaml').is_file()), None)


def config_names() -> list[str]:
    """Return each ARCH.TAG that has a folder in `hub_configs`."""
    return sorted({path.parent.name for root in _config_roots() for path in root.glob('*/card.yaml')})


def _config_roots() -> list[Path]:
    package = Path(__file__).parents[1]
    return [root / 'hub_configs' for root in (package, package.parent)]  # in a wheel it is in the package


def read_facts(path: str | Path) -> dict[str, Any]:
    """Read the facts of a card from a YAML file and check them.

    Args:
        path: File with facts as `CardFacts` names them; the file of `hub_configs` is an example.

    Returns:
        The facts that the file gives, by name.

    Raises:
        CardError: The file is not YAML, or facts are unknown, incomplete or of the wrong type.
        OSError: The file cannot be read.
    """
    try:
        facts = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
        check_facts(facts)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CardError(f'{path} is not YAML: {error}') from None
    except CardError as error:
        raise CardError(f'{path}: {error}') from None
    return facts


def check_facts(facts: Any) -> CardFacts:
    """Check facts and add the defaults of those that are missing or None.

    Args:
        facts: A dictionary as `read_facts` returns it.

    Raises:
        CardError: Facts are unknown, incomplete or of the wrong type; the message lists them all.
    """
    errors: list[str] = []
    checked = _convert(facts, CardFacts, 'facts', errors)
    if not errors and (problem := license_problem(checked.license, checked.license_name)):
        errors.append(problem)
    if errors:
        raise CardError(f'{"; ".join(errors)}.')
    return checked


def _convert(value: Any, kind: Any, path: str, errors: list[str]) -> Any:
    """Return a value as `kind`, with dataclasses in place of dictionaries; append what is wrong to `errors`."""
    if type(None) in get_args(kind):  # optional: `_convert_fields` leaves None out
        kind = get_args(kind)[0]
    base = dict if is_dataclass(kind) else get_origin(kind) or kind
    if kind is not Any and not isinstance(value, (int, float) if base is float else base):
        errors.append(f'{path} is {value!r}, expected {_EXPECTED[base]}')
    elif is_dataclass(kind):
        return _convert_fields(value, kind, path, errors)
    elif base is list:
        return [_convert(entry, get_args(kind)[0], f'{path}[{i}]', errors) for i, entry in enumerate(value)]
    elif base is dict:
        return {name: _convert(entry, get_args(kind)[1], f'{path}.{name}', errors) for name, entry in value.items()}
    return value


def _convert_fields(values: dict[str, Any], kind: Any, path: str, errors: list[str]) -> Any:
    known = {part.name: part for part in fields(kind)}
    given = {name: value for name, value in values.items() if value is not None}
    unknown = [str(name) for name in given if name not in known]
    required = [part.name for part in known.values() if part.default is part.default_factory is MISSING]
    missing = [name for name in required if name not in given]
    if unknown:
        names = [f'{name} ({hint})' if (hint := did_you_mean(name, known)) else name for name in unknown]
        errors.append(f'unknown {", ".join(names)} in {path}, expected {", ".join(known)}')
    if missing:
        errors.append(f'{path} has no {", ".join(missing)}: {values!r}')
    path = '' if kind is CardFacts else f'{path}.'
    converted = {
        name: _convert(given[name], part.type, f'{path}{name}', errors) for name, part in known.items() if name in given
    }
    return None if missing else kind(**converted)

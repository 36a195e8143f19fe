"""Model cards: the facts of a YAML file and the figures of the code, in timm's usual sections."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .profile import profile
from .weights.folder import create_from_config

__all__ = ['REPO', 'CardError', 'config_folder', 'name_of', 'read_facts', 'render']

REPO = 'OWNER/NAME'
"""Stands for the repository in a card until it is pushed to one."""

_TEMPLATE = Path(__file__).with_name('card.md.jinja')
_CITATION = """\
@inproceedings{dai2020attention,
  title     = {Attention as Activation},
  author    = {Dai, Yimian and Oehmcke, Stefan and Gieseke, Fabian and Wu, Yiquan and Barnard, Kobus},
  booktitle = {International Conference on Pattern Recognition (ICPR)},
  year      = {2020}
}"""

# name of a fact -> what it is when nobody says
_FACTS: dict[str, Any] = {
    'description': 'A network with attentional activations (ATAC).',
    'license': None,
    'license_name': None,
    'license_link': None,
    'license_note': None,
    'origin': None,
    'datasets': [],
    'papers': [{'title': 'Attention as Activation', 'url': 'https://arxiv.org/abs/2007.07729'}],
    'results': [],
    'hyperparameters': {},
    'comparison': None,
    'citations': [_CITATION],
    'picture_credit': None,
}

# what the entries of a fact have
_PARTS = {
    'datasets': ('name',),
    'papers': ('title', 'url'),
    'results': ('dataset', 'id', 'split', 'metrics', 'source'),
    'comparison': ('text', 'rows'),
}


class CardError(ValueError):
    """Facts that make no card."""


def config_folder(name: str) -> Path | None:
    """The folder of `hub_configs` with `config.json` and `card.yaml` of a tag, None where there is none.

    Args:
        name: ARCH.TAG.
    """
    here = Path(__file__).parent
    # in a wheel they are inside of the package
    found = (root / 'hub_configs' / name for root in (here, here.parent))
    return next((folder for folder in found if (folder / 'card.yaml').is_file()), None)


def name_of(config: Mapping[str, Any]) -> str:
    """ARCH.TAG of a `config.json`, ARCH where it has no tag."""
    tag = config.get('pretrained_cfg', {}).get('tag')
    return f'{config["architecture"]}.{tag}' if tag else config['architecture']


def read_facts(path: str | Path) -> dict[str, Any]:
    """The facts of a card.

    Args:
        path: YAML file, as in `hub_configs`. Facts are 'description', 'license' (an id of the Hub's, 'other' with
            'license_name' and 'license_link'), 'license_note', 'origin', 'datasets' ('name', 'id' on the Hub), 'papers'
            ('title', 'url'), 'results' ('dataset', 'id', 'split', 'metrics', 'source' with 'name' and 'url'),
            'hyperparameters', 'comparison' ('text', 'rows'), 'citations', 'picture_credit'.

    Raises:
        CardError: It is not YAML, or has other entries.
        OSError: It cannot be read.
    """
    try:
        facts = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CardError(f'{path} is not YAML: {error}') from None
    unknown = [key for key in facts if key not in _FACTS] if isinstance(facts, dict) else [type(facts).__name__]
    if not unknown:
        unknown = [
            f'{key} without {part}' for key, parts in _PARTS.items() for part in parts if not _has(facts, key, part)
        ]
    if unknown:
        found = ', '.join(map(str, unknown))
        raise CardError(f'{path}: {found} is no fact of a card; expected {", ".join(_FACTS)}, as in hub_configs.')
    return facts


def _has(facts: Mapping[str, Any], key: str, part: str) -> bool:
    value = facts.get(key) or []
    entries = value if isinstance(value, list) else [value]
    return all(isinstance(entry, dict) and part in entry for entry in entries)


def render(
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    picture: str | None = None,
    repo: str = REPO,
) -> str:
    """A model card in Markdown, front matter included.

    Args:
        config: `config.json` of the network.
        facts: As `read_facts` has them, None where there are none.
        picture: Path of the picture of the gates in the repository, None for a card without.
        repo: Repository that the code in the card loads, OWNER/NAME.

    Raises:
        CardError: A fact is not of its form.
    """
    facts = {**_FACTS, **(facts or {})}
    model = create_from_config(config, device='meta')
    stats = profile(model)
    cfg = {'crop_pct': 1.0, 'interpolation': 'bicubic', **config['pretrained_cfg']}
    try:
        card = ModelCard.from_template(
            _card_data(name_of(config), facts),
            template_path=str(_TEMPLATE),
            name=name_of(config),
            facts=facts,
            license=_license(facts),  # goes over the front matter's
            picture=picture,
            repo=repo,
            stats=stats,
            cfg=cfg,
            gmacs=f'{stats.gmacs:.2f}' if stats.gmacs >= 0.1 else f'{stats.gmacs:.4f}',
            resize=math.floor(stats.input_size[1] / cfg['crop_pct']),
            mean=_numbers(cfg['mean']),
            std=_numbers(cfg['std']),
            mode='L' if stats.input_size[0] == 1 else 'RGB',
            num_classes=config['num_classes'],
            embedding=model.head_hidden_size,
            features=_feature_shapes(config, stats.input_size),
        )
    except (KeyError, TypeError, AttributeError, jinja2.TemplateError) as error:
        raise CardError(
            f'The facts of {name_of(config)} are not of the form that `read_facts` describes: {error}'
        ) from error
    return str(card).rstrip() + '\n'


def _card_data(name: str, facts: Mapping[str, Any]) -> ModelCardData:
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=result['id'],
            dataset_name=result['dataset'],
            dataset_split=result['split'],
            metric_type='accuracy',
            metric_name=metric,
            metric_value=value,
            source_name=result['source']['name'],
            source_url=result['source']['url'],
        )
        for result in facts['results']
        for metric, value in result['metrics'].items()
    ]
    optional = {key: facts[key] for key in ('license', 'license_name', 'license_link') if facts[key]}
    datasets = [dataset['id'] for dataset in facts['datasets'] if 'id' in dataset]
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'transformers', 'timm_atac', 'atac'],
        datasets=datasets or None,
        model_name=name,
        eval_results=results or None,
        **optional,
    )


def _license(facts: Mapping[str, Any]) -> str:
    name = facts['license_name'] or facts['license'] or 'not stated'
    linked = f'[{name}]({facts["license_link"]})' if facts['license_link'] else name
    return f'{linked}. {facts["license_note"]}' if facts['license_note'] else linked


def _numbers(values: Any) -> str:
    return ', '.join(f'{value:.4f}' for value in values)


def _feature_shapes(config: Mapping[str, Any], input_size: tuple[int, int, int]) -> list[str]:
    """Of the feature maps of one image, of what `features_only` gives."""
    import torch

    model = create_from_config(config, features_only=True, device='meta').eval()
    with torch.inference_mode():
        return [str(tuple(feature.shape)) for feature in model(torch.empty(1, *input_size, device='meta'))]

"""Renders a model card with timm's usual sections from facts and from what the code says about the network."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import PretrainedCfg

from ..weights.folder import create_from_config
from .facts import CardFacts, Paper, check_facts
from .profile import profile
from .units import ATTENTION_AS_ACTIVATION, Unit, units_of

__all__ = ['REPO', 'full_name', 'render', 'weights_of']

REPO = 'OWNER/NAME'
"""The placeholder for the repository in a card that has not been pushed."""

_USUAL = {'in_chans': 3, 'global_pool': 'avg'}  # arguments that timm's save_for_hf writes for every model
_TEMPLATE = Path(__file__).with_name('card.md.jinja')


def full_name(config: Mapping[str, Any]) -> str:
    """Return ARCH.TAG of a `config.json`, or ARCH if it has no tag."""
    tag = config.get('pretrained_cfg', {}).get('tag')
    return f'{config["architecture"]}.{tag}' if tag else config['architecture']


def weights_of(card: str) -> str | None:
    """Return the hash of the weights that a card describes, None if it does not say."""
    found = re.search(r'^<!-- timm_atac: weights (\w+) -->$', card, re.MULTILINE)
    return found[1] if found else None


def render(
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    picture: str | None = None,
    curve: str | None = None,
    repo: str = REPO,
    name: str | None = None,
) -> str:
    """Return a model card in Markdown with its YAML front matter.

    Args:
        config: `config.json` of the network.
        facts: As `timm_atac.hub.facts.read_facts` returns them. None means that there are none.
        picture: Path in the repository of the picture of the gates. None leaves the picture out.
        curve: Path in the repository of the picture of the training curve. None leaves the picture out.
        repo: Repository that the code in the card loads, OWNER/NAME.
        name: Title. None means `full_name(config)`.

    Raises:
        CardError: Facts are unknown, incomplete or of the wrong type.
    """
    checked = check_facts(dict(facts or {}))
    name = name or full_name(config)
    model = create_from_config(config, device='meta')
    units = units_of(model)
    is_ours = bool(units) or type(model).__module__.startswith('timm_atac.')
    _add_defaults(checked, config['architecture'], units, is_ours)
    stats = profile(model)
    channels, *sides = stats.input_size
    cfg = {**PretrainedCfg().to_dict(), **config['pretrained_cfg']}
    height, width = (math.floor(side / cfg['crop_pct']) for side in sides)
    card = ModelCard.from_template(
        _front_matter(
            name, checked, model.num_classes, channels, [*['timm_atac'] * is_ours, *(unit.tag for unit in units)]
        ),
        template_path=str(_TEMPLATE),
        name=name,
        facts=checked,
        license=_license(checked),  # from_template would pass the front matter's
        architecture=config['architecture'],
        arguments={name: value for name, value in config.get('model_args', {}).items() if _USUAL.get(name) != value},
        picture=picture,
        curve=curve,
        package='timm_atac' if is_ours else 'timm',
        repo=repo,
        stats=stats,
        cfg=cfg,
        gmacs=f'{stats.gmacs:.2f}' if stats.gmacs >= 0.1 else f'{stats.gmacs:.4f}',
        size=' x '.join(map(str, sides)),
        resize=f'the shorter side to {height}' if height == width else f'to cover {height} x {width}',
        mode={1: 'L', 3: 'RGB'}.get(channels),
        num_classes=model.num_classes,
        embedding=model.head_hidden_size,
        features=_feature_shapes(config, stats.input_size),
    )
    return str(card).rstrip() + '\n'


def _add_defaults(facts: CardFacts, architecture: str, units: list[Unit], is_ours: bool) -> None:
    """Add the description, papers and citations that follow from the architecture and its units."""
    labels = ' and '.join(unit.label for unit in units)
    if not facts.description:
        facts.description = (
            f'A network of the architecture `{architecture}`{f" with {labels} units" if labels else ""}.'
        )
        if not (facts.results or facts.datasets or facts.hyperparameters):
            facts.description += ' How it was trained is not recorded.'
    # one paper describes several units; ours without units are the hosts of the paper's networks
    cited = {unit.title: unit for unit in units or [ATTENTION_AS_ACTIVATION] * is_ours}
    facts.papers = facts.papers or [Paper(unit.title, unit.url) for unit in cited.values()]
    facts.citations = facts.citations or [unit.citation for unit in cited.values()]


def _front_matter(name: str, facts: CardFacts, num_classes: int, channels: int, tags: list[str]) -> ModelCardData:
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=result.id,
            dataset_name=result.dataset,
            dataset_split=result.split,
            metric_type='accuracy',
            metric_name=metric,
            metric_value=value,
            source_name=result.source.name,
            source_url=result.source.url,
        )
        for result in facts.results
        for metric, value in result.metrics.items()
    ]
    task = 'image-classification' if num_classes else 'image-feature-extraction'
    return ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        tags=[task, 'timm', *(['transformers'] if channels == 3 else []), *tags],
        base_model=facts.base_model or None,
        datasets=[dataset.id for dataset in facts.datasets if dataset.id] or None,
        model_name=name if results else None,
        eval_results=results or None,
        license=facts.license or None,
        license_name=facts.license_name or None,
        license_link=facts.license_link or None,
    )


def _license(facts: CardFacts) -> str:
    name = facts.license_name or facts.license or 'not stated'
    linked = f'[{name}]({facts.license_link})' if facts.license_link else name
    return f'{linked}. {facts.license_note}' if facts.license_note else linked


def _feature_shapes(config: Mapping[str, Any], input_size: tuple[int, int, int]) -> list[str]:
    """Return the shapes of the feature maps of one image, [] for a network without `features_only`."""
    try:
        model = create_from_config(config, features_only=True, device='meta').eval()
        with torch.inference_mode():
            return [str(tuple(feature.shape)) for feature in model(torch.empty(1, *input_size, device='meta'))]
    except Exception:  # each architecture raises an error of its own
        return []

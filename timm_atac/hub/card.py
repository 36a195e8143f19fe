"""Model cards: facts, and the figures of the code, in timm's usual sections."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import PretrainedCfg

from ..weights.folder import create_from_config
from .facts import CardError, with_defaults
from .profile import profile

__all__ = ['REPO', 'name_of', 'render']

REPO = 'OWNER/NAME'
"""Stands for the repository in a card until it is pushed to one."""

_TEMPLATE = Path(__file__).with_name('card.md.jinja')


def name_of(config: Mapping[str, Any]) -> str:
    """ARCH.TAG of a `config.json`, ARCH where it has no tag."""
    tag = config.get('pretrained_cfg', {}).get('tag')
    return f'{config["architecture"]}.{tag}' if tag else config['architecture']


def render(
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    picture: str | None = None,
    repo: str = REPO,
) -> str:
    """A model card in Markdown, front matter included.

    Args:
        config: `config.json` of the network.
        facts: As `timm_atac.hub.facts.read_facts` has them, None where there are none.
        picture: Path of the picture of the gates in the repository, None for a card without.
        repo: Repository that the code in the card loads, OWNER/NAME.

    Raises:
        CardError: A fact is not of its form.
    """
    facts = with_defaults(facts)
    model = create_from_config(config, device='meta')
    stats = profile(model)
    cfg = {**PretrainedCfg().to_dict(), **config['pretrained_cfg']}
    size = f'{stats.input_size[1]} x {stats.input_size[2]}'
    height, width = (math.floor(side / cfg['crop_pct']) for side in stats.input_size[1:])
    resize = f'the shorter side to {height}' if height == width else f'to cover {height} x {width}'
    try:
        card = ModelCard.from_template(
            _card_data(name_of(config), facts, model.num_classes, stats.input_size[0]),
            template_path=str(_TEMPLATE),
            name=name_of(config),
            facts=facts,
            license=_license(facts),  # goes over the front matter's
            architecture=config['architecture'],
            arguments=config.get('model_args', {}),
            picture=picture,
            repo=repo,
            stats=stats,
            cfg=cfg,
            gmacs=f'{stats.gmacs:.2f}' if stats.gmacs >= 0.1 else f'{stats.gmacs:.4f}',
            size=size,
            resize=resize,
            mean=_numbers(cfg['mean']),
            std=_numbers(cfg['std']),
            mode={1: 'L', 3: 'RGB'}.get(stats.input_size[0]),
            num_classes=model.num_classes,
            embedding=model.head_hidden_size,
            features=_feature_shapes(config, stats.input_size),
        )
    except jinja2.TemplateError as error:
        raise CardError(f'The facts of {name_of(config)} are not of the form of `read_facts`: {error}') from error
    return str(card).rstrip() + '\n'


def _card_data(name: str, facts: Mapping[str, Any], num_classes: int, channels: int) -> ModelCardData:
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
    datasets = [dataset['id'] for dataset in facts['datasets'] if dataset.get('id')]
    task = 'image-classification' if num_classes else 'image-feature-extraction'
    return ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        tags=[task, 'timm', *(['transformers'] if channels == 3 else []), 'timm_atac', 'atac'],
        datasets=datasets or None,
        model_name=name if results else None,
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
    """Of the feature maps of one image, of what `features_only` gives; none for the many networks that have none."""
    try:
        model = create_from_config(config, features_only=True, device='meta').eval()
        with torch.inference_mode():
            return [str(tuple(feature.shape)) for feature in model(torch.empty(1, *input_size, device='meta'))]
    except Exception:  # each architecture has an error of its own
        return []

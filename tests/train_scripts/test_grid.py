"""train_scripts/ablations/grid.py"""

from typing import Any

import pytest
import torch

from timm_atac import ATAC

grid = pytest.importorskip('ablations.grid', reason="needs the packages of the extra 'ablation'")
sample_rows = pytest.importorskip('sample_rows')
AUTHORS, RUN = sample_rows.AUTHORS, sample_rows.RUN


@pytest.mark.parametrize('name', [*grid.ACTIVATIONS, 'hard_swish'])
def test_models(name) -> None:
    run = AUTHORS._replace(activation=name, blocks=2)
    model = grid.create_model(run, 100, 3, (0.5,) * 3, (0.5,) * 3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(
    'act_stages, expected',
    [
        (1, {'act'}),
        (2, {'act', 'stages.2'}),
        (3, {'act', 'stages.2', 'stages.1'}),
        (4, {'act', 'stages.2', 'stages.1', 'stages.0'}),
    ],
)
def test_act_stages_count_from_the_last(act_stages, expected) -> None:
    """They do so in `--act-layers` of the authors' train_cifar.py."""
    model = grid.create_model(RUN._replace(act_stages=act_stages), 10, 1, (0.0,), (1.0,))
    assert {name[:8] for name, m in model.named_modules() if isinstance(m, ATAC)} == expected


def test_names_are_unique() -> None:
    changed = dict(
        dataset='cifar10',
        activation='nin',
        blocks=2,
        act_stages=2,
        seed=4,
        epochs=2,
        batch_size=9,
        lr=0.3,
        weight_decay=0.0,
        size=9,
        augment=False,
        sched='cosine',
        precision='bfloat16',
        processes=2,
        held_out=5,
    )
    assert changed.keys() == set(RUN._fields)
    others: list[dict[str, Any]] = [{key: value} for key, value in changed.items()]
    others += [dict(dataset=name) for name in ('/a/x', '/b/x')]
    names = [RUN.name, *(RUN._replace(**other).name for other in others)]
    assert not any('/' in name for name in names)
    assert len(set(names)) == len(names)
    assert AUTHORS.name == 'cifar100_relu_b1_seed0'


def test_recipes_by_name() -> None:
    short = AUTHORS._replace(**grid.RECIPES['short']._asdict())
    assert (AUTHORS.recipe, short.recipe, short._replace(lr=0.3).recipe) == ('authors', 'short', 'authors')
    assert short.changed_settings() == {'recipe': 'short'}
    assert short.name == 'cifar100_relu_b1_seed0_recipe-short'
    assert AUTHORS._replace(lr=0.3).changed_settings() == {'lr': 0.3}
    assert AUTHORS._replace(dataset='digits').changed_settings() == {'recipe': 'authors'}

"""tools/train_options.py: the options of timm's train.py, and the recipes' use of them.

tests/data/train_options.json has the options of several versions of timm. A newer timm is assumed to have the options
of the newest of them. If TIMM_SCRIPTS is a folder with timm's scripts, the recipes are also checked with its train.py.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
from recipes import RECIPES, TEXTS
from train_options import Options, dump, known_versions, load_options, nearest, problems, read_options, version_of


@pytest.mark.parametrize('version', known_versions())
@pytest.mark.parametrize('name', RECIPES)
def test_recipe_fits_every_version(name: str, version: str) -> None:
    assert problems(RECIPES[name], load_options(version)) == []


@pytest.mark.parametrize(
    ('wrong', 'problem'),
    [
        ({'learning_rate': 0.1}, 'learning_rate: train.py has no such option'),
        ({'weight_decay': '1e-4'}, "weight_decay: '1e-4': expected float"),
        ({'lr': True}, 'lr: True: expected float'),
        ({'epochs': 1.5}, 'epochs: 1.5: expected int'),
        ({'epochs': None}, 'epochs: None: expected int'),
        ({'opt': ['sgd']}, "opt: ['sgd']: expected str"),
        ({'amp': 'yes'}, "amp: 'yes': expected true or false"),
        ({'decay_milestones': '300,350'}, "decay_milestones: '300,350': expected a list of one or more, each int"),
        ({'input_size': [32, 32]}, 'input_size: [32, 32]: expected a list of 3, each int'),
        ({'mean': []}, 'mean: []: expected a list of one or more, each float'),
        ({'opt_kwargs': 'nesterov=True'}, "opt_kwargs: 'nesterov=True': expected a mapping"),
        ({'naflex_loss_scale': 'log'}, "naflex_loss_scale: 'log': expected one of ['none', 'sqrt', 'linear']"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else '',
)
def test_wrong_recipe(wrong: dict[str, Any], problem: str) -> None:
    right = {'lr': 1, 'epochs': 5, 'mean': [0.5], 'drop_path': None, 'amp': True, 'opt_kwargs': {}}
    assert problems({**right, **wrong}, load_options('1.0.29.dev0')) == [problem]


def test_options_differ_between_versions() -> None:
    old, new = load_options('1.0.21'), load_options('1.0.29.dev0')
    assert problems({'val_interval': 2}, new) == []
    assert problems({'val_interval': 2}, old) == ['val_interval: train.py has no such option']
    assert problems({'amp_impl': 'apex'}, old) == [] != problems({'amp_impl': 'apex'}, new)


def test_nearest_version() -> None:
    assert nearest('1.0.22') == '1.0.22'
    assert nearest('1.0.31') == nearest('2.0') == known_versions()[-1]
    with pytest.raises(ValueError, match=r'timm 1\.0\.20: train_options\.json has 1\.0\.21, .*; add its train\.py'):
        nearest('1.0.20')


def test_data_round_trip() -> None:
    written = dump({version: load_options(version) for version in known_versions()})
    assert written == (Path(__file__).parents[1] / 'data' / 'train_options.json').read_text()


@pytest.mark.parametrize('name', RECIPES)
def test_commands_in_comments(name: str) -> None:
    head = '\n'.join(line for line in TEXTS[name].splitlines() if line.startswith('#'))
    elsewhere = {'nproc_per_node', 'checkpoint'}  # of torchrun and validate.py
    named = {option.replace('-', '_') for option in re.findall(r'--([a-z][a-z-]*)', head)} - elsewhere
    assert 'config' in named
    assert named - {'config'} <= load_options('1.0.21').keys() & load_options(known_versions()[-1]).keys()
    assert f'--config train_scripts/{name}.yaml' in head


@pytest.fixture(scope='module')
def real() -> tuple[str, Options]:
    """The version and the options of the train.py in TIMM_SCRIPTS."""
    folder = os.environ.get('TIMM_SCRIPTS')
    if not folder:
        pytest.skip("TIMM_SCRIPTS is not set to a folder with timm's scripts")
    has_timm = (Path(folder) / 'timm' / 'version.py').exists()
    return version_of(Path(folder)) if has_timm else timm.__version__, read_options(Path(folder))


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_fits_real_train_py(name: str, real: tuple[str, Options]) -> None:
    assert problems(RECIPES[name], real[1]) == []


def test_data_agrees_with_real_train_py(real: tuple[str, Options]) -> None:
    version, options = real
    if version not in known_versions():
        pytest.skip(f'train_options.json has no {version}')
    assert options == load_options(version)

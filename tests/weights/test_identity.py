"""timm_atac/weights/identity.py: weights are known by their tensors, not by a tag."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm_versions import needs_safe_folders

import timm_atac
from timm_atac.weights.convert import to_arrays
from timm_atac.weights.folder import identify_folder, read_config
from timm_atac.weights.identity import Identity, identify, record_source, remove_claims, tensor_hash
from timm_atac.weights.pretrained import git_blob_id
from timm_atac.weights.published import PUBLISHED, Published

NAME = 'atac_resnet50.open_atac_in1k'
OF_WEIGHTS = {'tag', 'license', 'description', 'origin_url', 'notes'}


@pytest.fixture
def config() -> dict[str, Any]:
    return read_config(Path(__file__).parents[2] / 'hub_configs' / NAME)


def test_hash() -> None:
    tensors = {'a': torch.arange(6.0).view(2, 3), 'n': torch.tensor(3)}
    first = tensor_hash(tensors)
    assert len(first) == 64
    same = [
        dict(reversed(tensors.items())),
        {**tensors, 'bn.num_batches_tracked': torch.tensor(7)},
        {**tensors, 'a': tensors['a'].half()},
        {**tensors, 'a': tensors['a'].t().contiguous().t()},
    ]
    assert [tensor_hash(other) for other in same] == [first] * 4
    changed = [
        {**tensors, 'a': tensors['a'] + 1e-3},
        {**tensors, 'a': tensors['a'].view(3, 2)},
        {'b': tensors['a'], 'n': tensors['n']},
        {'a': tensors['a']},
        {**tensors, 'n': torch.tensor(4)},
    ]
    assert len({first, *map(tensor_hash, changed)}) == 6


def test_published_by_their_hash(config, monkeypatch) -> None:
    monkeypatch.setitem(PUBLISHED, NAME, PUBLISHED[NAME]._replace(tensors='ab'))
    assert identify(config, 'ab') == Identity('ab', NAME, published=NAME)
    assert identify(config, 'cd') == Identity('cd', 'atac_resnet50')
    assert remove_claims(config, identify(config, 'ab')) == config


def test_published_by_their_record(config) -> None:
    """The hash of the published file is not known, but the loader that checked the file recorded it."""
    model: Any = timm.create_model('atac_resnet8_cifar')
    record_source(model, NAME, tensor_hash(model.state_dict()))
    assert model.default_cfg is model.pretrained_cfg
    weights = tensor_hash(model.state_dict())
    config['pretrained_cfg']['notes'] = list(model.pretrained_cfg['notes'])  # as JSON has it
    assert identify(config, weights) == Identity(weights, NAME, published=NAME)
    assert identify(config, 'cd') == Identity('cd', 'atac_resnet50', base=NAME)
    assert 'notes' in remove_claims(config, identify(config, 'cd'))['pretrained_cfg']


@pytest.mark.parametrize(
    'notes', [None, [], 'x', ['Loaded from nowhere (sha256:12)'], [3], [f'Loaded from x ({NAME})']]
)
def test_other_notes(notes, config) -> None:
    config['pretrained_cfg']['notes'] = notes
    assert identify(config, 'cd') == Identity('cd', 'atac_resnet50')


def test_a_record_of_weights_that_are_not_published(config) -> None:
    config['pretrained_cfg']['notes'] = [f'Loaded from mine.best (sha256:{"a" * 64})']
    assert identify(config, 'a' * 64) == Identity('a' * 64, 'atac_resnet50')


def test_other_weights_lose_the_claims_of_a_tag(config) -> None:
    cfg = remove_claims(config, identify(config, 'cd'))['pretrained_cfg']
    assert not OF_WEIGHTS & set(cfg)
    assert cfg['paper_ids'] == 'arXiv:2007.07729' and cfg['mean'] == config['pretrained_cfg']['mean']
    assert config['pretrained_cfg']['tag'] == 'open_atac_in1k'  # the argument does not change


def test_what_a_user_has_set_stays(config) -> None:
    own = {'tag': 'pets', 'license': 'mit', 'description': 'My pets.'}
    config['pretrained_cfg'] |= own
    identity = identify(config, 'cd')
    assert identity.name == 'atac_resnet50.pets'
    assert {key: remove_claims(config, identity)['pretrained_cfg'].get(key) for key in own} == own
    assert 'origin_url' not in remove_claims(config, identity)['pretrained_cfg']


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, kwargs, expected',
    [
        ('atac_resnet18', {}, 'atac_resnet18'),
        ('atac_resnet18', {'pretrained_cfg_overlay': {'tag': 'flowers'}}, 'atac_resnet18.flowers'),
        ('atac_resnet8_cifar.cifar10', {}, 'atac_resnet8_cifar'),
        ('resnet18.a1_in1k', {'act_layer': 'atac'}, 'resnet18'),
        ('atac_host', {'host': 'resnet18.a2_in1k'}, 'atac_host'),
        ('atac_host', {'host': {'model_name': 'resnet18.a2_in1k', 'drop_rate': 0.1}}, 'atac_host'),
        ('atac_host', {'host': 'resnet18', 'pretrained_cfg_overlay': {'tag': 'flowers'}}, 'atac_host.flowers'),
    ],
)
def test_names_of_untrained_networks(name, kwargs, expected, tmp_path) -> None:
    """timm gives them the default tag of the architecture, or of the host."""
    model: Any = timm.create_model(name, **kwargs)
    timm_atac.save_for_hf(model, tmp_path, model_args={key: v for key, v in kwargs.items() if 'cfg' not in key})
    config = read_config(tmp_path)
    assert identify(config, 'cd').name == expected
    assert config['pretrained_cfg'].get('tag') == (expected.partition('.')[2] or None)
    assert 'origin_url' not in config['pretrained_cfg']


@pytest.mark.slow
def test_a_replaced_network_that_is_replaced_again(tmp_path) -> None:
    model: Any = timm_atac.replace_activations(timm.create_model('resnet18.a1_in1k'), where='layer4.*')
    model = timm_atac.replace_activations(model, where='layer3.*')
    timm_atac.save_for_hf(model, tmp_path, model_args=model.replaced_activations.model_args)
    assert identify(read_config(tmp_path), 'cd').name == 'atac_host'


@needs_safe_folders
def test_loading_the_published_file_is_recorded(monkeypatch, tmp_path) -> None:
    """It is forgotten in a model that is created from the saved config without the weights."""
    name = 'atac_resnet8_cifar.cifar10'
    torch.manual_seed(0)
    source: Any = timm.create_model('atac_resnet8_cifar')
    path = tmp_path / 'net.params'
    timm_atac.write_params(path, to_arrays(source))
    monkeypatch.setitem(PUBLISHED, name, Published('', git_blob_id(path)))
    overlay = {'file': str(path)}
    model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(model, str(tmp_path / 'same'), safe_serialization=True)
    weights = tensor_hash(source.state_dict())
    assert identify(read_config(tmp_path / 'same'), weights).published == name
    tuned: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1)
    timm.models.save_for_hf(tuned, str(tmp_path / 'tuned'), safe_serialization=True)
    assert identify_folder(tmp_path / 'tuned').base == name
    again: Any = timm.create_model(f'local-dir:{tmp_path / "tuned"}', pretrained=True)
    assert again.pretrained_cfg['notes'] == [f'Loaded from {name} (sha256:{weights})']
    untrained: Any = timm.create_model(f'local-dir:{tmp_path / "tuned"}')
    assert untrained.pretrained_cfg['notes'] is None and untrained.default_cfg is untrained.pretrained_cfg

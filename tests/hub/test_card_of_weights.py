"""A card says only what is known of the weights in its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_atac.cli import main
from timm_atac.hub import export as export_module
from timm_atac.hub.card import render
from timm_atac.hub.export import ASKED, export, write_card
from timm_atac.hub.facts import CardError, config_folder, read_facts
from timm_atac.hub.push import check_folder
from timm_atac.weights.folder import FolderError, read_config
from timm_atac.weights.identity import record_source, tensor_hash
from timm_atac.weights.published import PUBLISHED, Published

NAME = 'atac_resnet8_cifar.cifar10'
FACTS = {
    'description': 'The published network.',
    'license': 'mit',
    'license_note': 'Ask them first.',
    'origin': 'https://example.org/net',
    'datasets': [{'name': 'CIFAR-10', 'id': 'cifar10'}],
    'results': [
        {
            'dataset': 'CIFAR-10',
            'id': 'cifar10',
            'split': 'test',
            'metrics': {'top-1 accuracy': 87.65},
            'source': {'name': 'a log', 'url': 'https://example.org/log'},
        }
    ],
    'hyperparameters': {'epochs': 123},
}
CLAIMS = ('The published network', '87.65', 'CIFAR-10', 'license: mit', '123', 'example.org', 'model-index', 'cifar10')


def create(seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model('atac_resnet8_cifar', **kwargs)


@pytest.fixture(autouse=True)
def published(monkeypatch) -> None:
    """The weights of seed 0 are published under NAME, with facts."""
    known = Published('https://example.org/net.params', 'blob', 'trained on CIFAR-10 by someone')
    monkeypatch.setitem(PUBLISHED, NAME, known._replace(tensors=tensor_hash(create().state_dict())))
    monkeypatch.setattr(export_module, 'shipped_facts', lambda name: FACTS if name == NAME else {})
    # drawing takes seconds
    monkeypatch.setattr(export_module, '_draw', lambda model, path, image: path.write_bytes(b'a picture'))


def card_of(model: Any, folder: Path) -> str:
    """Save as a user of timm does, and return the card."""
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    assert main(['card', str(folder)]) == 0
    return (folder / 'README.md').read_text()


@pytest.mark.slow
def test_published_weights(tmp_path) -> None:
    card = card_of(create(), tmp_path)
    assert f'# Model card for {NAME}\n' in card
    assert all(claim in card for claim in CLAIMS)
    assert check_folder(tmp_path, 'me/net').name == NAME


@pytest.mark.slow
@pytest.mark.parametrize('change', ['random', 'another head', 'one value'])
def test_other_weights(change, tmp_path, capsys) -> None:
    model = create(seed=change == 'random', num_classes=3 if change == 'another head' else 10)
    if change == 'one value':
        model.fc.bias.data[0] += 1e-3
    card = card_of(model, tmp_path)
    assert '# Model card for atac_resnet8_cifar\n' in card
    assert not [claim for claim in CLAIMS if claim in card]
    assert '- **License:** not stated\n' in card and 'How it was trained is not recorded.' in card
    assert 'Not known of these weights: license, datasets, results, hyperparameters. Add' in capsys.readouterr().out
    cfg = read_config(tmp_path)['pretrained_cfg']
    assert 'tag' not in cfg
    assert check_folder(tmp_path, 'me/net').name == 'atac_resnet8_cifar'


@pytest.mark.slow
def test_fine_tuned_weights(tmp_path) -> None:
    model = create()
    record_source(model, NAME, tensor_hash(model.state_dict()))
    model.reset_classifier(3)
    card = card_of(model, tmp_path)
    assert '# Model card for atac_resnet8_cifar\n' in card
    assert f'Fine-tuned from the weights `{NAME}`, trained on CIFAR-10 by someone. How they were changed' in card
    assert '- **License:** not stated. Of the weights that it was fine-tuned from: Ask them first.\n' in card
    assert '87.65' not in card and 'model-index' not in card


@pytest.mark.slow
def test_card_yaml_asks(tmp_path) -> None:
    """The questions are comments. Once they are answered, they are no longer asked."""
    card_of(create(seed=1), tmp_path)
    path = tmp_path / 'card.yaml'
    lines = [line.removeprefix('# ') for line in path.read_text().splitlines() if line.startswith('# ')]
    assert lines[0] == 'Add what you know of these weights, and run `timm-atac card` again:'
    assert [line.partition(':')[0] for line in lines[1:]] == list(ASKED)
    path.write_text(path.read_text() + '\n'.join(lines[1:]))
    assert main(['card', str(tmp_path)]) == 0
    card = (tmp_path / 'README.md').read_text()
    assert '75.3' in card and 'license: apache-2.0' in card and 'My data' in card
    assert '# Add' not in path.read_text() and 'not recorded' not in card


def replace_weights(folder: Path) -> None:
    state_dict = load_file(folder / 'model.safetensors')
    state_dict['fc.bias'] += 1
    save_file(state_dict, folder / 'model.safetensors')


@pytest.mark.slow
def test_facts_of_other_weights(tmp_path) -> None:
    """The folder of a card is written again with other weights, as after more training."""
    folder = tmp_path / 'net'
    export(create(seed=1), folder, {'license': 'mit', 'hyperparameters': {'epochs': 5}})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace_weights(folder)
    with pytest.raises(CardError, match=r'card\.yaml describes other weights .* remove the line `weights`, or remove'):
        write_card(folder)
    with pytest.raises(FolderError, match=r'card\.yaml describes other weights'):
        check_folder(folder, 'me/net')
    assert {n: d for n, d in before.items() if n != 'model.safetensors'} == {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'model.safetensors'
    }
    (folder / 'card.yaml').rename(tmp_path / 'card.yaml')
    with pytest.raises(FolderError, match=r'README\.md describes other weights than model.safetensors: write it again'):
        check_folder(folder, 'me/net')
    with pytest.raises(CardError, match='describes other weights'):
        write_card(folder, read_facts(tmp_path / 'card.yaml'))

    facts = read_facts(tmp_path / 'card.yaml')
    del facts['weights']  # the user says that they hold
    assert write_card(folder, facts) == ['README.md', 'card.yaml']
    assert check_folder(folder, 'me/net').license == 'mit'


@pytest.mark.slow
def test_the_picture_of_other_weights_is_drawn_again(tmp_path) -> None:
    export(create(seed=1), tmp_path / 'net')
    replace_weights(tmp_path / 'net')
    assert 'gates.png' in write_card(tmp_path / 'net', {'license': 'mit'})
    assert 'gates.png' not in write_card(tmp_path / 'net')


@pytest.mark.slow
def test_training_curve(tmp_path) -> None:
    folder = tmp_path / 'net'
    curve = {'training loss': [1.5, 1.0, 0.75], 'test accuracy (%)': [40, 55.5, 60.0]}
    export(create(seed=1), folder, {'license': 'mit', 'curve': curve})
    assert '![The training curve: training loss, test accuracy (%) after each epoch](training.png)' in (
        folder / 'README.md'
    ).read_text(encoding='utf-8')
    with Image.open(folder / 'training.png') as image:
        assert image.format == 'PNG' and image.width > 2 * image.height
    assert read_facts(folder / 'card.yaml')['curve'] == curve
    assert 'training.png' in check_folder(folder, 'me/net').files

    (folder / 'training.png').unlink()
    with pytest.raises(FolderError, match=r'shows training\.png, which is missing; draw it with `timm-atac card'):
        check_folder(folder, 'me/net')
    assert 'training.png' in write_card(folder)
    assert 'training.png' not in write_card(folder, {'license': 'mit'}) and not (folder / 'training.png').exists()
    assert 'training.png' not in (folder / 'README.md').read_text(encoding='utf-8')
    with pytest.raises(CardError, match=r"curve\.loss\[1\] is 'much', expected a number"):
        write_card(folder, {'curve': {'loss': [1.0, 'much']}})


@pytest.mark.slow
def test_push_refuses_the_card_of_a_tag(tmp_path) -> None:
    """`timm-atac card TAG > README.md` beside weights that are not the published ones."""
    tag = 'atac_resnet50.open_atac_in1k'
    folder = config_folder(tag)
    assert folder is not None
    card = render(read_config(folder), read_facts(folder / 'card.yaml'))
    timm.models.save_for_hf(create(seed=1), str(tmp_path), safe_serialization=True)
    (tmp_path / 'README.md').write_text(card)
    with pytest.raises(
        FolderError, match=rf'README\.md describes other weights than model.safetensors, those of {tag}'
    ):
        check_folder(tmp_path, 'me/net')
    (tmp_path / 'README.md').write_text('---\nlicense: mit\n---\nWritten by hand.\n')
    assert check_folder(tmp_path, 'me/net').license == 'mit'


@pytest.mark.slow
def test_a_name_of_ones_own(tmp_path) -> None:
    card = None
    export(create(seed=1), tmp_path / 'net', {'name': 'tiny-flowers'})
    card = ModelCard.load(tmp_path / 'net' / 'README.md')
    assert '# Model card for tiny-flowers' in card.text
    assert check_folder(tmp_path / 'net', 'me/net').name == 'tiny-flowers'
    with pytest.raises(CardError, match=f"the name '{NAME}' belongs to published weights, which these are not"):
        export(create(seed=1), tmp_path / 'other', {'name': NAME})
    assert not (tmp_path / 'other').exists()


UNITS: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ('atac_resnet8_cifar', {}, ['atac'], ['2007.07729']),
    ('resnet8_cifar', {}, [], ['2007.07729']),
    ('resnet8_cifar', {'act_layer': 'xunit'}, ['xunit'], ['1711.06445']),
    ('resnet8_cifar', {'act_layer': 'nin', 'attn_layer': 'local_se'}, ['nin', 'local_se'], ['2007.07729']),
]


@pytest.mark.parametrize('name, kwargs, tags, papers', UNITS)
def test_units_give_tags_and_papers(name, kwargs, tags, papers, tmp_path) -> None:
    timm.models.save_for_hf(
        timm.create_model(name, **kwargs), str(tmp_path), safe_serialization=True, model_args=kwargs
    )
    card: Any = ModelCard(render(read_config(tmp_path)))
    assert card.data.tags[3:] == ['timm_atac', *tags]
    assert [paper for paper in ('2007.07729', '1711.06445') if paper in card.text] == papers
    assert card.text.count('@inproceedings') == len(papers)


def test_a_network_of_timm_alone(tmp_path) -> None:
    """Its card does not claim that it needs this package."""
    model: Any = timm.create_model('resnet10t', num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    card: Any = ModelCard(render(read_config(tmp_path)))
    assert 'timm_atac' not in card.data.tags and 'timm_atac' not in card.text and 'Attention as' not in card.text


@pytest.mark.slow
def test_folders_of_timm_load_in_transformers(tmp_path) -> None:
    """`card` and `push` correct `model_args.num_classes`, with which transformers 5 raises a KeyError."""
    pytest.importorskip('transformers')
    from PIL import Image
    from transformers import pipeline

    model = create(seed=1, num_classes=3)
    timm.models.save_for_hf(
        model, str(tmp_path / 'net'), safe_serialization=True, model_args={'num_classes': 3, 'rd_ratio': 0.5}
    )
    written = json.loads((tmp_path / 'net' / 'config.json').read_text())
    assert written['model_args']['num_classes'] == 3
    (tmp_path / 'net' / 'README.md').write_text('---\nlicense: mit\n---\n')
    pushed = json.loads(check_folder(tmp_path / 'net', 'me/net').config)
    assert json.loads((tmp_path / 'net' / 'config.json').read_text()) == written  # a check changes no file
    assert 'num_classes' not in pushed['model_args'] and pushed['num_classes'] == 3
    assert 'config.json' in write_card(tmp_path / 'net')
    assert read_config(tmp_path / 'net') == pushed
    classify = pipeline('image-classification', model=str(tmp_path / 'net'))
    assert len(classify(Image.new('RGB', (40, 50), 'red'), top_k=5)) == 3
    assert yaml.safe_load((tmp_path / 'net' / 'card.yaml').read_text())['weights'] == tensor_hash(model.state_dict())

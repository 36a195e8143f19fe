"""Each card in `hub_configs` is rendered and compared with the code, and the Python blocks in it run."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import forked
import pytest
import timm
import torch
import yaml
from hub_cards import card_errors
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from PIL import Image

from timm_atac.hub.card import full_name, render
from timm_atac.hub.export import export
from timm_atac.hub.facts import CardError, CardFacts, check_facts, config_folder, read_facts
from timm_atac.hub.profile import profile
from timm_atac.hub.push import check_folder
from timm_atac.weights.folder import read_config, save_for_hf
from timm_atac.weights.identity import tensor_hash
from timm_atac.weights.published import PUBLISHED

ROOT = Path(__file__).parents[2]
RESULTS = {'open_atac_in1k': 'results-imagenet.csv', 'cifar10': 'results-cifar10.csv'}  # by tag
TAGS = sorted(path.name for path in (ROOT / 'hub_configs').iterdir())
DIGITS: dict[str, Any] = dict(
    num_classes=10, pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.0,), std=(1.0,), tag='digits')
)


def folder_of(tag: str) -> Path:
    folder = config_folder(tag)
    assert folder is not None
    return folder


def render_tag(tag: str, **kwargs) -> str:
    return render(read_config(folder_of(tag)), read_facts(folder_of(tag) / 'card.yaml'), **kwargs)


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```$', card, re.MULTILINE | re.DOTALL)


def test_all_published_tags_have_a_card() -> None:
    assert TAGS == sorted(PUBLISHED)
    assert config_folder('atac_resnet18.untrained') is None


@pytest.mark.slow
@pytest.mark.parametrize('tag', TAGS)
def test_config_is_what_is_written(tag, tmp_path, monkeypatch) -> None:
    """For the published weights: these are, for this test."""
    model = timm.create_model(tag)
    published = PUBLISHED[tag]._replace(tensors=tensor_hash(model.state_dict()))
    monkeypatch.setitem(PUBLISHED, tag, published)
    save_for_hf(model, tmp_path)
    assert (folder_of(tag) / 'config.json').read_text() == (tmp_path / 'config.json').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('tag', TAGS)
def test_front_matter(tag) -> None:
    card = render_tag(tag)
    assert not card_errors(card)
    data: Any = ModelCard(card).data
    assert data.library_name == 'timm'
    assert {'image-classification', 'timm', 'transformers'} <= set(data.tags)
    assert yaml.safe_load(card.split('---\n')[1])['model-index'][0]['name'] == tag
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert set(results) == {'top-1 accuracy', 'top-5 accuracy'}
    with open(ROOT / 'results' / RESULTS[tag.partition('.')[2]], newline='') as file:
        (row,) = (row for row in csv.DictReader(file) if row['model'] == tag)
    assert [float(row['top1']), float(row['top5'])] == list(results.values())
    assert all(result.source_url.startswith('https://') for result in data.eval_results)


@pytest.mark.slow
@pytest.mark.parametrize('tag', TAGS)
def test_numbers_are_those_of_the_code(tag) -> None:
    card = render_tag(tag)
    stats = profile(timm.create_model(tag, device='meta'))
    assert f'  - Params (M): {stats.params:.2f}\n' in card
    (gmacs,) = re.findall(r'^  - GMACs: (\S+)$', card, re.MULTILINE)
    assert float(gmacs) == pytest.approx(stats.gmacs, abs=5e-3 if stats.gmacs >= 0.1 else 5e-5)
    assert f'  - Activations (M): {stats.activations:.2f}\n' in card
    cfg: Any = timm.get_pretrained_cfg(tag)
    assert (
        f'Resize the shorter side to {cfg.input_size[1] / cfg.crop_pct:.0f}, {cfg.interpolation}, then center crop of '
        f'{cfg.input_size[1]} x {cfg.input_size[2]} (crop_pct {cfg.crop_pct})' in card
    )
    assert f'  - Mean: {", ".join(f"{value:.4f}" for value in cfg.mean)}\n' in card
    assert f'  - Standard deviation: {", ".join(f"{value:.4f}" for value in cfg.std)}\n' in card


@pytest.mark.slow
def test_the_authors_licence() -> None:
    card = render_tag('atac_resnet50.open_atac_in1k')
    data = yaml.safe_load(card.split('---\n')[1])
    assert (data['license'], data['license_name']) == ('other', 'none-stated')
    assert "The authors' repository states no licence" in card
    assert "the authors' training log, epoch 155" in card


@pytest.mark.parametrize('tag', RESULTS)
def test_results_csv(tag) -> None:
    """The columns are those of timm, and the rows agree with the models."""
    with open(ROOT / 'results' / RESULTS[tag], newline='') as file:
        rows = list(csv.DictReader(file))
    columns = 'model img_size top1 top1_err top5 top5_err param_count crop_pct interpolation'.split()
    assert list(rows[0])[: len(columns)] == columns
    assert sorted(row['model'] for row in rows) == [name for name in TAGS if name.endswith(f'.{tag}')]
    for row in rows:
        cfg: Any = timm.get_pretrained_cfg(row['model'])
        model = timm.create_model(row['model'], device='meta')
        for k in ('1', '5'):
            assert float(row[f'top{k}']) + float(row[f'top{k}_err']) == pytest.approx(100)
        assert row['param_count'] == f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}'
        assert (int(row['img_size']), float(row['crop_pct'])) == (cfg.input_size[1], cfg.crop_pct)
        assert row['interpolation'] == cfg.interpolation
        if tag == 'open_atac_in1k':
            assert row['source'] == "authors' training log"  # we have not measured these


PUSH = 'import sys; from timm_atac.cli import main; sys.exit(main(["push", *sys.argv[1:]]))'
# Runs the blocks of a card in one process, each in a namespace of its own, beside an image.
RUN = """
import json, sys
for block in json.load(open(sys.argv[1])):
    exec(compile(block, block, 'exec'), {})
"""


@pytest.mark.slow
@pytest.mark.parametrize('tag', [pytest.param('atac_resnet50.open_atac_in1k', marks=pytest.mark.weekly), 'digits'])
def test_code_runs(tag, tmp_path) -> None:
    """Every block of a pushed card runs: `pip install` and Python."""
    pytest.importorskip('transformers')
    torch.manual_seed(0)
    folder = tmp_path / 'folder'
    model = timm.create_model('atac_resnet8_cifar', **DIGITS) if tag == 'digits' else timm.create_model(tag)
    export(model, folder)
    repo = check_folder(folder, 'me/net').repo
    with LoopbackHub(tokens={'hf_right': 'me'}) as hub:
        env = {**hub.environment(tmp_path / 'home'), 'TIMM_ATAC_HUB_ORG': '', 'PIP_NO_INDEX': '1'}
        pushed = forked.run(PUSH, str(folder), '--repo', repo, '--yes', env=env)
        assert pushed.returncode == 0, pushed.stderr
        card = hub.files('me/net')['README.md'].decode()
        assert len(re.findall('^```', card, re.MULTILINE)) % 2 == 0
        languages = re.findall(r'^```(\w+)$', card, re.MULTILINE)
        assert languages == ['sh', *['python'] * (3 if tag == 'digits' else 4), 'bibtex']

        (install,) = blocks(card, 'sh')
        assert install == 'pip install timm_atac\n'
        pip = f'{sys.executable} -m {install}'  # it is installed, so that nothing is downloaded
        subprocess.run(pip, shell=True, env=env, check=True, capture_output=True)

        rng = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (300, 250, 3), dtype=torch.uint8, generator=rng)
        Image.fromarray(pixels.numpy()).save(tmp_path / 'image.jpg')
        (tmp_path / 'blocks.json').write_text(json.dumps(blocks(card, 'python')))
        result = forked.run(RUN, 'blocks.json', cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr
    shapes = re.findall(r'^torch.Size\(\[(.*)\]\)$', result.stdout, re.MULTILINE)
    assert shapes == re.findall(r'^    # \((.*)\)$', card, re.MULTILINE)
    assert len(shapes) == (3 if tag == 'digits' else 5)


@pytest.mark.slow
def test_without_facts(tmp_path) -> None:
    """A card without facts has no empty sections."""
    kwargs: dict[str, Any] = dict(act_layer='atac', num_classes=3)
    save_for_hf(timm.create_model('resnet18', **kwargs), tmp_path, model_args=kwargs)
    config = read_config(tmp_path)
    card = render(config)
    assert full_name(config) == 'resnet18'
    assert '- **License:** not stated\n' in card
    assert re.findall('^##+ (.*)', card, re.MULTILINE) == [
        'Model Details',
        'Model Usage',
        'Image Classification',
        'Feature Map Extraction',
        'Image Embeddings',
        'Transformers',
        'Citation',
    ]
    assert 'k=3)' in card and 'gates' not in card
    assert '**Architecture:** `resnet18` with `act_layer=atac`\n' in card
    check_text(card)


def check_text(card: str) -> None:
    """Check that no piece of the template is left and that the Hub accepts the front matter."""
    assert not re.search(r'\n\n\n|None|\{\{|\{%| \n', card)
    assert not card_errors(card)


@pytest.mark.slow
@pytest.mark.parametrize('tag', TAGS)
def test_text(tag) -> None:
    check_text(render_tag(tag, picture='gates.png'))
    check_text(render_tag(tag, picture='gates.png', curve='training.png'))


@pytest.mark.slow
def test_facts_without_a_value(tmp_path) -> None:
    (tmp_path / 'card.yaml').write_text('description: null\npapers:\ndatasets: [{name: mine, id: null}]')
    facts = read_facts(tmp_path / 'card.yaml')
    export(timm.create_model('atac_resnet8_cifar'), tmp_path / 'net', facts)
    written = yaml.safe_load((tmp_path / 'net' / 'card.yaml').read_text())
    assert sorted(written) == ['datasets', 'picture_credit', 'weights']
    card = render(read_config(folder_of(TAGS[0])), facts)
    assert '- **Dataset:** mine\n' in card and '\ndatasets:' not in card
    check_text(card)


def test_a_network_without_classes(tmp_path) -> None:
    save_for_hf(timm.create_model('atac_resnet8_cifar', num_classes=0), tmp_path)
    card = render(read_config(tmp_path))
    assert 'pipeline_tag: image-feature-extraction' in card
    assert re.findall('^### (.*)', card, re.MULTILINE) == ['Feature Map Extraction', 'Image Embeddings']
    check_text(card)


def test_a_network_without_feature_maps(tmp_path) -> None:
    kwargs: dict[str, Any] = dict(act_layer='atac', depth=2)
    save_for_hf(timm.create_model('vit_tiny_patch16_224', **kwargs), tmp_path, model_args=kwargs)
    card = render(read_config(tmp_path))
    assert 'Feature Map' not in card
    assert '- **Architecture:** `vit_tiny_patch16_224` with `act_layer=atac`, `depth=2`\n' in card
    check_text(card)


@pytest.mark.slow
def test_picture() -> None:
    card = render_tag(TAGS[0], picture='gates.png')
    assert '![The gates of each unit on an image](gates.png)' in card
    assert 'gates.png' not in render_tag(TAGS[0])


@pytest.mark.parametrize(
    'text, message',
    [
        (
            'licence: mit',
            r"unknown licence \(did you mean 'license'\?\) in facts, expected description, weights, name, base_model",
        ),
        ('license: apache2', "the licence 'apache2' is not known to the Hub; did you mean 'apache-2.0'"),
        ('license: other', "the licence 'other' needs license_name"),
        ('[1, 2]', r'facts is \[1, 2\], expected a mapping'),
        ('a: [', 'is not YAML'),
        ('description: [x]', r"description is \['x'\], expected a text"),
        ('citations: hello', "citations is 'hello', expected a list"),
        ('citations: [3]', r'citations\[0\] is 3, expected a text'),
        ('hyperparameters: 3', 'hyperparameters is 3, expected a mapping'),
        ('papers: [{title: x}]', r"papers\[0\] has no url: \{'title': 'x'\}"),
        ('papers: [{title: x, url: null}]', r'papers\[0\] has no url'),
        ('papers: [x]', r"papers\[0\] is 'x', expected a mapping"),
        ('datasets: [{name: x, ID: x}]', r"unknown ID \(did you mean 'id'\?\) in datasets\[0\], expected name, id"),
        (
            'results: [{dataset: x, id: x, split: x, source: {}, metrics: {a: 1}}]',
            r'results\[0\].source has no name, url',
        ),
        (
            'results: [{dataset: x, id: x, split: x, source: {name: x, url: x}, metrics: {a: 7 %}}]',
            r"results\[0\].metrics.a is '7 %', expected a number",
        ),
        ('comparison: {text: x, rows: [{model: x}]}', r'comparison.rows\[0\] has no params, gmacs, top1, source: '),
        (
            'comparison: {text: x, rows: [{model: x, params: 1, gmacs: 1, top1: good, top5: null, source: x}]}',
            r"comparison.rows\[0\].top1 is 'good', expected a number",
        ),
    ],
)
def test_wrong_facts(text, message, tmp_path) -> None:
    path = tmp_path / 'card.yaml'
    path.write_text(text)
    with pytest.raises(CardError, match=f'^{re.escape(str(path))}.*{message}'):
        read_facts(path)


def test_all_wrong_facts_in_one_error(tmp_path) -> None:
    """The error names the file and each fact, so that one run shows all that has to be changed."""
    path = tmp_path / 'card.yaml'
    path.write_text('licence: mit\ndescription: 3\npapers: [{title: x}, {title: 4, url: x}]\ncomparison: {text: x}')
    with pytest.raises(CardError) as caught:
        read_facts(path)
    names = [field.name for field in fields(CardFacts)]
    assert str(caught.value) == (
        f"{path}: unknown licence (did you mean 'license'?) in facts, expected "
        f'{", ".join(names)}; description is 3, expected a text; '
        "papers[0] has no url: {'title': 'x'}; papers[1].title is 4, expected a text; "
        "comparison has no rows: {'text': 'x'}."
    )


@pytest.mark.parametrize('tag', TAGS)
def test_facts_that_are_given_are_kept(tag) -> None:
    """No fact of a file is lost or changed by the check."""
    facts = read_facts(folder_of(tag) / 'card.yaml')
    checked = asdict(check_facts(facts))
    assert {name: checked[name] for name in facts} == facts

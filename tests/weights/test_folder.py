"""Folders in timm's Hub format: how they are written and loaded, and the errors for those that do not load."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_atac
from timm_atac.hub.export import export
from timm_atac.weights.folder import FolderError, load_folder, read_config, save_for_hf

CASES: list[tuple[str, dict[str, Any]]] = [
    ('atac_resnet8_cifar', {}),
    ('atac_resnet8_cifar', dict(num_classes=7, in_chans=1, rd_ratio=0.25)),
    ('atac_resnet8_cifar', dict(in_chans=4, global_pool='max')),
    ('resnet8_cifar', dict(act_layer='se_act', atac_stages=(3, 4))),
    ('resnet8_cifar', dict(attn_layer='local_se', num_classes=3)),
    ('resnet18', dict(act_layer='atac', num_classes=5)),
    ('atac_host', dict(host='resnet18', where=['layer4.*'], num_classes=5)),
]


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs', CASES, ids=str)
def test_round_trip(name, kwargs, tmp_path) -> None:
    """The network loaded by us and by timm gives the same logits to the bit."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **kwargs).eval()
    save_for_hf(model, tmp_path, model_args=kwargs)
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'model.safetensors']
    x = torch.randn(2, kwargs.get('in_chans', 3), 32, 32)
    with torch.inference_mode():
        expected = model(x)
        assert torch.equal(load_folder(tmp_path)(x), expected)
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), expected)


def test_weights_that_are_not_contiguous(tmp_path) -> None:
    """safetensors refuses such weights; they are written from a copy, and the model does not change."""
    model: Any = timm.create_model('atac_resnet8_cifar').to(memory_format=torch.channels_last)
    model.fc.weight.data = model.fc.weight.data.t().contiguous().t()
    save_for_hf(model, tmp_path)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.fc.weight.is_contiguous()
    for name, tensor in load_folder(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs', [CASES[0], CASES[1], CASES[6]], ids=str)
def test_transformers(name, kwargs, tmp_path) -> None:
    """transformers loads the folder with its labels; it would refuse num_classes in model_args."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **kwargs).eval()
    labels = [f'label {i}' for i in range(model.num_classes)]
    save_for_hf(model, tmp_path, model_args=kwargs, model_config={'label_names': labels})
    x = torch.randn(2, kwargs.get('in_chans', 3), 32, 32)
    found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(found(x).logits, model(x))
    if 'in_chans' not in kwargs:
        from PIL import Image

        classify = transformers.pipeline('image-classification', model=str(tmp_path))
        answer = classify(Image.new('RGB', (40, 50), 'red'), top_k=3)
        assert len(answer) == 3 and {entry['label'] for entry in answer} <= set(labels)


def test_config_says_nothing_twice(tmp_path) -> None:
    save_for_hf(timm.create_model('atac_resnet8_cifar', num_classes=7), tmp_path, model_args=dict(num_classes=7))
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['num_classes'] == config['pretrained_cfg']['num_classes'] == 7
    assert 'model_args' not in config
    assert config['pretrained_cfg']['custom_load'] is False
    save_for_hf(timm.create_model('atac_resnet8_cifar', in_chans=1, rd_ratio=0.25), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [1, 32, 32]
    assert len(config['pretrained_cfg']['mean']) == 1


@pytest.mark.slow
def test_a_replaced_host_claims_nothing_of_the_host(tmp_path) -> None:
    save_for_hf(timm.create_model('atac_host', host='resnet18'), tmp_path)
    config = read_config(tmp_path)
    assert config['model_args'] == {'host': 'resnet18', 'act': 'atac', 'where': 'all'}
    assert not {'tag', 'license', 'description', 'origin_url'} & set(config['pretrained_cfg'])


@pytest.mark.slow
def test_what_others_wrote(tmp_path) -> None:
    """A folder of timm's own save_for_hf with a network of replace_activations."""
    model: Any = timm_atac.replace_activations(timm.create_model('resnet18', num_classes=3), where='layer4.*')
    args = model.replaced_activations.model_args  # timm knows them since 1.0.31
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True, model_args=args)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(load_folder(tmp_path)(x), model.eval()(x))


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / 'net'
    save_for_hf(timm.create_model('atac_resnet8_cifar'), path)
    return path


def change(folder: Path, **entries) -> None:
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **entries}))


def test_faults_of_a_config(folder) -> None:
    for entries, message in (
        (dict(architecture='atac_resnet9'), "architecture is 'atac_resnet9', which timm .* does not know"),
        (dict(architecture=None), 'architecture is None'),
        (dict(architecture='resnet8_cifar', model_args=[]), r'model_args is \[\], expected an object'),
        (dict(model_args=dict(checkpoint_path='x.pth')), 'has checkpoint_path, which would load other files'),
        (
            dict(architecture='atac_host', model_args=dict(host=dict(model_name='resnet18', checkpoint_path='x'))),
            'has checkpoint_path',
        ),
        (
            dict(architecture='atac_host', model_args=dict(host='hf-hub:me/net')),
            "has the host 'hf-hub:me/net', which would",
        ),
        (
            dict(architecture='atac_host', model_args=dict(host=dict(model_name='local-dir:x'))),
            "the host 'local-dir:x'",
        ),
        (dict(pretrained_cfg=None), 'pretrained_cfg is None, expected an object'),
        (dict(model_args=dict(rd_ratio=7)), 'cannot be created.*rd_ratio=7: expected'),
        (dict(model_args=dict(colour=1)), 'cannot be created'),
        (dict(model_args=dict(rd_ratio=0.25)), r"does not fit config.json: 'stages.*is \(8, 16, 1, 1\) in.*more\.$"),
    ):
        before = (folder / 'config.json').read_text()
        change(folder, **{'model_args': {}, **entries})
        with pytest.raises(FolderError, match=f'(?s){message}'):
            load_folder(folder)
        (folder / 'config.json').write_text(before)
    (folder / 'config.json').write_text('{"architecture": ')
    with pytest.raises(FolderError, match='cannot be read'):
        load_folder(folder)
    (folder / 'config.json').unlink()
    with pytest.raises(FolderError, match=r'has no config.json: expected a folder that `timm-atac convert`'):
        load_folder(folder)


def test_faults_of_the_weights(folder) -> None:
    path = folder / 'model.safetensors'
    data = path.read_bytes()
    for wrong in (data[:1000], b'\xff' * 8 + data[8:], b'', data + b'x'):
        path.write_bytes(wrong)
        with pytest.raises(FolderError, match=r'model.safetensors is damaged.*Write it again'):
            load_folder(folder)
    path.write_bytes(data)
    tensors = load_file(path)
    del tensors['fc.bias']
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(FolderError, match=r'(?s)does not fit.*fc\.bias'):
        load_folder(folder)
    path.unlink()
    torch.save(timm.create_model('atac_resnet8_cifar').state_dict(), folder / 'pytorch_model.bin')
    with pytest.raises(FolderError, match=r'has no model.safetensors'):
        load_folder(folder)  # a pickle is no substitute


@pytest.mark.slow
def test_export_is_complete_or_absent(tmp_path, monkeypatch) -> None:
    model = timm.create_model('atac_resnet8_cifar')

    def interrupted(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_atac.hub.export.render', interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / 'net')
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    export(model, tmp_path / 'deep' / 'net')
    assert sorted(os.listdir(tmp_path / 'deep' / 'net')) == [
        'README.md',
        'card.yaml',
        'config.json',
        'gates.png',
        'model.safetensors',
    ]


@pytest.mark.slow
def test_export_overwrites_nothing(tmp_path) -> None:
    model = timm.create_model('atac_resnet8_cifar')
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').write_text('x')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'empty')
    for name in ('file', 'full', 'link'):
        with pytest.raises(FileExistsError, match=f'{name} exists already; give another name'):
            export(model, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ['empty', 'file', 'full', 'link']
    export(model, tmp_path / 'empty')


@pytest.mark.slow
def test_without_matplotlib(tmp_path, monkeypatch, caplog) -> None:
    """The folder has no picture, the card does not mention one, and a warning says why."""
    for name in ('matplotlib', 'matplotlib.cbook'):
        monkeypatch.setitem(sys.modules, name, None)
    export(timm.create_model('atac_resnet8_cifar'), tmp_path / 'net')
    assert sorted(os.listdir(tmp_path / 'net')) == ['README.md', 'card.yaml', 'config.json', 'model.safetensors']
    assert 'gates' not in (tmp_path / 'net' / 'README.md').read_text()
    assert 'matplotlib is not installed (pip install matplotlib)' in caplog.text

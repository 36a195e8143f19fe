"""The weights in this package: they load without a network, and leave no path behind."""

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm_versions import needs_safe_folders
from torchvision.transforms.functional import to_tensor

import timm_atac
from timm_atac.weights.folder import read_config
from timm_atac.weights.identity import tensor_hash
from timm_atac.weights.published import PUBLISHED, packaged_file, packaged_name

NAMES = sorted(name for name, published in PUBLISHED.items() if not published.git_blob)
NAME = 'atac_resnet8_cifar'
IMAGES = Path(__file__).parents[3] / 'shared' / 'cifar10' / 'cifar10-jpeg.tar.xz'
# Logits of `pattern()`. They were computed once, by the networks whose accuracy results/results-cifar10.csv has.
LOGITS = {
    'atac_resnet14_cifar.cifar10': [2.5091, -4.8343, 1.0928, 5.1838, 2.7463, 2.2348, 2.7192, -5.1894, -1.9436, -4.5756],
    'atac_resnet8_cifar.cifar10': [2.6415, -3.2699, 3.3303, 3.2377, 2.0071, 0.2575, 3.1267, -3.8608, -2.8346, -4.8004],
    'resnet14_cifar.cifar10': [1.7836, -3.9905, 2.6944, 3.7768, 2.4099, 0.6618, 2.1231, -3.1683, -3.1938, -3.1887],
    'resnet20_cifar.cifar10': [4.5105, -2.8793, 2.9075, 6.2761, -0.2475, 1.8453, 3.2782, -6.6759, -4.353, -4.5026],
    'resnet8_cifar.cifar10': [1.9973, -3.1157, 2.3672, 3.3686, 1.8034, 0.7615, 1.4047, -2.8474, -2.035, -3.6937],
}


def pattern() -> torch.Tensor:
    """An image (1, 3, 32, 32) of smooth waves."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing='ij')
    return torch.stack([torch.sin(3 * x + y), torch.cos(2 * y - x), torch.sin(x * y * 4)])[None]


def pretrained(**kwargs) -> Any:
    return timm.create_model(NAME, pretrained=True, **kwargs).eval()


def has_path(value: Any) -> bool:
    return 'safetensors' in str(value) or str(Path(timm_atac.__file__).parent) in str(value)


def test_files() -> None:
    """Each tag has its file, and each file its tag."""
    files = {path: tensor_hash(load_file(path)) for path in Path(timm_atac.__file__).parent.glob('weights/files/*')}
    assert files == {packaged_file(name): PUBLISHED[name].tensors for name in NAMES}
    assert NAMES and [packaged_name(path) for path in sorted(files)] == NAMES


@pytest.mark.parametrize('name', NAMES)
@torch.inference_mode()
def test_logits(name) -> None:
    model = timm.create_model(name, pretrained=True).eval()
    expected = torch.tensor([LOGITS[name]])
    torch.testing.assert_close(model(pattern()), expected, rtol=1e-3, atol=1e-3)
    assert tensor_hash(model.state_dict()) == PUBLISHED[name].tensors


@pytest.mark.parametrize(
    'kwargs', [dict(num_classes=3), dict(num_classes=0), dict(in_chans=1), dict(in_chans=5), dict(features_only=True)]
)
def test_other_networks(kwargs) -> None:
    """timm adapts the weights. They have no path, and the record of their source."""
    model, first = pretrained(**kwargs), pretrained()
    convs, expected = (
        [m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 5]
        for net in (model, first)
    )
    assert len(convs) == (20 if 'features_only' in kwargs else 22) and all(map(torch.equal, convs, expected))
    assert model.pretrained_cfg['notes'][0].startswith(f'Loaded from {NAME}.cifar10 (sha256:')
    assert not any(has_path(getattr(module, 'pretrained_cfg', '')) for module in model.modules())


@pytest.mark.parametrize('is_pretrained', [False, True])
def test_no_path_is_kept(is_pretrained, tmp_path) -> None:
    """Not in the cfg, not in config.json, not in a checkpoint, not in a model with other units."""
    model: Any = timm.create_model('resnet8_cifar', pretrained=is_pretrained).eval()
    assert not has_path(model.pretrained_cfg) and not has_path(model.default_cfg)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert not has_path((tmp_path / 'config.json').read_text())
    assert not has_path(timm_atac.replace_activations(model).pretrained_cfg)
    host: Any = timm.create_model('atac_host', host='resnet8_cifar')
    assert not has_path(host.pretrained_cfg)


@needs_safe_folders
def test_saved_and_loaded(tmp_path) -> None:
    model = pretrained()
    timm_atac.save_for_hf(model, tmp_path)
    config = read_config(tmp_path)
    assert config['pretrained_cfg']['tag'] == 'cifar10'
    assert config['label_names'][3] == 'cat' and 'label_names' not in config['pretrained_cfg']
    loaded: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(pattern()), model(pattern()))
    timm_atac.save_for_hf(pretrained(num_classes=3), tmp_path / 'three')
    assert 'label_names' not in json.loads((tmp_path / 'three' / 'config.json').read_text())


@pytest.mark.slow
def test_another_source_of_the_user(tmp_path, monkeypatch) -> None:
    """timm prefers a file. Another source that the user names is loaded all the same."""
    other = timm.create_model(NAME).state_dict()
    torch.save(other, tmp_path / 'other.pth')
    asked: list[Any] = []

    def load(source: Any, *args, **kwargs) -> dict[str, torch.Tensor]:
        asked.append(source)
        return dict(other)

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', load)
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', load)
    overlays: list[dict[str, Any]] = [
        dict(url='https://example.org/other.pth'),
        dict(hf_hub_id='me/other'),
        dict(file=str(tmp_path / 'other.pth')),
        dict(state_dict=dict(other)),
    ]
    for overlay in overlays:
        model = pretrained(pretrained_cfg_overlay=overlay)
        assert torch.equal(model.fc.weight, other['fc.weight']), overlay
        assert 'notes' not in model.pretrained_cfg
    assert asked == ['https://example.org/other.pth', 'me/other']
    cfg: Any = timm.get_pretrained_cfg(f'{NAME}.cifar10')
    copied = {**cfg.to_dict(), 'url': 'https://example.org/copied.pth'}
    assert torch.equal(pretrained(pretrained_cfg=copied).fc.weight, other['fc.weight'])
    assert torch.equal(pretrained(pretrained_cfg_overlay=dict(tag='mine')).fc.weight, pretrained().fc.weight)


@pytest.mark.slow
def test_without_a_network_and_with_an_organisation(python) -> None:
    """`TIMM_ATAC_HUB_ORG` does not change where these weights come from."""
    code = (
        'import socket, timm\n'
        'socket.socket.connect = None  # the network would raise a TypeError\n'
        f'print(timm.create_model("{NAME}", pretrained=True).fc.weight.sum().item())\n'
    )
    expected = f'{pretrained().fc.weight.sum().item()}'
    assert python(code).stdout.split() == python(code, TIMM_ATAC_HUB_ORG='our-team').stdout.split() == [expected]


@pytest.mark.slow
@torch.inference_mode()
def test_accuracy() -> None:
    """The accuracy on the test images is that of the table, to the last image."""
    if not IMAGES.is_file():
        pytest.skip(f'{IMAGES} is not there: the JPEG copy of CIFAR-10 is no part of this project')
    images, labels = [], []
    cfg: Any = timm.get_pretrained_cfg(NAMES[0])
    with tarfile.open(IMAGES) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and 'test' in parts:
                with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                    images.append(to_tensor(image.convert('RGB')))
                labels.append(cfg.label_names.index(parts[-2]))
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (cfg.mean, cfg.std))
    x = (torch.stack(images) - mean) / std
    assert x.shape == (10_000, 3, 32, 32)
    with open(Path(__file__).parents[2] / 'results' / 'results-cifar10.csv', newline='') as file:
        expected = {row['model']: round(float(row['top1']) * 100) for row in csv.DictReader(file)}
    found = {}
    for name in NAMES:
        model = timm.create_model(name, pretrained=True).eval()
        logits = torch.cat([model(batch) for batch in x.split(100)])
        found[name] = int((logits.argmax(1) == torch.tensor(labels)).sum())
    assert found == expected

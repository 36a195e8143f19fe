"""Each heading of docs/troubleshooting.md is the text of an error that its cause still gives."""

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import pytest
import timm
import torch
import torch.nn as nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import timm_atac
from timm_atac.cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs' / 'troubleshooting.md'
PARAMS = ROOT / 'tests' / 'data' / 'cifar_b1_atac.params'
X = torch.randn(2, 3, 64, 64)


def create(name: str, **kwargs: Any) -> Callable[[], Any]:
    return lambda: timm.create_model(name, **kwargs)


def replace(**kwargs: Any) -> Callable[[], Any]:
    return lambda: timm_atac.replace_activations(timm.create_model('test_resnet'), **kwargs)


def overlay(**kwargs: Any) -> Callable[[], Any]:
    return create('atac_resnet50', pretrained=True, pretrained_cfg_overlay=kwargs)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU()
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.relu(self.conv(x)) * self.scale)


def set_a_constant() -> None:
    model: Any = timm_atac.replace_activations(Scaled(), example_input=X)
    model.scale = 0.5


def load_with_missing_keys() -> None:
    weights = timm.create_model('test_resnet').state_dict()
    timm.create_model('test_resnet', act_layer='atac').load_state_dict(weights)


def fused() -> nn.Module:
    return timm_atac.fuse(timm.create_model('resnet8_cifar').eval())


def with_hooks() -> None:
    model = timm.create_model('test_resnet')
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: None)
    model(X)


CAUSES: dict[str, Callable[[], Any]] = {
    'Unknown model': create('atac_resnet51'),
    'No pretrained weights exist': create('atac_resnet18', pretrained=True),
    'is not the file that': overlay(file=str(PARAMS)),
    "'str' object is not callable": create('starnet_s1', act_layer='atac'),
    "got an unexpected keyword argument 'act_layer'": create('beit_base_patch16_224', act_layer='atac', device='meta'),
    'timm has no activation of that name': create('resnet8_cifar', act_layer='atak'),
    'Missing key(s) in state_dict': load_with_missing_keys,
    'One unit cannot serve several widths': create('res2net50_26w_4s', act_layer='atac'),
    'was created without channels': lambda: timm_atac.ATAC()(X),
    'give input_fmt=': lambda: timm_atac.ATAC(16)(torch.randn(2, 8, 16)),
    'this model calls its activation as a function': lambda: timm.layers.get_act_fn('atac')(X),  # type: ignore[misc]
    'Expected more than 1 value per channel': lambda: timm_atac.ATAC(8)(torch.randn(1, 8, 1, 1)),
    'is a view and is being modified inplace': with_hooks,
    'cannot handle function batch_norm': lambda: call_for_per_sample_grads(timm.create_model('resnet8_cifar'))(X),
    'expected a number in (0, 1]': create('resnet8_cifar', act_layer='atac', rd_ratio=2),
    'which has no bottleneck': create('resnet8_cifar', rd_ratio=0.5),
    'atac_host takes a ratio': create('atac_host', host='test_resnet', rd_ratio='auto'),
    'at most': replace(rd_ratio=10),
    'fits no activation of': replace(where='layr4*'),
    'has 4 stages': replace(where=7),
    'does not run on': lambda: timm_atac.replace_activations(nn.Sequential(nn.Linear(3, 8), nn.ReLU())),
    'is now a constant of the forward pass': set_a_constant,
    'is for feature maps of': lambda: timm.create_model('aa_resnet50', layers=(1, 1, 1, 1), img_size=96)(X),
    'has no state dict': lambda: fused().state_dict(),
    'loads no state dict': lambda: fused().load_state_dict({}),
    'its gate is not known': lambda: timm_atac.gate(nn.Softplus(), X),
    'has no unit with a gate': lambda: timm_atac.viz.gate_maps(timm.create_model('resnet8_cifar'), X),
    'is not a .params file': lambda: timm_atac.read_params(__file__),
    'does not fit this': overlay(file=str(PARAMS), tag='mine'),
}
# tested by a function below, or, with FSDP2, in tests/docs/test_fine_tune.py
OTHERS = {
    'URLError',
    'LocalEntryNotFoundError',
    'expected scalar type BFloat16 but found Float',
    'TIMM_ATAC_KERNELS=',
    "KeyError: 'num_classes'",
    'has no README.md',
    'No token for the Hub',
    'TIMM_ATAC_DISABLE is set',
}


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('text', CAUSES)
def test_text(text) -> None:
    with pytest.raises(Exception) as error:
        CAUSES[text]()
    assert text in str(error.value).replace('`', '')


def test_every_heading_is_tested() -> None:
    headings = re.findall(r'^### `(.+)`$', PAGE.read_text(), re.MULTILINE)
    assert len(headings) == len({*headings})
    assert {*headings} == {*CAUSES} | OTHERS


@pytest.mark.slow
def test_download_without_a_network(monkeypatch, tmp_path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise URLError('no network')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub.urlopen', refuse)
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    with pytest.raises(URLError) as error:
        timm.create_model('atac_resnet50', pretrained=True)
    (note,) = error.value.__notes__
    assert 'https://' in note and 'pretrained_cfg_overlay=dict(file=' in note


@pytest.mark.slow
def test_the_hub_without_a_network(monkeypatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(Exception) as error:
        timm.create_model('atac_host', host='resnet50', pretrained=True)
    assert isinstance(error.value, LocalEntryNotFoundError)
    assert "host='local-dir:FOLDER'" in error.value.__notes__[0]


@pytest.mark.slow
def test_transformers(tmp_path) -> None:
    pytest.importorskip('transformers')
    from transformers import AutoModelForImageClassification, pipeline

    folder = str(tmp_path / 'net')
    model = timm.create_model('atac_resnet8_cifar', num_classes=3)
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args={'num_classes': 3})
    with pytest.raises(ValueError, match="KeyError: 'num_classes'"):
        pipeline('image-classification', model=folder)
    with pytest.raises(TypeError, match="got multiple values for keyword argument 'num_classes'"):
        AutoModelForImageClassification.from_pretrained(folder)
    timm_atac.save_for_hf(model, folder)
    assert pipeline('image-classification', model=folder)


@pytest.mark.slow
def test_program(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr('timm_atac.hub.push.get_token', lambda: None)
    folder = tmp_path / 'net'
    timm_atac.save_for_hf(timm.create_model('atac_resnet8_cifar'), folder)
    assert main(['push', str(folder), '--repo', 'me/net']) == 1
    assert 'has no README.md' in capsys.readouterr().err
    assert main(['push', '--model', 'atac_resnet8_cifar.cifar10', '--repo', 'me/net']) == 1
    assert 'No token for the Hub' in capsys.readouterr().err
    monkeypatch.setenv('TIMM_ATAC_DISABLE', '1')
    assert main(['list']) == 1
    assert 'TIMM_ATAC_DISABLE is set' in capsys.readouterr().err


def test_environment(monkeypatch) -> None:
    monkeypatch.setattr('timm_atac.kernels.switch._choice', 'perhaps')
    with pytest.raises(ValueError, match='TIMM_ATAC_KERNELS='):
        timm.create_model('atac_resnet8_cifar')(X)

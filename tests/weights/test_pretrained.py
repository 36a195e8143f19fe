"""`pretrained=True` with timm's own download from 127.0.0.1, of a file like the published one."""

import copy
import hashlib
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from timm_atac import ParamsError, read_params, write_params
from timm_atac.weights import pretrained
from timm_atac.weights.convert import ConversionError, to_arrays
from timm_atac.weights.pretrained import git_blob_id
from timm_atac.weights.published import PUBLISHED, Published

NAME = 'atac_resnet50.open_atac_in1k'


@pytest.fixture(scope='module')
def source(site) -> Any:
    """The network whose weights are served as `net.params`, in float16 except the norms, as in the published file."""
    torch.manual_seed(0)
    model: Any = timm.create_model('atac_resnet50').eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            module.running_mean = torch.randn_like(module.weight) / 10
    arrays = {
        name: array.astype(np.float16) if name.endswith(('.weight', '.bias')) else array
        for name, array in to_arrays(model).items()
    }
    write_params(site[0] / 'net.params', arrays)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim != 1 or parameter is model.fc.bias:
                parameter.copy_(parameter.half())
    return model


@pytest.fixture
def overlay(site, source, monkeypatch, tmp_path) -> dict[str, Any]:
    """A pretrained cfg with which timm loads the served file as the published one."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    url = f'{site[1]}/net.params'
    monkeypatch.setitem(PUBLISHED, NAME, Published(url, git_blob_id(site[0] / 'net.params')))
    return dict(url=url, custom_load=True)


def create(overlay: dict[str, Any], **kwargs) -> Any:
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.slow
def test_download(overlay, source, tmp_path) -> None:
    model = create(overlay)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), source(x))
    assert (tmp_path / 'hub' / 'checkpoints' / 'net.params').is_file()


@pytest.mark.slow
def test_adaptation(overlay, source) -> None:
    """timm adapts the weights to other classes, input channels and feature maps."""
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = source.forward_features(x)
        assert torch.equal(create(overlay, num_classes=7).forward_features(x), expected)
        assert torch.equal(create(overlay, num_classes=0)(x), source.forward_head(expected, pre_logits=True))
        grey = create(overlay, in_chans=1)
        assert torch.equal(grey.conv1.weight, source.conv1.weight.sum(1, keepdim=True))
        assert torch.equal(grey.layer4[2].act1.conv1.weight, source.layer4[2].act1.conv1.weight)
        assert create(overlay, in_chans=4).conv1.weight.shape[1] == 4
        features = create(overlay, features_only=True)(x)
        assert torch.equal(features[-1], expected)
        dilated = create(overlay, features_only=True, output_stride=8, out_indices=(4,), in_chans=1)
        assert dilated(x[:, :1])[0].shape == (1, 2048, 8, 8)


@pytest.mark.slow
def test_another_file_is_refused(overlay, monkeypatch, site) -> None:
    found = git_blob_id(site[0] / 'net.params')
    monkeypatch.undo()
    expected = PUBLISHED[NAME].git_blob
    with pytest.raises(ValueError, match=f'{found}, expected {expected}.*delete it and try again.*timm-atac convert'):
        create(dict(file=str(site[0] / 'net.params')))


@pytest.mark.slow
def test_a_tag_of_ones_own(source, site) -> None:
    model = create(dict(file=str(site[0] / 'net.params'), tag='mine'))
    assert torch.equal(model.fc.weight, source.fc.weight)


@pytest.mark.slow
def test_another_architecture(overlay) -> None:
    with pytest.raises(ConversionError, match=r"missing: 'layer1\.0\.relu1\.module\.0\.weight'"):
        create(overlay, atac_stages=(1, 2, 3, 4))


@pytest.mark.slow
def test_a_damaged_file(overlay, site, tmp_path) -> None:
    data = (site[0] / 'net.params').read_bytes()
    (tmp_path / 'cut.params').write_bytes(data[: len(data) // 2])
    model: Any = timm.create_model('atac_resnet50', pretrained_cfg_overlay=dict(tag='mine'))
    before = model.fc.weight.clone()
    with pytest.raises(ParamsError, match=r'bytes, but \d+ are left'):
        model.load_pretrained(tmp_path / 'cut.params')
    assert torch.equal(model.fc.weight, before)


def test_formats_of_timm(tmp_path) -> None:
    """Before 1.0.29 timm calls a model whose cfg has `custom_load` for weights of any format."""
    from safetensors.torch import save_file

    source: Any = timm.create_model('atac_resnet8_cifar')
    save_file(source.state_dict(), tmp_path / 'own.safetensors')
    model: Any = timm.create_model('atac_resnet8_cifar', num_classes=3)
    pretrained.load_pretrained(model, tmp_path / 'own.safetensors')
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert model.fc.out_features == 3


@pytest.mark.slow
def test_formats_of_timm_for_a_published_tag(source, tmp_path) -> None:
    """A user's weights in a format of timm replace the published ones."""
    from safetensors.torch import save_file

    save_file(source.state_dict(), tmp_path / 'own.safetensors')
    overlay = dict(file=str(tmp_path / 'own.safetensors'), custom_load=True)  # as timm before 1.0.29 leaves it
    model: Any = create(overlay)
    assert torch.equal(model.fc.weight, source.fc.weight)


PARAMS = str(Path(__file__).parents[1] / 'data' / 'cifar_b1_atac.params')
CIFAR10: dict[str, Any] = dict(num_classes=10, input_size=(3, 32, 32), first_conv='conv1', classifier='fc')


@pytest.mark.parametrize(
    'source',
    [
        dict(pretrained_cfg_overlay=dict(file=PARAMS, custom_load=True)),
        dict(pretrained_cfg_overlay=dict(file=PARAMS)),
        dict(pretrained_cfg_overlay=dict(file=Path(PARAMS))),
        dict(pretrained_cfg=dict(file=PARAMS, **CIFAR10)),
        dict(pretrained_cfg=timm.models.PretrainedCfg(file=PARAMS, **CIFAR10)),
        dict(pretrained_cfg=dict(file=PARAMS, custom_load=False, **CIFAR10)),  # as timm's scripts complete a cfg
    ],
    ids=['custom_load', 'overlay', 'path', 'cfg', 'PretrainedCfg', 'complete cfg'],
)
def test_cifar(source) -> None:
    """The format of the file says that the network loads it; `custom_load` is not needed."""
    given = copy.deepcopy(source)
    model: Any = timm.create_model('atac_resnet8_cifar', pretrained=True, **source)
    assert source == given
    assert torch.equal(model.fc.bias, torch.from_numpy(read_params(PARAMS)['output.bias'].copy()))
    grey: Any = timm.create_model('atac_resnet8_cifar', pretrained=True, in_chans=1, num_classes=3, **source)
    assert grey.data_bn.running_mean == model.data_bn.running_mean.mean()
    features: Any = timm.create_model('atac_resnet8_cifar', pretrained=True, features_only=True, **source)
    assert torch.equal(features.conv1.weight, model.conv1.weight)


def test_custom_load_of_the_user() -> None:
    with pytest.raises(Exception, match=r'weights_only|invalid load key'):  # timm's own loader
        timm.create_model(
            'atac_resnet8_cifar', pretrained=True, pretrained_cfg_overlay=dict(file=PARAMS, custom_load=False)
        )
    cfg: Any = timm.create_model('atac_resnet8_cifar', pretrained_cfg_overlay=dict(file=PARAMS)).pretrained_cfg
    assert not cfg['custom_load']


def test_the_call_for_weights_of_ones_own(monkeypatch) -> None:
    """The call that the error names works, with the architecture and no other argument."""
    monkeypatch.setitem(PUBLISHED, 'atac_resnet8_cifar.cifar10', Published('https://127.0.0.1/net.params', 'id'))
    with pytest.raises(ValueError, match='their own tag: ') as caught:
        timm.create_model('atac_resnet8_cifar', pretrained=True, pretrained_cfg_overlay=dict(file=PARAMS))
    call = str(caught.value).partition('their own tag: ')[2].rstrip('.')
    assert 'custom_load' not in call
    assert eval(call.replace('FILE.params', PARAMS)).pretrained_cfg['tag'] == 'mine'


def test_registered_weights() -> None:
    assert sorted(timm.list_pretrained(['atac_*', '*_cifar*'])) == sorted(PUBLISHED)
    cfg: Any = timm.get_pretrained_cfg('atac_resnet50')
    assert (cfg.tag, cfg.custom_load, cfg.hf_hub_id) == ('open_atac_in1k', True, None)
    assert cfg.url.startswith('https://github.com/YimianDai/open-atac/raw/')
    assert (cfg.input_size, cfg.crop_pct, cfg.interpolation) == ((3, 224, 224), 0.875, 'bilinear')
    assert [round(255 * v, 3) for v in (*cfg.mean, *cfg.std)] == [123.68, 116.779, 103.939, 58.393, 57.12, 57.375]
    assert cfg.license == 'none-stated' and 'states no licence' in cfg.description
    names = [published.url.rpartition('/')[2] for published in PUBLISHED.values() if published.url]
    assert len(set(names)) == len(names)  # timm caches downloads by the last part of their address


@pytest.mark.slow
def test_hub_first(python) -> None:
    """timm prefers an organisation on the Hub; the default tags do not change."""
    code = (
        'import timm; models = timm.list_models(["*atac*", "*_cifar"]);'
        'print([timm.get_pretrained_cfg(m).tag for m in models]);'
        'print(timm.get_pretrained_cfg("atac_resnet50").hf_hub_id)'
    )
    tags, hub_id = python(code).stdout.splitlines()
    assert hub_id == 'None'
    assert python(code, TIMM_ATAC_HUB_ORG='our-team').stdout.splitlines() == [tags, f'our-team/{NAME}']


def test_git_blob_id(tmp_path) -> None:
    path = tmp_path / 'file'
    path.write_bytes(b'x' * 3_000_000)
    assert git_blob_id(path) == hashlib.sha1(b'blob 3000000\0' + b'x' * 3_000_000).hexdigest()
    result = subprocess.run(['git', 'hash-object', path], capture_output=True, text=True, check=True)
    assert git_blob_id(path) == result.stdout.strip()

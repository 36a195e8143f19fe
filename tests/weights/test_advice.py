"""timm_atac/weights/advice.py: what an exception says when weights cannot be downloaded, and that this works."""

import json
import os
import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import forked
import pytest
import timm
import torch

from timm_atac.weights import advice
from timm_atac.weights.folder import save_for_hf
from timm_atac.weights.published import PUBLISHED, Published

NAME = 'atac_resnet8_cifar'
FILE = Path(__file__).parents[1] / 'data' / 'cifar_b1_atac.params'


def notes(error: BaseException) -> str:
    return '\n'.join(getattr(error, '__notes__', []))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope='module')
def closed() -> str:
    """An address where nobody answers."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{probe.getsockname()[1]}'


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    return tmp_path / 'hub' / 'checkpoints'


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=7), dict(features_only=True)], ids=str)
def test_both_ways_out_work(closed, home, kwargs) -> None:
    url = f'{closed}/folder/net.params?raw=true'

    def create() -> Any:
        return timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=dict(url=url, custom_load=True, tag='mine'), **kwargs
        )

    with pytest.raises(URLError) as caught:
        create()
    text = notes(caught.value).splitlines()
    assert text[0] == f'The weights of {NAME}.mine could not be downloaded from'
    assert text[1].strip() == url
    assert Path(text[3].strip()) == home / 'net.params'
    shutil.copy(FILE, text[3].strip())
    create()
    expected = (
        f"timm.create_model('{NAME}', pretrained=True, "
        f"pretrained_cfg_overlay=dict(file='FILE', custom_load=True, tag='mine'))"
    )
    assert text[5].strip() == expected
    model = eval(expected.replace('FILE', str(FILE)))
    assert same(model, timm.create_model(NAME, checkpoint_path=str(FILE)))


@pytest.mark.slow
def test_the_call_for_a_published_tag(closed, home, monkeypatch) -> None:
    """The call has the tag, so that the file is checked, and no custom_load, which the format of the file gives."""
    monkeypatch.setattr('timm.models._builder.download_cached_file', lambda *_, **__: download(closed))
    with pytest.raises(URLError) as caught:
        timm.create_model('atac_resnet50', pretrained=True)
    name = 'atac_resnet50.open_atac_in1k'
    text = notes(caught.value)
    assert text.endswith(f"timm.create_model('{name}', pretrained=True, pretrained_cfg_overlay=dict(file='FILE'))")
    assert PUBLISHED[name].url in text and str(home / PUBLISHED[name].url.rpartition('/')[2]) in text


def download(address: str) -> None:
    torch.hub.download_url_to_file(f'{address}/net.params', os.devnull)


def test_cache_dir(closed, tmp_path) -> None:
    overlay = dict(url=(f'{closed}/raw', 'net.params'), custom_load=True)
    with pytest.raises(URLError) as caught:
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    text = notes(caught.value).splitlines()
    assert (text[1].strip(), text[3].strip()) == (f'{closed}/raw', str(tmp_path / 'cache' / 'net.params'))


def test_not_found(site, home) -> None:
    with pytest.raises(HTTPError) as caught:
        timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=dict(url=f'{site[1]}/none.params', custom_load=True)
        )
    assert caught.value.code == 404
    assert f'{site[1]}/none.params' in notes(caught.value)
    caught.value.close()  # it has the connection


@pytest.mark.parametrize('content, hint', [(b'<html>Sign in</html>', 'web page'), (FILE.read_bytes()[:-9], '')])
def test_another_answer(site, home, monkeypatch, content, hint) -> None:
    """A proxy that sends a web page, and a truncated file: the message names the file to delete, without a note."""
    (site[0] / 'net.params').write_bytes(content)
    url = f'{site[1]}/net.params'
    monkeypatch.setitem(PUBLISHED, f'{NAME}.cifar10', Published(url, 'expected_id'))
    with pytest.raises(ValueError, match=f'expected_id.*{hint}.*delete it and try again') as caught:
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(url=url, custom_load=True))
    assert str(caught.value).startswith(str(home / 'net.params'))
    assert not notes(caught.value)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(rd_ratio=7),
        dict(colour=1),
        dict(pretrained_cfg_overlay=dict(colour=1)),
        dict(pretrained_cfg_overlay=dict(file='missing.params')),
        dict(pretrained_cfg_overlay=dict(file=str(FILE), custom_load=False)),
        dict(pretrained_cfg='cifar100'),
    ],
    ids=str,
)
def test_other_errors_have_no_note(kwargs) -> None:
    with pytest.raises(Exception) as caught:
        timm.create_model(NAME, pretrained=True, **kwargs)
    assert not notes(caught.value)


def test_hub(offline, tmp_path) -> None:
    overlay = dict(hf_hub_id='our-team/net@v1')
    with pytest.raises(OSError) as caught:
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert notes(caught.value).splitlines() == [
        f'The weights of {NAME}.cifar10 could not be downloaded from our-team/net@v1 on the Hugging Face Hub.',
        'HF_HUB_OFFLINE is set, so that only the cache of the Hub is read.',
        'On a machine with a network, run',
        '  hf download our-team/net --revision v1 --local-dir FOLDER',
        'Then call, with your other arguments,',
        "  timm.create_model('local-dir:FOLDER', pretrained=True)",
    ]


def test_hub_of_an_organisation(offline, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(advice, 'HUB_ORG', 'our-team')
    overlay = dict(hf_hub_id=f'our-team/{NAME}.cifar10', url='http://127.0.0.1/net.params')
    with pytest.raises(OSError) as caught:
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert "TIMM_ATAC_HUB_ORG=our-team chose this repository. Without it, the authors' file is loaded from\n" in notes(
        caught.value
    )
    assert '  http://127.0.0.1/net.params\n' in notes(caught.value)


def test_hub_by_name(offline, tmp_path) -> None:
    """`hf-hub:` with a config.json in the cache, and without weights."""
    save_for_hf(timm.create_model(NAME), tmp_path / 'net')
    repository = tmp_path / 'models--me--net'
    (repository / 'refs').mkdir(parents=True)
    (repository / 'refs' / 'main').write_text('0' * 40)
    (repository / 'snapshots' / ('0' * 40)).mkdir(parents=True)
    shutil.copy(tmp_path / 'net' / 'config.json', repository / 'snapshots' / ('0' * 40))
    with pytest.raises(OSError) as caught:
        timm.create_model('hf-hub:me/net', pretrained=True, cache_dir=tmp_path)
    assert 'hf download me/net --local-dir FOLDER' in notes(caught.value)


@pytest.mark.parametrize('host', ['resnet18.a1_in1k', 'hf-hub:timm/resnet18.a1_in1k'])
def test_weights_of_a_host(offline, tmp_path, host) -> None:
    with pytest.raises(OSError) as caught:
        timm.create_model('atac_host', host=host, pretrained=True, cache_dir=tmp_path)
    text = notes(caught.value)
    assert 'hf download timm/resnet18.a1_in1k --local-dir FOLDER' in text
    assert text.endswith("timm.create_model('atac_host', pretrained=True, host='local-dir:FOLDER')")


@pytest.mark.slow
def test_file_of_a_host(closed, home, tmp_path) -> None:
    """The note is that of the file's network, and there is one; a host's own overlay reaches it."""
    overlay: dict[str, Any] = dict(url=f'{closed}/net.params', custom_load=True)
    with pytest.raises(URLError) as caught:
        timm.create_model('atac_host', host=dict(model_name=NAME, pretrained_cfg_overlay=overlay), pretrained=True)
    assert notes(caught.value).count('could not be downloaded') == 1
    save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'net')
    weights = str(tmp_path / 'net' / 'model.safetensors')
    overlay = dict(url=f'{closed}/net.pth', hf_hub_id=None, num_classes=3)
    host = dict(model_name='test_resnet', pretrained_cfg_overlay=overlay)
    with pytest.raises(URLError) as caught:
        timm.create_model('atac_host', host=host, pretrained=True)
    assert notes(caught.value).endswith(
        "timm.create_model('atac_host', pretrained=True, "
        "host=dict(model_name='test_resnet', pretrained_cfg_overlay=dict(file='FILE')))"
    )
    host['pretrained_cfg_overlay'] = dict(file=weights, num_classes=3)
    model: Any = timm.create_model('atac_host', host=host, pretrained=True)
    assert model.num_classes == 3


def test_before_python_3_11(closed, home, monkeypatch, caplog) -> None:
    """Tracebacks show no notes, so the text is logged."""
    version = namedtuple('version', 'major minor micro releaselevel serial')
    overlay = dict(url=f'{closed}/net.params', custom_load=True)
    with monkeypatch.context() as patch, pytest.raises(URLError) as caught:
        patch.setattr(sys, 'version_info', version(3, 10, 0, 'final', 0))
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert [record.message for record in caplog.records if record.name == advice.__name__] == [notes(caught.value)]


@pytest.mark.slow
def test_what_a_user_sees(closed, tmp_path) -> None:
    """The text is in the output of a program, and from Python 3.11 at its end."""
    overlay = dict(url=f'{closed}/net.params', custom_load=True)
    code = f'import timm; timm.create_model({NAME!r}, pretrained=True, pretrained_cfg_overlay={overlay})'
    environment = {**os.environ, 'TORCH_HOME': str(tmp_path)}
    result = forked.run(code, env=environment)
    lines = result.stderr.splitlines()
    assert any(line.startswith('urllib.error.URLError') for line in lines)
    call = f"  timm.create_model('{NAME}', pretrained=True, pretrained_cfg_overlay=dict(file='FILE', custom_load=True))"
    assert lines[-1] == call if sys.version_info >= (3, 11) else call in lines


@pytest.mark.slow
def test_organisation_of_the_environment(python, tmp_path) -> None:
    code = (
        'import json, timm\n'
        'try:\n'
        "    timm.create_model('atac_resnet50', pretrained=True)\n"
        'except OSError as error:\n'
        '    print(json.dumps([type(error).__name__, *error.__notes__]))\n'
    )
    environment = dict(TIMM_ATAC_HUB_ORG='our-team', HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(tmp_path))
    kind, text = json.loads(python(code, **environment).stdout)
    assert kind == 'LocalEntryNotFoundError'
    assert 'hf download our-team/atac_resnet50.open_atac_in1k --local-dir FOLDER' in text
    assert PUBLISHED['atac_resnet50.open_atac_in1k'].url in text

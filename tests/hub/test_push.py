"""`timm-atac push` to a Hub on 127.0.0.1 and the download by timm, each in a process of its own."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import timm
import torch
from hub_store import File
from loopback_hub import Failures, LoopbackHub
from safetensors.torch import load_file, save_file

from timm_atac.hub.export import export
from timm_atac.weights.folder import load_folder

ablation = pytest.importorskip('ablation', reason="needs the packages of the extra 'ablation'")
store = pytest.importorskip('ablations.store')
pytest.importorskip('sklearn', reason="needs the packages of the extra 'ablation'")

PUSH = """
import sys, time
from timm_atac.cli import main
time.sleep = lambda seconds: None  # the client waits between its tries
sys.exit(main(['push', *sys.argv[1:]]))
"""
# several in one process, with a token each: a line of JSON with what each printed
PUSHES = """
import contextlib, io, json, os, sys
from timm_atac.cli import main
results = []
for token, *arguments in json.loads(sys.argv[1]):
    os.environ['HF_TOKEN'] = token
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(['push', *arguments])
    results.append((status, output.getvalue(), errors.getvalue()))
print(json.dumps(results))
"""
# the code of a user of timm, without an import of timm_atac
PULL = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
model = timm.create_model(sys.argv[1], pretrained=True).eval()
with torch.inference_mode():
    save_file({'logits': model(load_file(sys.argv[2])['images'])}, sys.argv[3])
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Any:
    """The folder of a network that the ablation has trained, its accuracy, and the test set."""
    output = tmp_path_factory.mktemp('ablation') / 'out'
    ablation.main(['--acts', 'atac', '--epochs', '3', '--seeds', '1', '--export', '--output', str(output)])
    (row,) = store.read_rows(output / 'ablation.csv')
    data = ablation.load('digits', 16, output, download=False)
    images, labels = data.test
    return output / row.run.name, row.result.accuracy, (data.normalize(images), labels)


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(tokens={'hf_right': 'me', 'hf_other': 'other'}) as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path) -> Run:
    """Run code as a user of the Hub: `run(code, *arguments, token=..., **environment)`."""

    def run(code: str, *args: object, token: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return forked.run(code, *map(str, args), env={**hub.environment(tmp_path / 'home', token), **env})

    return run


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert result.returncode == 1, result.stderr
    assert 'Traceback' not in result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith('timm-atac push: error: '))
    return line.removeprefix('timm-atac push: error: ')


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small network, untrained."""
    torch.manual_seed(0)
    path = tmp_path / 'folder'
    export(timm.create_model('atac_resnet8_cifar', in_chans=1), path, {'license': 'apache-2.0'})
    return path


@pytest.mark.slow
def test_round_trip(hub, run, digits, tmp_path) -> None:
    """Trained, exported, pushed, pulled by timm alone in another process, and validated to the same accuracy."""
    folder, accuracy, test_set = digits
    assert accuracy > 80
    pushed = run(PUSH, folder, '--repo', 'me/digits')
    assert pushed.returncode == 0, pushed.stderr
    assert f'Pushed to {hub.endpoint}/me/digits' in pushed.stdout
    first, *commits = hub.commits('me/digits')
    assert first[1] == ['.gitattributes']
    assert commits == [('Upload resnet8_cifar.digits', ['README.md', 'config.json', 'gates.png', 'model.safetensors'])]
    files = hub.files('me/digits')
    for name in ('config.json', 'gates.png', 'model.safetensors'):
        assert files[name] == (folder / name).read_bytes()
    card = files['README.md'].decode()
    assert "create_model('hf-hub:me/digits', pretrained=True)" in card
    assert card.replace('me/digits', 'OWNER/NAME') == (folder / 'README.md').read_text()

    images, labels = test_set
    save_file({'images': images}, tmp_path / 'images.safetensors')
    pulled = run(PULL, 'hf-hub:me/digits', tmp_path / 'images.safetensors', tmp_path / 'logits.safetensors')
    assert pulled.returncode == 0, pulled.stderr
    logits = load_file(tmp_path / 'logits.safetensors')['logits']
    with torch.inference_mode():
        torch.testing.assert_close(logits, load_folder(folder)(images))
    found = 100 * (logits.argmax(1) == labels).float().mean().item()
    print(f'trained: {accuracy:.3f} %, pushed and pulled: {found:.3f} %')
    assert found == pytest.approx(accuracy, abs=1e-3)

    again = run(PUSH, folder, '--repo', 'me/digits')
    assert again.returncode == 0, again.stderr
    assert f'Nothing has changed in {hub.endpoint}/me/digits' in again.stdout
    assert len(hub.commits('me/digits')) == 2

    # with a card without a picture, the old picture is deleted
    (folder / 'gates.png').unlink()
    assert 'shows gates.png, which is missing' in error_of(run(PUSH, folder, '--repo', 'me/digits'))
    text = (folder / 'README.md').read_text()
    (folder / 'README.md').write_text(text.replace('](gates.png)', ']'))
    assert run(PUSH, folder, '--repo', 'me/digits').returncode == 0
    assert hub.commits('me/digits')[2:] == [('Upload resnet8_cifar.digits', ['README.md', 'gates.png'])]


@pytest.mark.slow
def test_refusals(hub, run, folder) -> None:
    """A push that fails says why and what to do in one line, and the Hub does not change."""
    right, name = 'hf_right', 'me/atac_resnet8_cifar'

    def errors(*pushes: tuple[str, ...], **env: str) -> list[str]:
        """Of several pushes of the folder, by token and arguments."""
        arguments = json.dumps([(token, str(folder), *rest) for token, *rest in pushes])
        result = run(PUSHES, arguments, **env)
        assert result.returncode == 0, result.stderr
        return [
            error_of(subprocess.CompletedProcess((), *found)) for found in json.loads(result.stdout.splitlines()[-1])
        ]

    found = errors(
        ('', '--repo', 'me/net'),
        ('hf_wrong', '--repo', 'me/net'),
        (right, '--repo', 'them/net'),
        (right, '--repo', 'me/a..b'),
        (right, '--repo', 'net'),
        (right,),
    )
    assert 'No token for the Hub: run `hf auth login`' in found[0]
    assert 'does not accept the token' in found[1] and 'HF_TOKEN' in found[1]
    assert "use one with write access to 'them'" in found[2]
    assert "'me/a..b' is not the name of a repository" in found[3]
    assert 'expected OWNER/NAME' in found[4]
    assert 'give --repo OWNER/NAME, or set TIMM_ATAC_HUB_ORG' in found[5]
    (letter,) = errors(('hf_\u00e4', '--repo', 'me/net'))
    assert 'HF_TOKEN has a letter that no token has' in letter and '\u00e4' not in letter
    (empty,) = (error_of(run(PUSH, folder.parent, '--repo', 'me/net', token='')),)
    assert 'has no config.json' in empty  # before the token
    (offline,) = errors((right, '--repo', 'me/net'), HF_HUB_OFFLINE='1')
    assert 'HF_HUB_OFFLINE is set; unset it' in offline
    (no_home,) = errors(('', '--repo', 'me/net'), HF_HOME=str(folder / 'config.json'))
    assert 'The saved token cannot be read (' in no_home and 'set HF_HOME to a folder' in no_home
    (nowhere,) = errors((right, '--repo', 'me/net'), HF_ENDPOINT='http://127.0.0.1:9')
    assert nowhere.startswith('http://127.0.0.1:9 cannot be reached') and 'Nothing is half pushed' in nowhere
    assert not hub.repositories

    # after a card that the Hub refuses, the new repository is deleted
    card = folder / 'README.md'
    text = card.read_text()
    card.write_text(text.replace('license: apache-2.0', 'license: apache-2.0\nlicense_link: 3'))
    (unfit,) = errors((right, '--repo', 'me/net', '--yes'))
    assert 'The Hub refuses the card' in unfit
    card.write_text(text.replace('license: apache-2.0', 'license: apache2'))
    (wrong,) = errors((right, '--repo', 'me/net', '--yes'))
    assert "the licence 'apache2' is not known to the Hub; did you mean 'apache-2.0'?" in wrong
    assert not hub.repositories
    card.write_text(text)

    # a repository with another network, or a public one, does not change
    assert run(PUSH, folder, TIMM_ATAC_HUB_ORG='me').returncode == 0
    assert list(hub.repositories) == [name]
    config = json.loads((folder / 'config.json').read_text())
    other = {**config, 'architecture': 'resnet8_cifar', 'model_args': {'act_layer': 'atac', 'in_chans': 1}}
    (folder / 'config.json').write_text(json.dumps(other))
    taken, public = errors((right, '--repo', name), (right, '--repo', name, '--private'))
    assert f'{name} holds atac_resnet8_cifar, not resnet8_cifar: give another --repo' in taken
    assert 'exists and is public' in public
    assert len(hub.commits(name)) == 2


@pytest.mark.slow
def test_a_push_that_breaks(hub, run, folder) -> None:
    """The server stops in the middle of an upload, or fails at the commit: no commit is incomplete."""
    hub.fail = Failures(upload_dies_at=100_000)
    line = error_of(run(PUSH, folder, '--repo', 'me/net'))
    assert 'cannot be reached, or the connection broke' in line and 'Nothing is half pushed' in line
    hub.fail = Failures()
    hub.start()
    assert [files for _, files in hub.commits('me/net')] == [
        ['.gitattributes']
    ]  # the server was gone, so the repository could not be deleted

    hub.fail = Failures(status={'commit': 500})
    assert 'The Hub failed' in error_of(run(PUSH, folder, '--repo', 'me/other', '--private'))
    assert list(hub.repositories) == ['me/net']  # the new repository was deleted

    hub.fail = Failures()
    assert run(PUSH, folder, '--repo', 'me/net').returncode == 0
    assert len(hub.commits('me/net')) == 2
    assert run(PUSH, folder, '--repo', 'me/other', '--private').returncode == 0
    assert hub.repositories['me/other'].private


@pytest.mark.slow
def test_pull_of_what_is_broken(hub, run, folder, tmp_path) -> None:
    """timm raises an error for weights that are damaged on the way and for an unknown architecture."""
    save_file({'images': torch.zeros(1, 1, 32, 32)}, tmp_path / 'images.safetensors')
    paths = (tmp_path / 'images.safetensors', tmp_path / 'logits.safetensors')
    config = json.loads((folder / 'config.json').read_text())
    assert run(PUSH, folder, '--repo', 'me/net').returncode == 0
    data = (folder / 'model.safetensors').read_bytes()
    files = hub.repositories['me/net'].at('main').files
    for name, content, error in (
        ('model.safetensors', b'\xff' * 8 + data[8:], 'SafetensorError'),
        ('model.safetensors', data[: len(data) // 2], 'SafetensorError'),
        ('config.json', json.dumps({**config, 'architecture': 'atac_resnet9'}).encode(), 'Unknown model'),
    ):
        whole = files[name]
        files[name] = File(content, whole.lfs)
        result = run(PULL, 'hf-hub:me/net', *paths, HF_HOME=str(tmp_path / f'home{len(content)}'))
        files[name] = whole
        assert result.returncode == 1
        assert error in result.stderr.splitlines()[-1]
        assert not paths[1].exists()

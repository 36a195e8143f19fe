"""`huggingface_hub` as a client of tests/helpers/loopback_hub.py."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_cards import card_errors
from loopback_hub import Failures, LoopbackHub

CARD = """---
license: apache-2.0
tags:
- image-classification
model-index:
- name: model
  results:
  - task: {type: image-classification}
    dataset: {type: cifar10, name: CIFAR-10}
    metrics:
    - {type: accuracy, value: 0.9}
---
# model
"""
PRELUDE = """
import json, os, sys, time
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api, folder = HfApi(), Path(os.environ['FOLDER'])
naps = []
time.sleep = naps.append  # a client waits between its tries

def push(message='Upload', name='me/model'):
    return api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).oid

def error(function, *args, **kwargs):
    try:
        return repr(function(*args, **kwargs))
    except Exception as e:
        while isinstance(e, RuntimeError):
            e = e.__cause__
        return [type(e).__name__, getattr(getattr(e, 'response', None), 'status_code', None), str(e)]

def answer(*values):
    print(json.dumps(values))
"""
Client = Callable[..., list[Any]]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(tokens={'hf_right': 'me', 'hf_other': 'other'}) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / 'folder'
    (folder / 'examples').mkdir(parents=True)
    (folder / 'README.md').write_text(CARD)
    (folder / 'config.json').write_text('{}')
    (folder / 'model.safetensors').write_bytes(os.urandom(3_000_000))
    (folder / 'examples' / 'a b.png').write_bytes(os.urandom(5_000))
    return folder


@pytest.fixture
def client(hub: LoopbackHub, folder: Path, tmp_path: Path) -> Client:
    """Run code in a process that can only reach this Hub; returns what the code gives to `answer`."""

    def run(code: str, token: str | None = None, **env: str) -> list[Any]:
        env = {**hub.environment(tmp_path / 'home', token), 'FOLDER': str(folder), **env}
        command = [sys.executable, '-c', PRELUDE + code]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return [*json.loads(result.stdout), result.stderr]

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.slow
def test_push_and_pull(hub, folder, client) -> None:
    oid, copy, names, private, sizes, exist, again, warning = client("""
api.create_repo('me/model', private=True)
oid = push()
copy = snapshot_download('me/model', local_dir=folder.parent / 'copy')
file = hf_hub_download('me/model', 'model.safetensors')
assert Path(file).read_bytes() == (folder / 'model.safetensors').read_bytes()
info = api.model_info('me/model', files_metadata=True)
assert info.sha == oid and info.card_data.license == 'apache-2.0' and info.card_data.eval_results[0].metric_value == 0.9
exist = [api.repo_exists('me/model'), api.repo_exists('me/no'), api.file_exists('me/model', 'config.json'),
         api.file_exists('me/model', 'no.json')]
sizes = {s.rfilename: [s.size, s.lfs is not None] for s in info.siblings}
answer(oid, copy, api.list_repo_files('me/model'), info.private, sizes, exist, push('Again'))
""")
    files = content(folder)
    attributes = hub.files('me/model')['.gitattributes']
    assert hub.files('me/model') == files | {'.gitattributes': attributes}
    assert {path: data for path, data in content(Path(copy)).items() if not path.startswith('.')} == files
    assert names == sorted([*files, '.gitattributes'])
    assert private and exist == [True, False, True, False]
    lfs = ('model.safetensors', 'examples/a b.png')
    assert sizes == {path: [len(data), path in lfs] for path, data in hub.files('me/model').items()}
    # one commit, of the first upload alone
    assert hub.commits('me/model') == [('initial commit', ['.gitattributes']), ('Upload', sorted(files))]
    assert again == oid and 'No files have been modified' in warning
    assert [path for method, path in hub.requests].count('/api/models/me/model/commit/main') == 1


@pytest.mark.slow
def test_later_commits(hub, client) -> None:
    *errors, kept, part, _ = client("""
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete
from huggingface_hub.utils import get_session
api.create_repo('me/model')
first = push()
with (folder / 'config.json').open('w') as file:
    file.write('{"changed": true}')
push('Change')
api.create_commit('me/model', [Delete('examples/'), Add('model.safetensors', b'')], commit_message='Delete')
errors = [error(api.create_commit, 'me/model', [Add('x.txt', b'x'), Delete('no.txt')], commit_message='Nothing'),
          error(api.create_commit, 'me/model', [Add('x.txt', b'x')], commit_message='Late', parent_commit=first)]
unknown = {'path': 'y.png', 'algo': 'sha256', 'oid': '0' * 64, 'size': 1}
lines = [{'key': 'header', 'value': {'summary': 'Nothing'}},
         {'key': 'file', 'value': {'path': 'x.txt', 'content': ''}}, {'key': 'lfsFile', 'value': unknown}]
token, url = {'Authorization': 'Bearer hf_right'}, api.endpoint
reply = get_session().post(f'{url}/api/models/me/model/commit/main', headers=token,
                           content='\\n'.join(map(json.dumps, lines)))
errors.append(['', reply.status_code, reply.text])
kept = Path(hf_hub_download('me/model', 'config.json', revision=first)).read_text()
part = get_session().get(f'{url}/me/model/resolve/main/config.json', headers={'Range': 'bytes=2-8'})
answer(*errors, kept, [part.status_code, part.text, part.headers['Content-Range']])
""")
    assert [error[1] for error in errors] == [404, 412, 400]
    assert hub.commits('me/model')[2:] == [
        ('Change', ['config.json']),
        ('Delete', ['examples/a b.png', 'model.safetensors']),
    ]
    assert kept == '{}' and part == [206, 'changed', 'bytes 2-8/17']


@pytest.mark.slow
def test_errors(hub, client) -> None:
    *errors, _ = client("""
api.create_repo('me/model', private=True)
push()
wrong, other = HfApi(token='hf_wrong'), HfApi(token='hf_other')
nobody = HfApi(token=False)
answer(
    error(wrong.whoami),
    error(wrong.create_repo, 'me/new'),
    error(wrong.model_info, 'me/model'),
    error(nobody.create_repo, 'me/new'),
    error(nobody.model_info, 'me/model'),
    error(nobody.hf_hub_download, 'me/model', 'config.json', force_download=False),
    error(other.create_repo, 'me/new'),
    error(other.model_info, 'me/model'),
    error(other.upload_file, repo_id='me/model', path_in_repo='x', path_or_fileobj=b''),
    error(api.create_repo, 'me/model'),
    error(hf_hub_download, 'me/model', 'no.json'),
    error(hf_hub_download, 'me/model', 'config.json', revision='no'),
    error(api.delete_repo, 'me/no'),
    error(api.create_repo, 'me/a/b'),
    error(api.create_branch, 'me/model', branch='new'),
)
""")
    assert [error[:2] for error in errors] == [
        ['HfHubHTTPError', 401],
        ['HfHubHTTPError', 401],
        ['HfHubHTTPError', 401],
        ['HfHubHTTPError', 401],
        ['RepositoryNotFoundError', 401],
        ['RepositoryNotFoundError', 401],
        ['HfHubHTTPError', 403],
        ['RepositoryNotFoundError', 404],
        ['RepositoryNotFoundError', 404],
        ['HfHubHTTPError', 409],
        ['RemoteEntryNotFoundError', 404],
        ['RevisionNotFoundError', 404],
        ['RepositoryNotFoundError', 404],
        ['HFValidationError', None],
        ['HfHubHTTPError', 501],
    ]


@pytest.mark.slow
def test_foreign_namespace(hub, client) -> None:
    hub.organizations['ours'] = {'me'}
    created, forbidden, exists, _, _ = client("""
api.create_repo('ours/model'), api.create_repo('me/model')
other = HfApi(token='hf_other')
answer(push(name='ours/model'), error(other.upload_folder, repo_id='me/model', folder_path=folder),
       str(other.create_repo('me/model', exist_ok=True)), api.delete_repo('me/model'))
""")
    assert created == hub.repositories['ours/model'].history[-1].oid
    assert forbidden[:2] == ['HfHubHTTPError', 403] and 'create a Pull Request' in forbidden[2]
    assert exists == f'{hub.endpoint}/me/model'
    assert list(hub.repositories) == ['ours/model']


@pytest.mark.slow
def test_bad_card(hub, folder, client) -> None:
    (folder / 'README.md').write_text(CARD.replace('apache-2.0', 'apache'))
    bad, _ = client("api.create_repo('me/model'); answer(error(push))")
    assert bad[0] == 'ValueError' and '"license" must be one of' in bad[2]
    assert len(hub.commits('me/model')) == 1
    assert not any(path.startswith('/lfs') for _, path in hub.requests)


@pytest.mark.parametrize(
    ('old', 'new', 'error'),
    [
        ('', '', None),
        ('license: apache-2.0', 'license: other\nlicense_name: ours', None),
        ('license: apache-2.0', 'license: other', '"license_name" is required'),
        ('- image-classification', '- no', '"tags[0]" must be a string'),
        ('- name: model', '-', '"model-index[0].name" is required'),
        ('task: {type: image-classification}', 'task: {}', '"model-index[0].results[0].task.type" is required'),
        ('name: CIFAR-10', 'id: x', '"model-index[0].results[0].dataset.name" is required'),
        (', value: 0.9', '', '"model-index[0].results[0].metrics[0].value" is required'),
        ('license: apache-2.0', 'license: [', 'bad yaml'),
    ],
)
def test_card_errors(old, new, error) -> None:
    errors = card_errors(CARD.replace(old, new))
    assert [error] == [e[: len(error)] for e in errors] if error else not errors


@pytest.mark.slow
def test_death_in_upload(hub, folder, client) -> None:
    hub.fail.upload_dies_at = 1_000_000
    (folder / 'examples' / 'a b.png').unlink()  # its upload would be tried again beside the other's
    died, naps, refused, _ = client("""
api.create_repo('me/model')
answer(error(push), naps, error(api.model_info, 'me/model'))
""")
    assert died[0] == refused[0] == 'ConnectError'
    assert naps == [1, 2, 4, 8, 8]
    assert len(hub.commits('me/model')) == 1
    assert (folder / 'model.safetensors').read_bytes() not in hub.repositories['me/model'].objects.values()
    hub.fail = Failures()
    hub.start()
    client('answer(push())')
    assert len(hub.commits('me/model')) == 2


@pytest.mark.slow
def test_passing_failures(hub, folder, client) -> None:
    hub.fail = Failures(upload_drops=1, status={'commit': 500}, corrupt={'model.safetensors'})
    failed, naps, _ = client("api.create_repo('me/model'); answer(error(push), naps)")
    assert failed[:2] == ['HfHubHTTPError', 500] and naps == [1]  # the upload is tried again, the commit is not
    assert len(hub.commits('me/model')) == 1
    hub.fail.status.clear()
    path, _ = client("push(); answer(hf_hub_download('me/model', 'model.safetensors'))")
    assert [method for method, path in hub.requests].count('PUT') == 3  # two files, one of them twice; then none
    served, sent = Path(path).read_bytes(), (folder / 'model.safetensors').read_bytes()
    assert len(served) == len(sent) and sum(a != b for a, b in zip(served, sent, strict=True)) == 1


@pytest.mark.slow
def test_offline(client) -> None:
    *errors, _ = client(
        "answer(error(api.model_info, 'me/model'), error(hf_hub_download, 'me/model', 'x'))", HF_HUB_OFFLINE='1'
    )
    assert [error[0] for error in errors] == ['OfflineModeIsEnabled', 'LocalEntryNotFoundError']

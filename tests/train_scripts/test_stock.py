"""train_scripts/stock.py"""

import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import stock
import timm

STOCK = Path(stock.__file__)
VERSION = '1.0.99'  # of the archives
SHOW = r"""
import json, os, sys
said = [sys.argv, os.getpid(), os.environ.get('RANK'), sys.warnoptions, sys.path[0]]
sys.stdout.write(json.dumps(said) + '\n')  # in one write, since other processes write too; print makes two
sys.exit(7 if 'fail' in sys.argv else 0)
"""


def archive(version: str = VERSION, leave_out: str = '') -> bytes:
    """Return a small archive like those that GitHub serves for a tag."""
    files = {
        'train.py': f'# {"train " * 1000}',
        'validate.py': '# validate',
        'README.md': 'timm',
        'timm/version.py': f"__version__ = '{version}'\n",
        'timm/train.py': '# of the package',
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as whole:
        for name, text in files.items():
            if name != leave_out:
                whole.writestr(f'pytorch-image-models-{version}/{name}', text)
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """Answers every request with the first `sent` bytes of `body`, then closes the connection."""

    daemon_threads = True
    body = archive()
    sent: int | None = None
    status = 200
    hangs = False  # if True, it waits for `go` before it sends the second half

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.requests: list[str] = []
        self.come = threading.Semaphore(0)
        self.go = threading.Event()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_address[1]}/v{{version}}.zip'


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(self.server.status)
        self.send_header('Content-Length', str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body[: len(self.server.body) // 2])
        self.server.come.release()
        if self.server.hangs:
            self.server.go.wait(60)
        self.wfile.write(self.server.body[len(self.server.body) // 2 : self.server.sent])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        monkeypatch.setattr(stock, 'ARCHIVE', server.url)
        yield server
        server.go.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of an empty cache. TIMM_SCRIPTS is not set."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    return tmp_path / 'cache' / 'timm_atac'


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder of scripts that TIMM_SCRIPTS names."""
    folder = tmp_path / 'check out'
    folder.mkdir()
    (folder / 'show.py').write_text(SHOW)
    (folder / 'hubconf.py').write_text('')
    monkeypatch.setenv('TIMM_SCRIPTS', str(folder))
    return folder


def error(*argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        stock.main(argv)
    message = str(caught.value)
    assert message.startswith('stock.py: ') and '\n' not in message
    return message


def test_download(server, cache, monkeypatch, capsys) -> None:
    monkeypatch.setattr(stock, 'installed_version', lambda: VERSION)
    handler = signal.getsignal(signal.SIGTERM)
    stock.main(['--where'])
    folder = cache / f'timm-scripts-{VERSION}'
    assert capsys.readouterr().out == f'{folder}\n'
    assert sorted(path.name for path in folder.iterdir()) == ['train.py', 'validate.py']
    assert (folder / 'train.py').read_text().startswith('# train')  # not timm/train.py
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask()
    assert (signal.getsignal(signal.SIGTERM), socket.getdefaulttimeout()) == (handler, None)
    stock.main(['--where'])
    assert server.requests == [f'/v{VERSION}.zip']


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Failure(NamedTuple):
    message: str
    body: bytes = archive()
    sent: int | None = None
    status: int = 200
    hangs: bool = False


@pytest.mark.parametrize(
    'failure',
    [
        Failure('HTTPError: HTTP Error 404', status=404),
        Failure('HTTPError: HTTP Error 503', status=503),
        Failure('BadZipFile: File is not a zip file', sent=-100),  # the connection is closed early
        Failure('BadZipFile: File is not a zip file', body=archive()[:-100]),
        Failure('BadZipFile: File is not a zip file', body=b'<html>'),
        Failure("BadZipFile: Bad CRC-32 for file 'pytorch", body=archive().replace(b'train train', b'train trail', 1)),
        Failure('StockError: the archive contains timm 1.0.98', body=archive('1.0.98')),
        Failure('StockError: the archive lacks train.py', body=archive(leave_out='train.py')),
        Failure('StockError: the archive lacks timm/version.py', body=archive(leave_out='timm/version.py')),
        Failure('TimeoutError: timed out', hangs=True),
    ],
    ids=lambda failure: failure.message.split(': ')[-1],
)
@pytest.mark.filterwarnings('ignore:unclosed <socket:ResourceWarning')
def test_failed_download(failure, server, cache, monkeypatch) -> None:
    monkeypatch.setattr(stock, 'installed_version', lambda: VERSION)
    monkeypatch.setattr(stock, 'TIMEOUT', 0.3)
    server.body, server.sent, server.status, server.hangs = failure[1:]
    message = error('train.py')
    assert failure.message in message
    assert server.url.format(version=VERSION) in message
    assert f'git clone --depth 1 --branch v{VERSION} {stock.REPOSITORY}, and `export TIMM_SCRIPTS=' in message
    assert list(cache.iterdir()) == []
    if failure.hangs:
        gc.collect()  # PyTorch 2.5 does not close this connection


def test_no_server(server, cache, monkeypatch) -> None:
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))  # bound, but not listening
        monkeypatch.setattr(stock, 'ARCHIVE', f'http://127.0.0.1:{unused.getsockname()[1]}/')
        assert 'Connection refused' in error('train.py')
    assert list(cache.iterdir()) == []


def test_cache_folder_is_not_empty(server, cache, monkeypatch) -> None:
    monkeypatch.setattr(stock, 'installed_version', lambda: VERSION)
    (cache / f'timm-scripts-{VERSION}' / 'mine').mkdir(parents=True)
    assert 'exists already; give another name, or remove it first' in error('train.py')
    assert not server.requests


def test_development_version(server, monkeypatch) -> None:
    monkeypatch.setattr(stock, 'installed_version', lambda: '1.0.99.dev0')
    assert 'timm 1.0.99.dev0 is not a release; set TIMM_SCRIPTS to the checkout' in error('train.py')
    assert not server.requests


def start(server: Server) -> subprocess.Popen:
    """Start a process that downloads by urllib, since importing torch takes longer than the test."""
    code = f"""
import stock, sys, types, urllib.request
hub = types.SimpleNamespace(download_url_to_file=lambda url, path, progress: urllib.request.urlretrieve(url, path))
sys.modules.update({{'torch': types.ModuleType('torch'), 'torch.hub': hub}})
stock.ARCHIVE = {server.url!r}
stock.installed_version = lambda: {VERSION!r}
stock.main(['--where'])
"""
    return subprocess.Popen(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': str(STOCK.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_parallel_downloads_of_which_one_is_stopped(server, cache) -> None:
    server.hangs = True
    processes = [start(server) for _ in range(3)]
    try:
        for _ in processes:
            assert server.come.acquire(timeout=60)  # all have received the first half
        stopped, *others = processes
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(60) == 128 + signal.SIGTERM
        assert len(list(cache.iterdir())) == 2  # hidden folders of the others
        server.go.set()
        for process in others:
            printed, errors = process.communicate(timeout=60)
            assert printed == f'{cache}/timm-scripts-{VERSION}\n', errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [path.name for path in cache.iterdir()] == [f'timm-scripts-{VERSION}']


def show(*command: str, **env: str) -> list[list]:
    """Run a command whose script is `SHOW`, and return what each of its processes printed."""
    result = subprocess.run(
        [sys.executable, *command], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return sorted((json.loads(line) for line in result.stdout.splitlines()), key=lambda said: said[2] or '')


def test_process_is_replaced_by_the_script(checkout) -> None:
    arguments = ['fail', '--model-kwargs', "act_layer='atac'", '--where', '', 'show.py', 'a  b']
    process = subprocess.Popen([sys.executable, '-W', 'ignore::UserWarning', STOCK, 'show.py', *arguments], stdout=-1)
    printed, _ = process.communicate(timeout=60)
    script = str(checkout / 'show.py')
    assert json.loads(printed) == [[script, *arguments], process.pid, None, ['ignore::UserWarning'], str(checkout)]
    assert process.returncode == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    'command',
    [
        ['-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', str(STOCK), 'show.py', '--lr', '1'],
        [str(STOCK), 'torchrun', '--nproc-per-node', '2', '--standalone', 'show.py', '--lr', '1'],
    ],
    ids=['torchrun stock.py', 'stock.py torchrun'],
)
def test_torchrun(command, checkout) -> None:
    said = show(*command, OMP_NUM_THREADS='1')
    assert [(argv, rank) for argv, _, rank, _, _ in said] == [
        ([str(checkout / 'show.py'), '--lr', '1'], rank) for rank in '01'
    ]


@pytest.mark.parametrize(
    'argv, expected',
    [
        (['show.py'], ['{}/show.py']),
        (['show.py', 'show.py', '-h'], ['{}/show.py', 'show.py', '-h']),
        (['torchrun', 'show.py', '--nnodes', '2'], ['-m', 'torch.distributed.run', '{}/show.py', '--nnodes', '2']),
        (
            ['torchrun', '--nproc-per-node', '2', '--log-dir', 'train', '-t=3', 'show.py', 'torchrun', 'show.py'],
            [
                *['-m', 'torch.distributed.run', '--nproc-per-node', '2', '--log-dir', 'train', '-t=3'],
                *['{}/show.py', 'torchrun', 'show.py'],
            ],
        ),
    ],
)
def test_command(argv, expected, checkout) -> None:
    assert stock.command(argv, checkout) == [part.format(checkout) for part in expected]


@pytest.mark.parametrize(
    'argv, message',
    [
        ([], 'got []; see --help'),
        (['--wher'], "got ['--wher']; see --help"),
        (['--nproc-per-node', '2', 'show.py'], "got ['--nproc-per-node']; see --help"),
        (['train.py', 'show.py'], "got 'train.py'; it has: show.py"),
        (['hubconf.py'], "got 'hubconf.py'; it has: show.py"),
        (['shwo.py'], "got 'shwo.py'; did you mean 'show.py'?"),
        (['torchrun', '--nnodes', '2'], "got '--nnodes', '2'; it has: show.py"),
        (['torchrun'], 'got nothing; it has: show.py'),
    ],
)
def test_wrong_arguments(argv, message, checkout) -> None:
    assert message in error(*argv)


def test_wrong_timm_scripts(checkout, monkeypatch) -> None:
    (checkout / 'show.py').unlink()
    assert f"expected a script of {checkout}, got 'train.py'; it has: none" in error('train.py')
    monkeypatch.setenv('TIMM_SCRIPTS', f'{checkout}/none')
    assert f'TIMM_SCRIPTS={checkout}/none is not a folder' in error('--where')


def test_help(capsys) -> None:
    stock.main(['-h'])
    printed = capsys.readouterr().out
    assert 'TIMM_SCRIPTS' in printed and '--where' in printed and '~/.cache' in printed


def package(folder: Path, version: str) -> None:
    (folder / 'timm').mkdir()
    (folder / 'timm' / '__init__.py').write_text('')
    (folder / 'timm' / 'version.py').write_text(f"# a comment\n__version__ = '{version}'\n")


@pytest.mark.parametrize(
    'version, rank, noted', [('0.9.1', '', True), ('0.9.1', '0', True), ('0.9.1', '1', False), ('', '', False)]
)
def test_timm_in_the_same_checkout(version, rank, noted, checkout, monkeypatch, capsys) -> None:
    package(checkout, version or timm.__version__)
    if rank:
        monkeypatch.setenv('LOCAL_RANK', rank)
    started = []
    monkeypatch.setattr(os, 'execv', lambda *command: started.append(command))
    stock.main(['show.py'])
    assert len(started) == 1
    note = f'stock.py: {checkout} contains timm 0.9.1; it runs instead of the installed {timm.__version__}\n'
    assert capsys.readouterr().err == (note if noted else '')


def test_installed_version(tmp_path, monkeypatch) -> None:
    """It is the version of the timm that is imported, also if PYTHONPATH hides the one with the metadata."""
    assert stock.installed_version() == timm.__version__
    package(tmp_path, '0.9.1')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'timm')
    assert stock.installed_version() == '0.9.1'
    monkeypatch.setattr(sys, 'path', [])
    assert f'timm is not installed for {sys.executable}' in error('train.py')

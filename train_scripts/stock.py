#!/usr/bin/env python
"""Run one of timm's own scripts, those of the installed version of timm.

    python train_scripts/stock.py train.py --model atac_resnet50 --data-dir DIR
    python train_scripts/stock.py torchrun --nproc-per-node 2 train.py --model atac_resnet50 --data-dir DIR
    torchrun --nproc-per-node 2 train_scripts/stock.py train.py --model atac_resnet50 --data-dir DIR
    python train_scripts/stock.py --where

Any script at the top of timm's repository will do: validate.py, benchmark.py, inference.py, onnx_export.py... It runs
where it is, unchanged, with the arguments after its name, and its exit code is the command's. The options of torchrun
itself stand before the script. The second and the third line do the same.

timm's package has no scripts in it. They are taken from the first of these, which --where prints:

    TIMM_SCRIPTS    an environment variable: a checkout of timm, or a folder with its scripts
    a cache         timm_atac/timm-scripts-VERSION in $XDG_CACHE_HOME, or in ~/.cache
    a download      of the tag of the installed version from GitHub, once, into that cache

A checkout that holds the package timm as well runs with that package, as Python prefers what lies beside a script.
"""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.error import HTTPError

from timm_atac._files import new_folder

REPOSITORY = 'https://github.com/huggingface/pytorch-image-models'
ARCHIVE = REPOSITORY + '/archive/refs/tags/v{version}.zip'
VERSION_FILE = 'timm/version.py'
NO_SCRIPTS = ('hubconf.py', 'setup.py')  # beside the scripts, but not to be run
TIMEOUT = 60  # seconds without a byte


class StockError(Exception):
    """What the user has to know, in one line."""


def main(argv: Sequence[str] | None = None) -> None:
    """Become the script that the arguments ask for, or print what they ask for.

    Raises:
        SystemExit: There is nothing to run: with the reason, if that is an error.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (['-h'], ['--help']):
        print(__doc__)
        return
    try:
        if not argv or (argv[0].startswith('-') and argv != ['--where']):
            raise StockError(f'expected a script of timm, torchrun, --where or --help, got {argv[:1]}; see --help')
        folder = scripts_folder()
        if argv == ['--where']:
            print(folder)
            return
        arguments = command(argv, folder)
        note_other_timm(folder)
    except StockError as error:
        sys.exit(f'stock.py: {error}')
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *python_options(), *arguments])


def command(argv: Sequence[str], folder: Path) -> list[str]:
    """What Python has to run: a script of the folder, or PyTorch's launcher with one.

    Raises:
        StockError: No argument names a script, or not the first one.
    """
    scripts = sorted(path.name for path in folder.glob('*.py') if path.name not in NO_SCRIPTS)
    launched = argv[0] == 'torchrun'
    candidates = argv[1:] if launched else argv[:1]
    script = next((name for name in candidates if name in scripts), None)
    if script is None:
        given = ', '.join(map(repr, candidates)) or 'nothing'
        raise StockError(f'expected a script of {folder}, got {given}; there are: {", ".join(scripts) or "none"}')
    at = argv.index(script)
    launcher = ['-m', 'torch.distributed.run', *argv[1:at]] if launched else []
    return [*launcher, str(folder / script), *argv[at + 1 :]]


def python_options() -> list[str]:
    """The options that Python itself was started with, such as the -u of torchrun's processes."""
    options = sys.orig_argv[1 : -len(sys.argv)]
    return options[:-1] if options[-1:] == ['-m'] else options


def scripts_folder() -> Path:
    """Where the scripts are, after a download if need be.

    Raises:
        StockError: They are not there, and why.
    """
    given = os.environ.get('TIMM_SCRIPTS')
    if given:
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            raise StockError(f'TIMM_SCRIPTS={given} is no folder; give a checkout of {REPOSITORY}')
        return folder
    version = installed_version()
    folder = cache_folder(version)
    if not (folder / 'train.py').is_file():
        download(version, folder)
    return folder


def cache_folder(version: str) -> Path:
    """Where a download of this version of timm is kept."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser().absolute()
    return cache / 'timm_atac' / f'timm-scripts-{version}'


def installed_version() -> str:
    """The version of the timm that a script would import.

    It is read from the package's file, not from its metadata: those of a timm that is hidden by one on PYTHONPATH are
    still found. Nothing is imported, which would take seconds.

    Raises:
        StockError: There is no timm.
    """
    spec = importlib.util.find_spec('timm')
    version = None if spec is None or spec.origin is None else version_beside(Path(spec.origin).parents[1])
    if version is None:
        raise StockError(f'there is no timm in {sys.executable}; install it by `pip install timm`')
    return version


def version_beside(folder: Path) -> str | None:
    """The version of the package timm in a folder, if it has one."""
    file = folder / VERSION_FILE
    return parse_version(file.read_text(encoding='utf-8')) if file.is_file() else None


def parse_version(text: str) -> str | None:
    found = re.search(r'^__version__\s*=\s*[\'"](.+)[\'"]', text, re.MULTILINE)
    return found and found[1]


def note_other_timm(folder: Path) -> None:
    """Say that a checkout brings its own package, as far as that is another one; once, not in every process."""
    beside = version_beside(folder)
    if beside is None or os.environ.get('LOCAL_RANK', '0') != '0':
        return
    installed = installed_version()
    if beside != installed:
        note = f'{folder} has a timm of its own: {beside} runs, not the installed {installed}'
        print(f'stock.py: {note}', file=sys.stderr)


def download(version: str, folder: Path) -> None:
    """Fill the folder with timm's scripts of a version, or leave nothing.

    Raises:
        StockError: It could not be done: what was tried, why it failed, and what to do instead.
    """
    url = ARCHIVE.format(version=version)
    remedy = (
        f'git clone --depth 1 --branch v{version} {REPOSITORY}, and `export TIMM_SCRIPTS=$PWD/pytorch-image-models`'
    )
    if not re.fullmatch(r'[\d.]+', version):
        raise StockError(f'timm {version} is no release; set TIMM_SCRIPTS to the checkout that it comes from')
    print(f'stock.py: downloading {url} to {folder}', file=sys.stderr)
    try:
        with _stoppable(), new_folder(folder) as new, tempfile.TemporaryDirectory() as temporary:
            from torch.hub import download_url_to_file  # late: it takes a second, and mostly there is no download

            archive = Path(temporary) / 'timm.zip'
            download_url_to_file(url, str(archive), progress=sys.stderr.isatty())
            _unpack(archive, new, version)
    except Exception as error:  # of network, server, archive and disk; the way out is the same
        if isinstance(error, HTTPError):
            error.close()
        if not (folder / 'train.py').is_file():  # else another process was faster
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())
            raise StockError(f'could not download {url} to {folder}: {reason}. Do {remedy}') from error


def _unpack(archive: Path, folder: Path, version: str) -> None:
    """The scripts alone: with timm's package beside them, they would run that instead of the installed one."""
    with zipfile.ZipFile(archive) as file:
        members = {name.partition('/')[2]: name for name in file.namelist()}  # all is in one folder
        missing = sorted({'train.py', VERSION_FILE} - members.keys())
        if missing:
            raise StockError(f'the archive lacks {" and ".join(missing)}')
        found = parse_version(file.read(members[VERSION_FILE]).decode())
        if found != version:
            raise StockError(f'the archive is of timm {found}')
        for name, member in members.items():
            if name.endswith('.py') and '/' not in name:
                (folder / name).write_bytes(file.read(member))


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A silent server is an error, and what torchrun sends to stop its processes ends this one with the folder gone."""
    timeout = socket.getdefaulttimeout()
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)
        signal.signal(signal.SIGTERM, handler)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

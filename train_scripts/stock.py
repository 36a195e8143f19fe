#!/usr/bin/env python
"""Run one of timm's own scripts with the installed version of timm.

    python train_scripts/stock.py train.py --model atac_resnet50 --data-dir DIR
    python train_scripts/stock.py torchrun --nproc-per-node 2 train.py --model atac_resnet50 --data-dir DIR
    torchrun --nproc-per-node 2 train_scripts/stock.py train.py --model atac_resnet50 --data-dir DIR
    python train_scripts/stock.py --where

It runs every script in the top folder of timm's repository, such as validate.py, benchmark.py or onnx_export.py. The
script is unchanged and gets the arguments after its name. Its exit status is the exit status of this command. Options
of torchrun come before the script. The second and the third command do the same.

timm's package does not contain the scripts. They are taken from the first of these sources, which --where prints:

    TIMM_SCRIPTS    this environment variable: a checkout of timm, or a folder with its scripts
    a cache         timm_atac/timm-scripts-VERSION in $XDG_CACHE_HOME, or in ~/.cache
    a download      from GitHub, of the tag of the installed version, into that cache

A script in a checkout that also has the package timm runs with that package, since Python imports it first.
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
from difflib import get_close_matches
from pathlib import Path
from urllib.error import HTTPError

from timm_atac._files import new_folder

REPOSITORY = 'https://github.com/huggingface/pytorch-image-models'
ARCHIVE = REPOSITORY + '/archive/refs/tags/v{version}.zip'
VERSION_FILE = 'timm/version.py'
NO_SCRIPTS = ('hubconf.py', 'setup.py')  # in the same folder, but not scripts
TIMEOUT = 60  # seconds without a received byte


class StockError(Exception):
    """An error whose message is one line for the user."""


def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by the script that the arguments name, or print the help or the folder of the scripts.

    Raises:
        SystemExit: The script cannot be run; with the reason.
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
        warn_of_other_timm(folder)
    except StockError as error:
        sys.exit(f'stock.py: {error}')
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *python_options(), *arguments])


def command(argv: Sequence[str], folder: Path) -> list[str]:
    """Return Python's arguments: a script of the folder, or torchrun with a script.

    Raises:
        StockError: The first argument is not a script, or no argument after torchrun is one.
    """
    scripts = sorted(path.name for path in folder.glob('*.py') if path.name not in NO_SCRIPTS)
    launched = argv[0] == 'torchrun'
    candidates = argv[1:] if launched else argv[:1]
    script = next((name for name in candidates if name in scripts), None)
    if script is None:
        given = ', '.join(map(repr, candidates)) or 'nothing'
        similar = get_close_matches(candidates[0], scripts, n=1) if candidates else []
        hint = f'; did you mean {similar[0]!r}?' if similar else f'; it has: {", ".join(scripts) or "none"}'
        raise StockError(f'expected a script of {folder}, got {given}{hint}')
    at = argv.index(script)
    launcher = ['-m', 'torch.distributed.run', *argv[1:at]] if launched else []
    return [*launcher, str(folder / script), *argv[at + 1 :]]


def python_options() -> list[str]:
    """Return the options that Python was started with, such as the -u of torchrun's processes."""
    options = sys.orig_argv[1 : -len(sys.argv)]
    return options[:-1] if options[-1:] == ['-m'] else options


def scripts_folder() -> Path:
    """Return the folder of the scripts. They are downloaded if necessary.

    Raises:
        StockError: TIMM_SCRIPTS is not a folder, or the download failed.
    """
    given = os.environ.get('TIMM_SCRIPTS')
    if given:
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            raise StockError(f'TIMM_SCRIPTS={given} is not a folder; give a checkout of {REPOSITORY}')
        return folder
    version = installed_version()
    folder = cache_folder(version)
    if not (folder / 'train.py').is_file():
        download(version, folder)
    return folder


def cache_folder(version: str) -> Path:
    """Return the folder that the scripts of this version of timm are downloaded to."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser().absolute()
    return cache / 'timm_atac' / f'timm-scripts-{version}'


def installed_version() -> str:
    """Return the version of the timm that a script would import.

    It is read from the package's file. The metadata may belong to another timm, which one on PYTHONPATH hides. timm is
    not imported, since that takes seconds.

    Raises:
        StockError: timm is not installed.
    """
    spec = importlib.util.find_spec('timm')
    version = None if spec is None or spec.origin is None else version_in(Path(spec.origin).parents[1])
    if version is None:
        raise StockError(f'timm is not installed for {sys.executable}; install it by `pip install timm`')
    return version


def version_in(folder: Path) -> str | None:
    """Return the version of the package timm in a folder; None if the folder does not have the package."""
    file = folder / VERSION_FILE
    return parse_version(file.read_text(encoding='utf-8')) if file.is_file() else None


def parse_version(text: str) -> str | None:
    found = re.search(r'^__version__\s*=\s*[\'"](.+)[\'"]', text, re.MULTILINE)
    return found and found[1]


def warn_of_other_timm(folder: Path) -> None:
    """Print a note if the folder has another version of timm than the installed one; only in the first process."""
    own = version_in(folder)
    if own is None or os.environ.get('LOCAL_RANK', '0') != '0':
        return
    installed = installed_version()
    if own != installed:
        print(f'stock.py: {folder} contains timm {own}; it runs instead of the installed {installed}', file=sys.stderr)


def download(version: str, folder: Path) -> None:
    """Download the scripts of a version of timm into a new folder. An error leaves no folder.

    Raises:
        StockError: The download failed. The message has the URL, the reason and what to do instead.
    """
    url = ARCHIVE.format(version=version)
    remedy = (
        f'git clone --depth 1 --branch v{version} {REPOSITORY}, and `export TIMM_SCRIPTS=$PWD/pytorch-image-models`'
    )
    if not re.fullmatch(r'[\d.]+', version):
        raise StockError(
            f'timm {version} is not a release; set TIMM_SCRIPTS to the checkout that it was installed from'
        )
    print(f'stock.py: downloading {url} to {folder}', file=sys.stderr)
    try:
        with _timeout_and_sigterm(), new_folder(folder) as new, tempfile.TemporaryDirectory() as temporary:
            from torch.hub import download_url_to_file  # not at the top: it takes a second, and is rarely needed

            archive = Path(temporary) / 'timm.zip'
            download_url_to_file(url, str(archive), progress=sys.stderr.isatty())
            _unpack(archive, new, version)
    except Exception as error:  # network, server, archive or disk: the remedy is the same
        if isinstance(error, HTTPError):
            error.close()
        if not (folder / 'train.py').is_file():  # else another process has downloaded them
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())
            raise StockError(f'could not download {url} to {folder}: {reason}. Do {remedy}') from error


def _unpack(archive: Path, folder: Path, version: str) -> None:
    """Unpack the scripts without timm's package, which they would import instead of the installed one."""
    with zipfile.ZipFile(archive) as file:
        members = {name.partition('/')[2]: name for name in file.namelist()}  # without the top folder
        missing = sorted({'train.py', VERSION_FILE} - members.keys())
        if missing:
            raise StockError(f'the archive lacks {" and ".join(missing)}')
        found = parse_version(file.read(members[VERSION_FILE]).decode())
        if found != version:
            raise StockError(f'the archive contains timm {found}')
        for name, member in members.items():
            if name.endswith('.py') and '/' not in name:
                (folder / name).write_bytes(file.read(member))


@contextlib.contextmanager
def _timeout_and_sigterm() -> Iterator[None]:
    """Raise an error if the server does not answer, and exit on SIGTERM, so that an unfinished folder is removed.

    torchrun stops its processes with SIGTERM.
    """
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

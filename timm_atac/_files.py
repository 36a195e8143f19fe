"""Files and folders that appear complete or not at all, even if the program stops while it writes them."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ['check_free', 'new_folder', 'replaced_file']


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end of the `with` block; after an exception it is deleted.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; give the name of a file.')
    temporary = _temporary_path(path)
    file = open(temporary, 'xb')  # the kernel applies the umask, which a program can only read by changing it
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder that becomes `path` at the end of the `with` block; after an exception it is deleted.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    check_free(path)
    path = path.absolute()
    temporary = _temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        mode = stat.S_IMODE(temporary.stat().st_mode)
        for inside in temporary.rglob('*'):
            if inside.is_symlink():  # its target may be outside of the folder
                continue
            os.chmod(inside, mode if inside.is_dir() else mode & 0o666)  # safetensors writes files as 0600
            if inside.is_file():
                with open(inside, 'rb+') as file:
                    os.fsync(file.fileno())  # the content survives a loss of power
        if path.exists():
            path.rmdir()  # it is empty; Windows cannot rename onto a folder
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def check_free(path: Path) -> None:
    """Make sure that a new file or folder can take this path.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f'{path} exists already; give another name, or remove it first.')


def _temporary_path(path: Path) -> Path:
    """Create the parent folder; return a hidden path in it that nobody else uses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f'.{path.name}.{secrets.token_hex(8)}')

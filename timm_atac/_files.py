"""Files and folders that are there complete or not at all, whatever happens while they are written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ['check_free', 'new_folder', 'replaced_file']


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, unless there was an exception.

    Raises:
        IsADirectoryError: There is a folder at `path`.
    """
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; give the name of a file.')
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with open(handle, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` at the end, unless there was an exception.

    Raises:
        FileExistsError: There is something at `path`, and it is no empty folder.
    """
    check_free(path)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        yield Path(name)
        for inside in (Path(name), *Path(name).rglob('*')):  # some writers keep theirs to the user
            os.chmod(inside, (0o777 if inside.is_dir() else 0o666) & ~_umask())
            if inside.is_file():
                with open(inside, 'rb+') as file:
                    os.fsync(file.fileno())  # so that it is whole after a loss of power, too
        if path.exists():
            path.rmdir()  # empty; a rename onto a folder is an error on Windows
        os.rename(name, path)
    except BaseException:
        shutil.rmtree(name)
        raise


def check_free(path: Path) -> None:
    """Make sure that nothing is in the way of a new file or folder.

    Raises:
        FileExistsError: There is something at `path`, and it is no empty folder.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f'{path} is there already; give another name, or remove it first.')


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

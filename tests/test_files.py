"""Files and folders that appear complete or not at all."""

import os
import stat
from pathlib import Path

import pytest

from timm_atac._files import new_folder, replaced_file

WRITE = """
import os
from pathlib import Path
from timm_atac._files import new_folder, replaced_file

os.umask({umask:#o})

def refuse(mask):  # the umask belongs to the whole process
    raise AssertionError('os.umask was called')

os.umask = refuse
with new_folder(Path('new')) as new:
    (new / 'a').touch(mode=0o600)
    (new / 'wide').touch(mode=0o600)
    (new / 'wide').chmod(0o777)
    (new / 'c').mkdir(mode=0o700)
    (new / 'c' / 'd').touch(mode=0o600)
with replaced_file(Path('parent/b')) as file:
    file.write(b'x')
"""


@pytest.mark.parametrize('umask', [0o022, 0o027, 0o002, 0o077], ids=oct)
def test_modes_are_those_of_the_umask(new_python, umask, tmp_path, monkeypatch) -> None:
    """Files and folders get the usual modes, also those of a writer that uses 0600, and the umask is not changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[1]))
    new_python(WRITE.format(umask=umask))
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob('*')}
    files = ('new/a', 'new/wide', 'new/c/d', 'parent/b')
    folders = ('new', 'new/c', 'parent')
    assert modes == dict.fromkeys(files, 0o666 & ~umask) | dict.fromkeys(folders, 0o777 & ~umask)


def test_an_inherited_group_stays(tmp_path) -> None:
    """Folders below a set-group-ID folder inherit its bit."""
    tmp_path.chmod(0o2755)
    with new_folder(tmp_path / 'new') as new:
        (new / 'inside').mkdir()
    assert (tmp_path / 'new').stat().st_mode & stat.S_ISGID
    assert (tmp_path / 'new' / 'inside').stat().st_mode & stat.S_ISGID


def test_a_link_stays_a_link(tmp_path) -> None:
    """The file outside that a link leads to keeps its mode, and a link may lead nowhere."""
    outside = tmp_path / 'outside'
    outside.touch(mode=0o600)
    with new_folder(tmp_path / 'new') as new:
        (new / 'link').symlink_to(outside)
        (new / 'dangling').symlink_to('absent')
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    assert (tmp_path / 'new' / 'link').readlink() == outside


def test_every_file_is_synced(tmp_path, monkeypatch) -> None:
    """The content of each file is on the disk before the file or the folder gets its name."""
    synced: set[int] = set()
    at_rename: dict[str, bool] = {}
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def are_synced(path: Path) -> bool:
        files = [path] if path.is_file() else [file for file in path.rglob('*') if file.is_file()]
        return {file.stat().st_ino for file in files} <= synced

    def checked_rename(source, target) -> None:
        at_rename[Path(target).name] = are_synced(Path(source))
        rename(source, target)

    def checked_replace(source, target) -> None:
        at_rename[Path(target).name] = are_synced(Path(source))
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', note)
    monkeypatch.setattr(os, 'rename', checked_rename)
    monkeypatch.setattr(os, 'replace', checked_replace)
    with replaced_file(tmp_path / 'file') as file:
        file.write(b'x')
    with new_folder(tmp_path / 'folder') as folder:
        (folder / 'inside').mkdir()
        (folder / 'inside' / 'a').write_text('a')
        (folder / 'b').write_text('b')
    assert at_rename == {'file': True, 'folder': True}


def test_nothing_is_left_of_an_interrupted_write(tmp_path) -> None:
    (tmp_path / 'file').write_text('before')
    with pytest.raises(KeyboardInterrupt), replaced_file(tmp_path / 'file') as file:
        file.write(b'half')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / 'folder') as folder:
        (folder / 'half').touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ['file']
    assert (tmp_path / 'file').read_text() == 'before'


def test_a_folder_is_not_replaced_by_a_file(tmp_path) -> None:
    with pytest.raises(IsADirectoryError, match='is a folder; give the name of a file'), replaced_file(tmp_path):
        pass

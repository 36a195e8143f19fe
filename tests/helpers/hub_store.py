"""The repositories of `loopback_hub`: files, commits, and the storage of uploaded large files."""

import base64
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from hashlib import sha1, sha256
from pathlib import PurePosixPath
from typing import Any

LFS_SUFFIXES = ('.bin', '.ckpt', '.h5', '.onnx', '.png', '.pt', '.pth', '.safetensors')


class HubError(Exception):
    """An error that the Hub answers: status, message and, if the Hub has one for it, `X-Error-Code`."""

    def __init__(
        self, status: int, message: str, code: str = '', headers: dict[str, str] | None = None, **body: Any
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, {'error': message, **body}
        line = ' '.join(message.split()).encode('ascii', 'replace').decode()  # a header has one line
        self.headers = {'X-Error-Message': line} | ({'X-Error-Code': code} if code else {}) | (headers or {})


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'.encode()

    @cached_property
    def blob(self) -> str:
        content = self.pointer if self.lfs else self.data
        return sha1(b'blob %d\0' % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob

    def entry(self, path: str) -> dict[str, Any]:
        size = len(self.data)
        lfs = {'oid': self.sha256, 'sha256': self.sha256, 'size': size, 'pointerSize': len(self.pointer)}
        return {'type': 'file', 'oid': self.blob, 'size': size, 'path': path} | ({'lfs': lfs} if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    message: str
    files: dict[str, File]
    parent: 'Commit | None' = None
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.000Z'))

    @cached_property
    def oid(self) -> str:
        tree = sorted((path, file.blob) for path, file in self.files.items())
        return sha1(repr((self.message, self.date, tree, self.parent and self.parent.oid)).encode()).hexdigest()

    @property
    def changed(self) -> list[str]:
        before = self.parent.files if self.parent else {}
        return sorted(path for path in {*before, *self.files} if before.get(path) != self.files.get(path))


@dataclass
class Repository:
    name: str
    private: bool
    history: list[Commit]
    objects: dict[str, bytes] = field(default_factory=dict)  # the large file storage, by sha256

    @classmethod
    def new(cls, name: str, private: bool) -> 'Repository':
        attributes = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES)
        return cls(name, private, [Commit('initial commit', {'.gitattributes': File(attributes.encode())})])

    def at(self, revision: str) -> Commit:
        if revision in ('', 'main', 'refs/heads/main'):
            return self.history[-1]
        for commit in self.history:
            if commit.oid == revision:
                return commit
        raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')


def commit_line(line: dict[str, Any], files: dict[str, File], objects: dict[str, bytes]) -> None:
    """Apply one line of a commit to its files."""
    key, value = line['key'], line['value']
    path = value['path'].rstrip('/')
    if any(part in ('', '.', '..', '.git') for part in path.split('/')):
        raise HubError(400, f'Invalid path: {path}')
    if key == 'file':
        files[path] = File(base64.b64decode(value['content']))
    elif key == 'lfsFile':
        if value['oid'] not in objects:
            raise HubError(
                400, f'Your push was rejected: the LFS pointer of {path} points to a file that does not exist'
            )
        files[path] = File(objects[value['oid']], lfs=True)
    elif key in ('deletedFile', 'deletedFolder'):
        gone = [name for name in files if name == path or (key == 'deletedFolder' and name.startswith(f'{path}/'))]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", 'EntryNotFound')
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f'Invalid key: {key}')


def listing(files: dict[str, File]) -> dict[str, dict[str, Any]]:
    """Return the Hub's description of every file and directory, by path."""
    entries = {}
    for path, file in sorted(files.items()):
        for parent in map(str, list(PurePosixPath(path).parents)[-2::-1]):
            entries[parent] = {'type': 'directory', 'oid': sha1(parent.encode()).hexdigest(), 'size': 0, 'path': parent}
        entries[path] = file.entry(path)
    return entries

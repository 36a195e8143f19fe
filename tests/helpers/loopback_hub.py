"""A small Hugging Face Hub on 127.0.0.1, for tests of uploads and downloads.

    with LoopbackHub(tokens={'hf_right': 'me'}) as hub:
        subprocess.run([sys.executable, 'push.py'], env=hub.environment(tmp_path))
        assert hub.commits('me/model')[-1] == ('Upload', ['README.md', 'model.safetensors'])

It has models with one branch. It answers with the statuses, headers, error codes and messages of the Hub, as far as
`huggingface_hub` reads them. `hub.fail` makes it fail. It answers 501 to anything else, such as Xet storage or pull
requests.
"""

import json
import os
import re
import secrets
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_cards import card_errors, card_metadata
from hub_store import LFS_SUFFIXES, Commit, File, HubError, Repository, commit_line, listing

REPO = r'(?P<repo>[^/]+(?:/[^/]+)?)'
REV = r'(?P<revision>[^/]+)'
ROUTES = (  # method, path, endpoint: a method of Handler, and a key of Failures.status
    ('GET', '/api/whoami-v2', 'whoami'),
    ('POST', '/api/validate-yaml', 'validate_yaml'),
    ('POST', '/api/repos/create', 'create'),
    ('DELETE', '/api/repos/delete', 'delete'),
    ('POST', rf'/api/models/{REPO}/preupload/{REV}', 'preupload'),
    ('POST', rf'/{REPO}\.git/info/lfs/objects/batch', 'batch'),
    ('PUT', rf'/lfs/{REPO}/(?P<oid>\w+)', 'upload'),
    ('POST', rf'/{REPO}\.git/info/lfs/objects/verify', 'verify'),
    ('POST', rf'/api/models/{REPO}/commit/{REV}', 'commit'),
    ('GET', rf'/api/models/{REPO}/tree/{REV}(?:/(?P<folder>.+))?', 'tree'),
    ('POST', rf'/api/models/{REPO}/paths-info/{REV}', 'paths_info'),
    ('GET', rf'/api/models/{REPO}(?:/revision/{REV})?', 'info'),
    ('GET HEAD', rf'/{REPO}/resolve/{REV}/(?P<path>.+)', 'resolve'),
)
LFS_SIZE = 10 * 1024 * 1024  # a larger file of any name
CHUNK = 64 * 1024


@dataclass
class Failures:
    """Failures of the Hub, until they are reset."""

    upload_dies_at: int | None = None  # after so many bytes of an LFS upload the server stops, until `hub.start()`
    upload_drops: int = 0  # number of LFS uploads that lose their connection half way
    status: dict[str, int] = field(default_factory=dict)  # endpoint of ROUTES -> the status that it answers
    corrupt: set[str] = field(default_factory=set)  # paths that are served with one wrong byte


class ConnectionDropped(Exception):
    """The connection closes without an answer."""


def byte_range(header: str, size: int) -> tuple[int, int]:
    found = re.fullmatch(r'bytes=(\d*)-(\d*)', header)
    first, last = found.groups() if found else ('', '')
    start = int(first) if first else max(size - int(last or 0), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        raise HubError(416, 'Range Not Satisfiable', headers={'Content-Range': f'bytes */{size}'})
    return start, end


class LoopbackHub:
    """The content of the Hub and its server thread; `tokens` are token -> user, `organizations` name -> members."""

    def __init__(self, tokens: dict[str, str], organizations: dict[str, set[str]] | None = None) -> None:
        self.tokens = tokens
        self.organizations = organizations or {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []  # method and path
        self.fail = Failures()
        self.lock = threading.Lock()
        self.signatures: dict[str, tuple[Repository, str, int]] = {}  # of an upload -> repository, sha256, size
        self._server: _Server | None = None
        self._port = 0

    def __enter__(self) -> 'LoopbackHub':
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server. After a stop or a failure it has the same port and all commits."""
        self._server = _Server(self, self._port)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop the server and close every connection."""
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()
            server.drop_connections()

    @property
    def endpoint(self) -> str:
        return f'http://127.0.0.1:{self._port}'

    def environment(self, home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
        """Return a client's environment: cache in `home`, the first token by default ('' for none), this Hub only."""
        alien = re.compile(r'hf_|hugging|transformers_|.*_proxy', re.IGNORECASE)
        token = next(iter(self.tokens), '') if token is None else token
        return {key: value for key, value in os.environ.items() if not alien.match(key)} | {
            'HF_ENDPOINT': self.endpoint,
            'HF_HOME': str(Path(home)),
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'DISABLE_SAFETENSORS_CONVERSION': '1',
            'NO_PROXY': '*',
            **({'HF_TOKEN': token} if token else {}),
        }

    def files(self, name: str) -> dict[str, bytes]:
        """Return the content of every file of the last commit, by path."""
        return {path: file.data for path, file in self.repositories[name].at('main').files.items()}

    def commits(self, name: str) -> list[tuple[str, list[str]]]:
        """Return message and changed paths of every commit; the Hub itself makes the first, with `.gitattributes`."""
        return [(commit.message, commit.changed) for commit in self.repositories[name].history]

    def owns(self, user: str, name: str) -> bool:
        namespace = name.split('/')[0]
        return user == namespace or user in self.organizations.get(namespace, ())

    def readable(self, user: str, name: str) -> Repository:
        repository = self.repositories.get(name)
        if repository and (not repository.private or self.owns(user, name)):
            return repository
        if not user:
            raise HubError(401, 'Invalid username or password.', 'RepoNotFound')
        raise HubError(404, 'Repository not found', 'RepoNotFound')

    def writable(self, user: str, name: str) -> Repository:
        repository = self.readable(user, name)
        if not user:
            raise HubError(401, 'Invalid username or password.', 'RepoNotFound')
        if not self.owns(user, name):
            raise HubError(403, 'Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request')
        return repository


class _Server(ThreadingHTTPServer):
    request_queue_size = 32

    def __init__(self, hub: LoopbackHub, port: int) -> None:
        self.hub = hub
        self.connections: set[Any] = set()
        super().__init__(('127.0.0.1', port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go whenever it likes
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection; each method below `send_json` is the endpoint of that name in ROUTES."""

    protocol_version = 'HTTP/1.1'
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.hub.requests.append((self.command, unquote(url.path)))
        try:
            self.body = self.receive(int(self.headers.get('Content-Length') or 0))
            self.route(url.path)
        except ConnectionDropped:
            self.close_connection = True
        except HubError as error:
            self.send_json(error.body, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def receive(self, length: int) -> bytes:
        body = bytearray()
        while len(body) < length:
            if self.command == 'PUT':
                self.maybe_drop(len(body), length)
            chunk = self.rfile.read(min(CHUNK, length - len(body)))
            if not chunk:
                raise ConnectionDropped
            body += chunk
        return bytes(body)

    def maybe_drop(self, received: int, length: int) -> None:
        fail = self.hub.fail
        if fail.upload_dies_at is not None and received >= fail.upload_dies_at:
            self.hub.stop()
            raise ConnectionDropped
        with self.hub.lock:  # files are uploaded side by side
            if fail.upload_drops > 0 and received >= length / 2:
                fail.upload_drops -= 1
                raise ConnectionDropped

    def route(self, path: str) -> None:
        for methods, pattern, endpoint in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split():
                if endpoint in self.hub.fail.status:
                    raise HubError(self.hub.fail.status[endpoint], 'Internal Error - We are working hard to fix this')
                self.user = self.authenticate()
                return getattr(self, endpoint)(**{key: unquote(value) for key, value in found.groupdict('').items()})
        raise HubError(501, f'The loopback Hub has no {self.command} {path}')

    def authenticate(self) -> str:
        authorization = self.headers.get('Authorization')
        user = self.hub.tokens.get(authorization.removeprefix('Bearer ')) if authorization else ''
        if user is None:
            raise HubError(401, 'Invalid credentials in Authorization header')
        return user

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value, default=str).encode()  # str: YAML has dates
        self.send(body, status, {'Content-Type': 'application/json; charset=utf-8', **(headers or {})})

    def whoami(self) -> None:
        if not self.user:
            raise HubError(401, 'Invalid username or password.')
        orgs = [{'type': 'org', 'name': name} for name, users in self.hub.organizations.items() if self.user in users]
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': 'write'}}
        self.send_json({'type': 'user', 'name': self.user, 'fullname': self.user, 'orgs': orgs, 'auth': auth})

    def validate_yaml(self) -> None:
        card = json.loads(self.body)['content']
        errors = card_errors(card)
        warnings = [] if errors or card_metadata(card) else ['empty or missing yaml metadata in repo card']
        answer = {'errors': [{'message': m} for m in errors], 'warnings': [{'message': m} for m in warnings]}
        self.send_json(answer, 400 if errors else 200)

    def named(self) -> str:
        body = json.loads(self.body)
        if body.get('type') not in (None, 'model'):
            raise HubError(501, f'The loopback Hub has no {body["type"]}')
        return f'{body.get("organization") or self.user}/{body["name"]}'

    def create(self) -> None:
        name, body = self.named(), json.loads(self.body)
        url = f'{self.hub.endpoint}/{name}'
        if not self.user:
            raise HubError(401, 'Invalid username or password.')
        if not self.hub.owns(self.user, name):
            namespace = name.split('/')[0]
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        with self.hub.lock:
            if name in self.hub.repositories:
                raise HubError(409, 'You already created this model repo', url=url)
            private = body.get('visibility') == 'private' or bool(body.get('private'))
            self.hub.repositories[name] = Repository.new(name, private)
        self.send_json({'url': url, 'name': name})

    def delete(self) -> None:
        with self.hub.lock:
            del self.hub.repositories[self.hub.writable(self.user, self.named()).name]
        self.send_json({})

    def info(self, repo: str, revision: str) -> None:
        repository = self.hub.readable(self.user, repo)
        commit = repository.at(revision)
        card = card_metadata(commit.files.get('README.md', File(b'')).data.decode()) or {}
        blobs = 'blobs' in self.query
        siblings = [
            {'rfilename': path, **({'blobId': file.blob, **file.entry(path)} if blobs else {})}
            for path, file in sorted(commit.files.items())
        ]
        about = {key: card[key] for key in ('library_name', 'pipeline_tag', 'model-index') if key in card}
        name = {'id': repo, 'modelId': repo, 'author': repo.split('/')[0], 'private': repository.private}
        dates = {'createdAt': repository.history[0].date, 'lastModified': commit.date}
        state = {'sha': commit.oid, 'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0}
        content = {'siblings': siblings, 'tags': card.get('tags', []), 'cardData': card}
        self.send_json(name | dates | state | content | about)

    def tree(self, repo: str, revision: str, folder: str) -> None:
        entries = listing(self.hub.readable(self.user, repo).at(revision).files)
        prefix = f'{folder}/' if folder else ''
        deep = self.query.get('recursive', '').lower() in ('true', '1')
        found = {path: path.removeprefix(prefix) for path in entries if path.startswith(prefix)}
        if folder and not found:
            raise HubError(404, f'{folder} does not exist on "{revision}"', 'EntryNotFound')
        self.send_json([entries[path] for path, inner in found.items() if deep or '/' not in inner])

    def paths_info(self, repo: str, revision: str) -> None:
        entries = listing(self.hub.readable(self.user, repo).at(revision).files)
        self.send_json([entries[path] for path in parse_qs(self.body.decode()).get('paths', []) if path in entries])

    def preupload(self, repo: str, revision: str) -> None:
        files = self.hub.writable(self.user, repo).at(revision).files
        answers = []
        for file in json.loads(self.body)['files']:
            path = file['path']
            lfs = path.endswith(LFS_SUFFIXES) or file['size'] > LFS_SIZE
            oid = {'oid': files[path].etag} if path in files else {}
            answers.append({'path': path, 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False, **oid})
        self.send_json({'files': answers})

    def batch(self, repo: str) -> None:
        repository, url = self.hub.writable(self.user, repo), self.hub.endpoint
        objects = [{'oid': wanted['oid'], 'size': wanted['size']} for wanted in json.loads(self.body)['objects']]
        for wanted in objects:
            oid, signature = wanted['oid'], secrets.token_hex()
            if oid not in repository.objects:
                self.hub.signatures[signature] = repository, oid, wanted['size']
                upload = {'href': f'{url}/lfs/{repo}/{oid}?signature={signature}'}
                wanted['actions'] = {'upload': upload, 'verify': {'href': f'{url}/{repo}.git/info/lfs/objects/verify'}}
        self.send_json({'transfer': 'basic', 'objects': objects})

    def upload(self, repo: str, oid: str) -> None:
        repository, signed, size = self.hub.signatures.get(self.query.get('signature', ''), (None, '', 0))
        if repository is None or (repository.name, signed) != (repo, oid):  # the storage checks signatures, not tokens
            raise HubError(403, 'The request signature we calculated does not match the signature you provided')
        if len(self.body) != size or sha256(self.body).hexdigest() != oid:
            raise HubError(400, 'The content does not match its sha256')
        repository.objects[oid] = self.body
        self.send(b'', 200, {})

    def verify(self, repo: str) -> None:
        wanted = json.loads(self.body)
        stored = self.hub.writable(self.user, repo).objects.get(wanted['oid'])
        if stored is None or len(stored) != wanted['size']:
            raise HubError(404, 'Object does not exist')
        self.send_json({})

    def commit(self, repo: str, revision: str) -> None:
        repository = self.hub.writable(self.user, repo)
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        message, parent = header['value']['summary'], header['value'].get('parentCommit')
        with self.hub.lock:
            head = repository.at(revision)
            if head is not repository.history[-1] or parent not in (None, head.oid):
                raise HubError(412, 'A commit has happened since. Please refresh and try again.')
            files = dict(head.files)
            for line in lines:
                commit_line(line, files, repository.objects)
            errors = card_errors(files['README.md'].data.decode()) if 'README.md' in files else []
            if errors:
                raise HubError(400, 'Invalid metadata in README.md: ' + '; '.join(errors))
            made = Commit(message, files, head)
            repository.history.append(made)
        url = f'{self.hub.endpoint}/{repo}/commit/{made.oid}'
        self.send_json({'success': True, 'commitOid': made.oid, 'commitUrl': url})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.hub.readable(self.user, repo).at(revision)
        headers = {'X-Repo-Commit': commit.oid, 'Accept-Ranges': 'bytes'}
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, 'Entry not found', 'EntryNotFound', headers)
        data, status = file.data, 200
        if path in self.hub.fail.corrupt:
            middle = len(data) // 2
            data = data[:middle] + bytes(byte ^ 1 for byte in data[middle : middle + 1]) + data[middle + 1 :]
        headers |= {'ETag': f'"{file.etag}"', 'Content-Type': 'application/octet-stream'}
        if file.lfs:
            headers |= {'X-Linked-ETag': f'"{file.etag}"', 'X-Linked-Size': str(len(data))}
        if 'Range' in self.headers:
            start, end = byte_range(self.headers['Range'], len(data))
            headers |= {'Content-Range': f'bytes {start}-{end - 1}/{len(data)}'}
            data, status = data[start:end], 206
        self.send(data, status, headers)

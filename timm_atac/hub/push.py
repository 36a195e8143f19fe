"""Pushes the folder of a network to the Hugging Face Hub in one commit, or changes nothing."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..units.deferred import ChannelModule
from ..utils.words import one_line, shortened
from ..weights.folder import (
    CONFIG,
    WEIGHTS,
    FolderError,
    dump_config,
    identify_folder,
    load_folder,
    mend_config,
    read_config,
)
from ..weights.published import HUB_ORG, PUBLISHED
from .card import REPO, full_name, weights_of
from .curve import CURVE
from .export import CARD, FACTS, PICTURE, check_weights
from .facts import CardError, read_facts
from .licenses import license_problem

__all__ = ['CheckedFolder', 'HubError', 'check_folder', 'check_token', 'name_of', 'push', 'resolve_repo']

_PICTURES = (PICTURE, CURVE)
_CREATED_BY_HUB = {'.gitattributes'}  # files of a new repository
_BY_STATUS = {
    400: f'The Hub refuses the files ({{error}}): see the front matter of {CARD}.',
    401: 'The Hub does not accept the token ({error}): run `hf auth login`, or set HF_TOKEN to a valid one.',
    403: 'The token may not write to {repo} ({error}): use one with write access to {owner!r}, '
    'or --repo with a name of your own.',
    409: '{repo} exists ({error}): give another --repo.',
    412: '{repo} has changed during the push ({error}): run it again.',
}


class HubError(RuntimeError):
    """A push that failed; the message says in one line why, and what to do."""


class CheckedFolder(NamedTuple):
    """A folder that can be pushed.

    Attributes:
        path: The folder.
        name: ARCH.TAG, or ARCH if the weights are not those of a tag.
        repo: The repository that it is pushed to, OWNER/NAME.
        config: Content of `config.json` as it is pushed: with what `mend_config` corrects.
        files: Name -> size in bytes of each file that is pushed. Other files of the folder are not.
        license: The licence in the card, None if it states none.
        license_note: A sentence that says that no licence is stated, None if one is.
    """

    path: Path
    name: str
    repo: str
    config: str
    files: dict[str, int]
    license: str | None
    license_note: str | None


def check_folder(folder: str | Path, repo: str | None = None) -> CheckedFolder:
    """Check that a folder can be pushed.

    Its network loads and is ours or has our units, and its card is well-formed and describes these weights.

    Args:
        folder: Folder that `timm-atac convert` or `timm_atac.hub.export.export` has written.
        repo: OWNER/NAME. None means ARCH.TAG of the organisation in `TIMM_ATAC_HUB_ORG`.

    Raises:
        FolderError: The folder is incomplete or damaged; the message names the file.
        HubError: `repo` is missing or is not the name of a repository.
    """
    folder = Path(folder)
    model = load_folder(folder)
    config = mend_config(read_config(folder), model)
    name = name_of(folder)
    ours = type(model).__module__.startswith('timm_atac.')
    if not ours and not any(isinstance(module, ChannelModule) for module in model.modules()):
        raise FolderError(
            f'{folder / CONFIG}: the architecture is {config["architecture"]!r} without a unit of timm_atac; '
            f"push it with timm's own push_to_hf_hub."
        )
    if not (folder / CARD).is_file():
        raise FolderError(f'{folder} has no {CARD}; write it with `timm-atac card {folder}`.')
    try:
        card = ModelCard.load(folder / CARD)
    except ValueError as error:
        raise FolderError(f'{folder / CARD}: its front matter is not valid: {error}') from None
    if not card.data.to_dict():
        raise FolderError(f'{folder / CARD} has no front matter; write it again with `timm-atac card {folder}`.')
    if problem := license_problem(card.data.get('license'), card.data.get('license_name')):
        raise FolderError(f'{folder / CARD}: {problem}. Correct it in {FACTS} and run `timm-atac card {folder}`.')
    for picture in _PICTURES:
        if f']({picture})' in card.content and not (folder / picture).is_file():
            raise FolderError(
                f'{folder / CARD} shows {picture}, which is missing; draw it with `timm-atac card {folder}`.'
            )
    _check_weights_of(card, folder)
    files = {name: folder / name for name in (CARD, CONFIG, WEIGHTS, *_PICTURES) if (folder / name).is_file()}
    license = card.data.get('license_name') or card.data.get('license')
    license_note = None
    if license in (None, 'none-stated', 'unknown'):
        origin = config.get('pretrained_cfg', {}).get('origin_url')
        license = None
        license_note = f'{f"The weights come from {origin}, which" if origin else "The card"} states no licence.'
    sizes = {file: path.stat().st_size for file, path in files.items()}
    return CheckedFolder(folder, name, resolve_repo(repo, name), dump_config(config), sizes, license, license_note)


def name_of(folder: str | Path) -> str:
    """Return the name of the network in a folder: that of its facts, else what is known of its weights.

    Raises:
        FolderError: The folder is incomplete or damaged, or the facts describe other weights.
    """
    identity = identify_folder(folder)
    path = Path(folder) / FACTS
    try:
        facts = read_facts(path) if path.is_file() else {}
        check_weights(facts, identity, path)
    except CardError as error:
        raise FolderError(str(error)) from None
    return facts.get('name') or identity.name


def _check_weights_of(card: ModelCard, folder: Path) -> None:
    """Check that a card describes the weights of its folder, or does not say which weights it describes."""
    identity = identify_folder(folder)
    described, claimed = weights_of(card.content), card.data.get('model_name')
    if described not in (None, identity.weights) or (claimed in PUBLISHED and claimed != identity.published):
        whose = f', those of {claimed}' if claimed in PUBLISHED else ''
        raise FolderError(
            f'{folder / CARD} describes other weights than {WEIGHTS}{whose}: write it again with `timm-atac card '
            f'{folder}`.'
        )


def resolve_repo(repo: str | None, name: str) -> str:
    """Return the repository for a network.

    Args:
        repo: OWNER/NAME. None means `name` of the organisation in `TIMM_ATAC_HUB_ORG`.
        name: ARCH.TAG.

    Raises:
        HubError: There is no `repo` and no organisation, or it is not the name of a repository.
    """
    if repo is None and not HUB_ORG:
        raise HubError('No repository given: give --repo OWNER/NAME, or set TIMM_ATAC_HUB_ORG.')
    repo = f'{HUB_ORG}/{name}' if repo is None else repo
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f'{repo!r} is not the name of a repository: {one_line(error)}') from None
    if '/' not in repo:
        raise HubError(f'{repo!r} is not the name of a repository: expected OWNER/NAME.')
    return repo


def check_token() -> None:
    """Check that there is a token for the Hub.

    Raises:
        HubError: There is none, or it is not a token. The message never has the token.
    """
    try:
        token = get_token()
    except OSError as error:
        raise HubError(
            f'The saved token cannot be read ({error.filename}: {error.strerror}): set HF_HOME to a folder that can be '
            f'written, or HF_TOKEN to a token.'
        ) from None
    if not token:
        raise HubError('No token for the Hub: run `hf auth login`, or set HF_TOKEN to a token with write access.')
    if not re.fullmatch('[!-~]+', token):
        where = 'HF_TOKEN' if os.environ.get('HF_TOKEN') else 'The saved token'
        raise HubError(f'{where} has a letter that no token has (a space or one that is not ASCII): copy it again.')


def push(folder: CheckedFolder, private: bool = False) -> bool:
    """Push a folder in one commit, or make no commit if nothing has changed.

    Args:
        folder: As `check_folder` returns it.
        private: True makes a new repository private.

    Returns:
        True if there was something new to push.

    Raises:
        HubError: There is no token, no right to write, no network, or the repository holds something else. No commit
            is incomplete.
    """
    check_token()
    repo = folder.repo
    api = HfApi(library_name='timm_atac', library_version=__version__)
    with _hub_errors(repo):
        is_new = not api.repo_exists(repo)
        if is_new:
            api.create_repo(repo, private=private)
        try:
            before = api.model_info(repo)
            existing = {file.rfilename for file in before.siblings or ()}
            if private and not before.private:
                raise HubError(
                    f'{repo} exists and is public: make it private in its settings, or push without --private.'
                )
            _check_content(folder, existing)
            operations = list(_operations(folder, existing))
            # not upload_folder, which may make several commits if hf_xet is installed
            message = f'Upload {folder.name}'
            commit = api.create_commit(repo, operations, commit_message=message, parent_commit=before.sha)
        except BaseException:
            if is_new:
                _delete_if_empty(api, repo)
            raise
    return commit.oid != before.sha


def _operations(folder: CheckedFolder, existing: set[str]) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
    for name in folder.files:
        path = folder.path / name
        content: str | bytes = str(path)
        if name == CARD:
            content = path.read_text(encoding='utf-8').replace(REPO, folder.repo).encode()
        elif name == CONFIG:
            content = folder.config.encode()
        yield CommitOperationAdd(name, content)
    yield from map(CommitOperationDelete, [p for p in _PICTURES if p in existing and p not in folder.files])


def _check_content(folder: CheckedFolder, existing: set[str]) -> None:
    """Check that the repository is empty or holds a version of the network."""
    repo = folder.repo
    found, mine = None, full_name(json.loads(folder.config))
    if CONFIG in existing:
        with tempfile.TemporaryDirectory() as cache, suppress(FolderError):
            found = full_name(read_config(Path(hf_hub_download(repo, CONFIG, cache_dir=cache)).parent))
    if existing - _CREATED_BY_HUB and found != mine:
        raise HubError(
            f'{repo} holds {found or "something else"}, not {mine}: '
            f'give another --repo, or delete the repository first.'
        )


def _delete_if_empty(api: HfApi, repo: str) -> None:
    """Delete the repository that this push has created and could not fill."""
    with suppress(Exception):
        if set(api.list_repo_files(repo)) <= _CREATED_BY_HUB:
            api.delete_repo(repo)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Raise errors of the Hub's client as `HubError`."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if message := _message(cause, repo):
                raise HubError(message) from error
            cause = cause.__cause__
        if 'Error while uploading' in str(error):  # its cause is of no type that `_message` knows
            raise HubError(_connection_message(error.__cause__ or error)) from error
        raise


def _message(error: BaseException, repo: str) -> str | None:
    """Return what to tell the user about an error of the Hub's client, None for an error of another kind."""
    if isinstance(error, OfflineModeIsEnabled):
        return 'The Hub cannot be reached: HF_HUB_OFFLINE is set; unset it.'
    if isinstance(error, HfHubHTTPError):
        status: Any = getattr(error.response, 'status_code', None)
        message = _BY_STATUS.get(status, 'The Hub failed ({error}). Nothing is half pushed: run it again later.')
        return message.format(error=one_line(error), repo=repo, owner=repo.split('/')[0])
    if isinstance(error, ValueError) and 'Invalid metadata' in str(error):
        message = re.sub(r'\[[^][]{100,}\]', _shorten_list, one_line(error))
        return f'The Hub refuses the card: {message}'
    of_network = type(error).__module__.startswith(('httpx', 'httpcore', 'requests', 'urllib3'))
    if of_network or isinstance(error, (ConnectionError, TimeoutError)):
        return _connection_message(error)
    return None


def _connection_message(error: BaseException) -> str:
    return (
        f'{constants.ENDPOINT} cannot be reached, or the connection broke ({one_line(error)}). Nothing is half '
        f'pushed: check the network and HF_ENDPOINT, and run it again.'
    )


def _shorten_list(found: re.Match[str]) -> str:
    return f'[{", ".join(shortened(found[0][1:-1].split(", ")))}]'

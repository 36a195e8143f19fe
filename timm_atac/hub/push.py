"""Pushes the folder of a network to the Hugging Face Hub: all of it in one commit, or nothing."""

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
from ..weights.folder import CONFIG, WEIGHTS, FolderError, load_folder, read_config
from ..weights.published import HUB_ORG
from .card import REPO, name_of
from .export import CARD, PICTURE

__all__ = ['HubError', 'Package', 'Pushed', 'check', 'push']

_HIDDEN = '.gitattributes'  # what a new repository has


class HubError(RuntimeError):
    """A push that did not happen: why, and what to do, in one line."""


class Package(NamedTuple):
    """A folder that has been checked.

    Attributes:
        folder: Where it is.
        name: ARCH.TAG.
        repo: Where it goes, OWNER/NAME.
        files: What is pushed of it, name -> bytes; other files stay.
        license: What its card says, None where it states none.
        license_note: A sentence that says so, None where it states one.
    """

    folder: Path
    name: str
    repo: str
    files: dict[str, int]
    license: str | None
    license_note: str | None


class Pushed(NamedTuple):
    """What a push did.

    Attributes:
        url: The repository's.
        changed: Whether there was something new.
    """

    url: str
    changed: bool


def check(folder: str | Path, repo: str | None = None) -> Package:
    """Make sure that a folder can be pushed: the network loads, has ATAC units or is ours, and the card is well-formed.

    Args:
        folder: Of `timm-atac convert` or `timm_atac.hub.export.export`.
        repo: OWNER/NAME, None for ARCH.TAG of the organisation that `TIMM_ATAC_HUB_ORG` names.

    Raises:
        FolderError: The folder is not whole; says what is wrong with which file.
        HubError: `repo` is missing or no name of a repository.
    """
    folder = Path(folder)
    model = load_folder(folder)
    config = read_config(folder)
    ours = type(model).__module__.startswith('timm_atac.')
    if not ours and not any(isinstance(module, ChannelModule) for module in model.modules()):
        raise FolderError(
            f'{folder / CONFIG}: the architecture is {config["architecture"]!r} without a unit of timm_atac; '
            f"timm's own push_to_hf_hub is for that."
        )
    if not (folder / CARD).is_file():
        raise FolderError(f'{folder} has no {CARD}; write it with `timm-atac card {folder}`.')
    try:
        card = ModelCard.load(folder / CARD)
    except ValueError as error:
        raise FolderError(f'{folder / CARD}: its front matter is not valid: {error}') from None

    name = name_of(config)
    repo = resolve_repo(repo, name)
    if not card.data.to_dict():
        raise FolderError(f'{folder / CARD} has no front matter; write it anew with `timm-atac card {folder}`.')
    if f']({PICTURE})' in card.content and not (folder / PICTURE).is_file():
        raise FolderError(
            f'{folder / CARD} shows {PICTURE}, which is not there; draw it with `timm-atac card {folder}`.'
        )
    names = [name for name in (CARD, CONFIG, WEIGHTS, PICTURE) if (folder / name).is_file()]
    license = card.data.get('license_name') or card.data.get('license')
    license_note = None
    if license in (None, 'none-stated', 'unknown'):
        origin = config.get('pretrained_cfg', {}).get('origin_url')
        license_note = f'The weights come from {origin}, which states' if origin else 'The card states'
    return Package(
        folder,
        name,
        repo,
        files={name: (folder / name).stat().st_size for name in names},
        license=None if license_note else license,
        license_note=f'{license_note} no licence.' if license_note else None,
    )


def resolve_repo(repo: str | None, name: str) -> str:
    """The repository for a network.

    Args:
        repo: OWNER/NAME, None for that of the organisation that `TIMM_ATAC_HUB_ORG` names.
        name: ARCH.TAG.

    Raises:
        HubError: It is missing, or no name of a repository.
    """
    if repo is None:
        if not HUB_ORG:
            raise HubError('No repository given: say --repo OWNER/NAME, or set TIMM_ATAC_HUB_ORG.')
        repo = f'{HUB_ORG}/{name}'
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f'{repo!r} is not the name of a repository: {_line(error)}') from None
    if repo.count('/') != 1:
        raise HubError(f'{repo!r} is not the name of a repository: expected OWNER/NAME.')
    return repo


def check_token() -> None:
    """Make sure that there is a token for the Hub.

    Raises:
        HubError: There is none.
    """
    if not get_token():
        raise HubError('No token for the Hub: run `hf auth login`, or set HF_TOKEN to a token with write access.')


def push(package: Package, private: bool = False) -> Pushed:
    """Push a checked folder in one commit; without changes there is none.

    Args:
        package: As `check` gives it.
        private: Make a new repository private.

    Raises:
        HubError: No token, no right, no network, or the repository holds something else. The Hub is as it was.
    """
    check_token()
    repo = package.repo
    api = HfApi(library_name='timm_atac', library_version=__version__)
    with _explained(repo):
        is_new = not api.repo_exists(repo)
        if is_new:
            api.create_repo(repo, private=private)
        else:
            _check_repository(api, package, private)
        try:
            before = api.model_info(repo)
            operations = list(_operations(package, {file.rfilename for file in before.siblings or ()}))
            # not upload_folder: where hf_xet is installed, it is free to make several commits
            message = f'Upload {package.name}'
            commit = api.create_commit(repo, operations, commit_message=message, parent_commit=before.sha)
        except BaseException:
            if is_new:
                _remove_if_empty(api, repo)
            raise
    return Pushed(f'{constants.ENDPOINT}/{repo}', commit.oid != before.sha)


def _operations(package: Package, there: set[str]) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
    for name in package.files:
        path = package.folder / name
        if name == CARD:
            text = path.read_text(encoding='utf-8').replace(REPO, package.repo)
            yield CommitOperationAdd(name, text.encode())
        else:
            yield CommitOperationAdd(name, str(path))
    if PICTURE in there and PICTURE not in package.files:
        yield CommitOperationDelete(PICTURE)


def _check_repository(api: HfApi, package: Package, private: bool) -> None:
    repo = package.repo
    if private and not api.model_info(repo).private:
        raise HubError(f'{repo} is there and public: make it private in its settings, or push without --private.')
    files = [file for file in api.list_repo_files(repo) if file != _HIDDEN]
    if not files:
        return
    found = None
    if CONFIG in files:
        with tempfile.TemporaryDirectory() as cache, suppress(FolderError):
            found = name_of(read_config(Path(hf_hub_download(repo, CONFIG, cache_dir=cache)).parent))
    if found != package.name:
        raise HubError(
            f'{repo} is taken: it holds {found or "something else"}, not {package.name}. '
            f'Give another --repo, or remove it first.'
        )


def _remove_if_empty(api: HfApi, repo: str) -> None:
    """Take back the repository that this push has made and could not fill."""
    with suppress(Exception):
        if set(api.list_repo_files(repo)) <= {_HIDDEN}:
            api.delete_repo(repo)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Errors of the Hub's client as `HubError`."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if reason := _reason(cause, repo):
                raise HubError(reason) from error
            cause = cause.__cause__
        if 'Error while uploading' in str(error):  # of another kind than those
            raise HubError(_broken(error.__cause__ or error)) from error
        raise


def _reason(error: BaseException, repo: str) -> str | None:
    if isinstance(error, OfflineModeIsEnabled):
        return 'The Hub cannot be reached: HF_HUB_OFFLINE is set; unset it.'
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, repo)
    if isinstance(error, ValueError) and 'Invalid metadata' in str(error):
        return f'The Hub refuses the card: {_line(error)}'
    of_network = type(error).__module__.startswith(('httpx', 'httpcore', 'requests', 'urllib3'))
    if of_network or isinstance(error, (ConnectionError, TimeoutError)):
        return _broken(error)
    return None


def _broken(error: BaseException) -> str:
    reason = _line(error) or type(error).__name__
    return (
        f'{constants.ENDPOINT} cannot be reached or broke off ({reason}). Nothing is half pushed: check the network '
        f'and HF_ENDPOINT, and run it again.'
    )


def _of_status(error: HfHubHTTPError, repo: str) -> str:
    status = getattr(error.response, 'status_code', None)
    said = _line(error)
    if status == 401:
        return f'The Hub does not accept the token ({said}): run `hf auth login`, or set HF_TOKEN to a valid one.'
    if status == 403:
        return (
            f'The token may not write to {repo} ({said}): use one with write access to {repo.split("/")[0]!r}, '
            f'or --repo with a name of your own.'
        )
    if status == 409:
        return f'{repo} is taken ({said}): give another --repo.'
    if status == 400:
        return f'The Hub refuses the files ({said}): see the front matter of {CARD}.'
    if status == 412:
        return f'{repo} has been changed by somebody else meanwhile ({said}): run it again.'
    return f'The Hub failed ({said}). Nothing is half pushed: run it again later.'


def _line(error: Any) -> str:
    return ' '.join(str(error).split())

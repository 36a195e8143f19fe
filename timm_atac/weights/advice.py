"""Says in the exception what to do when pretrained weights cannot be downloaded."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from traceback import walk_tb
from typing import Any, Literal
from urllib.parse import urlparse

import torch.hub

from .published import HUB_ORG

__all__ = ['explain_failed_download', 'failed_source']

_BEGINNING = 'The weights of '
_logger = logging.getLogger(__name__)


def explain_failed_download(
    error: Exception,
    cfg: Mapping[str, Any],
    with_file: str,
    with_folder: str,
    cache_dir: str | Path | None = None,
) -> None:
    """Add a note to an exception of a download. Other exceptions, and those that have this note, stay as they are.

    The exception keeps its type, so that callers catch what they caught before. Before Python 3.11, whose tracebacks
    show no notes, the text is logged as an error; without a configuration of logging this is printed.

    Args:
        error: Exception of timm's `create_model` or `build_model_with_cfg`.
        cfg: The network's `pretrained_cfg`.
        with_file: The call that loads a copy of the file, where the source is an address.
        with_folder: The call that loads a folder with a copy of the repository, where the source is the Hub.
        cache_dir: As in `timm.create_model`.
    """
    source = failed_source(error)
    location = cfg.get('url' if source == 'address' else 'hf_hub_id')
    notes: list[str] = getattr(error, '__notes__', [])
    if source is None or location is None or any(note.startswith(_BEGINNING) for note in notes):
        return
    name = '.'.join(str(cfg[key]) for key in ('architecture', 'tag') if cfg.get(key)) or 'the model'
    if source == 'address':
        text = _about_address(name, location, with_file, cache_dir)
    else:
        text = _about_repository(name, location, cfg.get('url'), with_folder)
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        error.__dict__['__notes__'] = [*notes, text]  # pytest and other programs show it
        _logger.error(text)


def failed_source(error: Exception) -> Literal['address', 'repository'] | None:
    """Return what the exception's traceback says: which download failed, or None if it came from something else.

    The types say less: a Hub client raises those of several libraries, and reading a file raises an OSError too.
    """
    for frame, _ in walk_tb(error.__traceback__):
        module = frame.f_globals.get('__name__', '')
        if module == 'torch.hub' and frame.f_code.co_name == 'download_url_to_file':
            return 'address'
        if module.partition('.')[0] == 'huggingface_hub':
            return 'repository'
    return None


def _about_address(name: str, url: str | tuple[str, str], with_file: str, cache_dir: str | Path | None) -> str:
    address, file = url if isinstance(url, (list, tuple)) else (url, os.path.basename(urlparse(url).path))
    folder = cache_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    return (
        f'{_BEGINNING}{name} could not be downloaded from\n  {address}\n'
        f'With a copy of this file, repeat the call after you have saved the copy as\n'
        f'  {os.path.abspath(os.path.join(folder, file))}\n'
        f'or leave the copy where it is, and call, with your other arguments,\n  {with_file}'
    )


def _about_repository(name: str, repository: str, url: str | tuple[str, str] | None, with_folder: str) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    owner_and_name, _, revision = repository.partition('@')
    lines = [f'{_BEGINNING}{name} could not be downloaded from {repository} on the Hugging Face Hub.']
    if HF_HUB_OFFLINE:
        lines.append('HF_HUB_OFFLINE is set, so that only the cache of the Hub is read.')
    if url and HUB_ORG and repository == f'{HUB_ORG}/{name}':
        lines.append(f"TIMM_ATAC_HUB_ORG={HUB_ORG} chose this repository. Without it, the authors' file is loaded from")
        lines.append(f'  {url}')
    lines += [
        'On a machine with a network, run',
        f'  hf download {owner_and_name} {f"--revision {revision} " if revision else ""}--local-dir FOLDER',
        'Then call, with your other arguments,',
        f'  {with_folder}',
    ]
    return '\n'.join(lines)

"""What timm calls for weights in the authors' format: checked, converted in memory, then fitted as any other."""

import hashlib
import os
from typing import Any

import torch
from timm.models import load_pretrained as load_into
from timm.models import load_state_dict

from .. import _timm
from .convert import to_state_dict
from .params import is_params, read_params
from .published import PUBLISHED

__all__ = ['check_published', 'git_blob_id', 'load_pretrained']


def load_pretrained(model: Any, path: str | os.PathLike[str]) -> None:
    """Load a `.params` file of the authors' into a network, fitted to its classes and input channels as timm does.

    Args:
        model: `AtacResNet` or `CifarResNet` with its `pretrained_cfg`, which describes the file.
        path: The file. Where the cfg's tag stands for a published file, it has to be that one.

    Raises:
        ValueError: It is another file than the published one; it is no `.params` file (`ParamsError`); its arrays are
            not those of the network (`ConversionError`). The model stays as it was.
    """
    cfg = dict(model.pretrained_cfg)
    state_dict: dict[str, torch.Tensor]
    in_authors_format = is_params(path)
    if in_authors_format or not cfg.get('file'):
        check_published(path, f'{cfg.get("architecture")}.{cfg.get("tag")}')
    if in_authors_format:
        state_dict = to_state_dict(read_params(path), model, cfg['input_size'][0], cfg['num_classes'])
    else:  # `file` in the place of the cfg's: timm before 1.0.29 hands us any format
        state_dict = load_state_dict(str(path), weights_only=True)
    nowhere = dict.fromkeys(('source', 'url', 'file', 'hf_hub_id', 'hf_hub_filename'))
    load_into(
        model,
        pretrained_cfg={**cfg, **nowhere, 'state_dict': state_dict, 'custom_load': False},
        num_classes=model.num_classes,
        in_chans=model.conv1.in_channels,
        filter_fn=_adapt,
    )


def _adapt(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    return _timm.adapt_state_dict(state_dict, model)


def check_published(path: str | os.PathLike[str], name: str) -> None:
    """Make sure that a file is the published one.

    Args:
        path: The file.
        name: ARCH.TAG; one that is not in `PUBLISHED` stands for no particular file.

    Raises:
        ValueError: It is another; the message has both git blob ids.
    """
    if name not in PUBLISHED:
        return
    found, expected = git_blob_id(path), PUBLISHED[name].git_blob
    if found != expected:
        raise ValueError(
            f'{path} is not the file that {name} stands for: its git blob id is {found}, expected {expected}. '
            f'If it was downloaded, delete it and try again. Weights of your own come in by '
            f'`timm-atac convert FILE.params OUT_DIR --model {name.partition(".")[0]}`, or under their own tag by '
            f"timm.create_model(..., pretrained_cfg_overlay=dict(file='FILE.params', custom_load=True, tag='mine'))."
        )


def git_blob_id(path: str | os.PathLike[str]) -> str:
    """The id that git gives a file's content: SHA-1 of `b'blob %d\\0' % size` and the bytes, in hexadecimal."""
    with open(path, 'rb') as file:
        digest = hashlib.sha1(b'blob %d\0' % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

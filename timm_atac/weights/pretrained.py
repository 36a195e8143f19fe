"""Loads weights in the authors' format for timm: checks the file, converts it in memory, lets timm adapt it."""

import hashlib
import os
from typing import Any

import torch
from timm.models import load_pretrained as load_into
from timm.models import load_state_dict

from .. import _timm
from .convert import to_state_dict
from .identity import record_source, tensor_hash
from .params import is_params, read_params
from .published import PUBLISHED

__all__ = ['check_published', 'git_blob_id', 'load_pretrained']


def load_pretrained(model: Any, path: str | os.PathLike[str]) -> None:
    """Load one of the authors' `.params` files into a network; timm adapts it to the classes and input channels.

    Args:
        model: `AtacResNet` or `CifarResNet`. Its `pretrained_cfg` describes the file.
        path: The file. If the tag of the cfg stands for a published file, it must be that file.

    Raises:
        ValueError: The file is not the published one, is not a valid `.params` file (`ParamsError`), or its arrays do
            not fit the network (`ConversionError`). The model has not changed.
    """
    cfg = dict(model.pretrained_cfg)
    state_dict: dict[str, torch.Tensor]
    in_authors_format = is_params(path)
    name = f'{cfg.get("architecture")}.{cfg.get("tag")}'
    if in_authors_format or not cfg.get('file'):
        check_published(path, name)
    if in_authors_format:
        state_dict = to_state_dict(read_params(path), model, cfg['input_size'][0], cfg['num_classes'])
    else:  # timm before 1.0.29 calls us for a `file` in the cfg whatever its format
        state_dict = load_state_dict(str(path), weights_only=True)
    is_published = in_authors_format and name in PUBLISHED and PUBLISHED[name].git_blob
    weights = tensor_hash(state_dict) if is_published else None  # timm changes `state_dict`
    nowhere = dict.fromkeys(('source', 'url', 'file', 'hf_hub_id', 'hf_hub_filename'))
    load_into(
        model,
        pretrained_cfg={**cfg, **nowhere, 'state_dict': state_dict, 'custom_load': False},
        num_classes=model.num_classes,
        in_chans=model.conv1.in_channels,
        filter_fn=_timm.adapt_state_dict,
    )
    if weights is not None:
        record_source(model, name, weights)


def check_published(path: str | os.PathLike[str], name: str) -> None:
    """Check that a file is the published one.

    Args:
        path: The file.
        name: ARCH.TAG. If it does not stand for a file of the authors, every file passes.

    Raises:
        ValueError: It is another file; the message has both git blob ids.
    """
    expected = PUBLISHED[name].git_blob if name in PUBLISHED else ''
    if not expected:
        return
    found = git_blob_id(path)
    if found != expected:
        architecture = name.partition('.')[0]
        web_page = '' if is_params(path) else 'It is no .params file at all, but perhaps the web page of a proxy. '
        raise ValueError(
            f'{path} is not the file that {name} stands for: its git blob id is {found}, expected {expected}. '
            f'{web_page}If it was downloaded, delete it and try again. To use your own weights, run '
            f'`timm-atac convert FILE.params OUT_DIR --model {architecture}`, or give them their own tag: '
            f"timm.create_model('{architecture}', pretrained=True, "
            f"pretrained_cfg_overlay=dict(file='FILE.params', tag='mine'))."
        )


def git_blob_id(path: str | os.PathLike[str]) -> str:
    """Return the id that git gives the content of a file: SHA-1 of `b'blob %d\\0' % size` and the bytes, as hex."""
    with open(path, 'rb') as file:
        digest = hashlib.sha1(b'blob %d\0' % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Tells published weights from others by a hash of their tensors, since untrained networks have the same tags.

A model of timm has the pretrained cfg of its tag with or without the tag's weights. The results, the licence and the
origin in it are true of the published weights only.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .published import PUBLISHED

__all__ = ['Identity', 'forget_source', 'identify', 'record_source', 'remove_claims', 'tensor_hash']

_RECORD = re.compile(r'Loaded from (\S+) \(sha256:([0-9a-f]{64})\)')
# fields of a pretrained cfg that are true of the weights of its tag, and not of every network of the architecture
_OF_WEIGHTS = ('tag', 'license', 'description', 'origin_url', 'notes')
_OF_HOST = (*_OF_WEIGHTS, 'paper_ids', 'paper_name')  # an `atac_host` is another network than its host


class Identity(NamedTuple):
    """What is known of some weights.

    Attributes:
        weights: Hash of the tensors, as `tensor_hash` returns it.
        name: ARCH.TAG, or ARCH if the tag in the config stands for other weights.
        published: ARCH.TAG of the published weights that these are, None for other weights.
        base: ARCH.TAG of the published weights that these were before they were changed, None if none is recorded.
    """

    weights: str
    name: str
    published: str | None = None
    base: str | None = None


def tensor_hash(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and values of all tensors, as hex.

    It does not depend on the file, on the order of the tensors or on `num_batches_tracked`. float16 and float32 of the
    same values have the same hash.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        if name.endswith('num_batches_tracked'):
            continue
        tensor = state_dict[name].detach().cpu()
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        digest.update(f'{name} {tuple(tensor.shape)}\n'.encode())
        array: Any = tensor.numpy()
        digest.update(array.tobytes())
    return digest.hexdigest()


def record_source(model: Any, name: str, weights: str) -> None:
    """Write into a model's pretrained cfg which published weights were loaded. timm copies the cfg to `config.json`.

    Args:
        model: The network.
        name: ARCH.TAG of the weights.
        weights: Hash of the published tensors, before timm adapted them to other classes or input channels.
    """
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        'notes': (f'Loaded from {name} (sha256:{weights})',),
    }
    model.default_cfg = model.pretrained_cfg


def forget_source(model: Any) -> None:
    """Remove what `record_source` wrote, from a model that was created from such a config without its weights."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if isinstance(cfg, dict) and _record(cfg):
        model.pretrained_cfg = {**cfg, 'notes': None}
        model.default_cfg = model.pretrained_cfg


def identify(config: Mapping[str, Any], weights: str) -> Identity:
    """Return what is known of some weights.

    Args:
        config: `config.json` of the network.
        weights: Hash of its tensors.
    """
    cfg = config.get('pretrained_cfg', {})
    architecture, tag = config['architecture'], cfg.get('tag')
    record = _record(cfg)
    known = {published.tensors: name for name, published in PUBLISHED.items() if published.tensors}
    if record and record[1] in PUBLISHED:
        known.setdefault(record[2], record[1])
    if weights in known:
        return Identity(weights, known[weights], published=known[weights])
    base = record[1] if record and record[1] in PUBLISHED else None
    name = f'{architecture}.{tag}' if tag and tag not in _registered_cfgs(config) else architecture
    return Identity(weights, name, base=base)


def remove_claims(config: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    """Return a `config.json` without what timm's registry says of other weights. A user's own values stay."""
    cfg = dict(config.get('pretrained_cfg', {}))
    if identity.published is None:
        registered = _registered_cfgs(config)
        for key in _OF_HOST if config['architecture'] == 'atac_host' else _OF_WEIGHTS:
            if cfg.get(key) and any(other.get(key) == cfg[key] for other in registered.values()):
                del cfg[key]
    return {**config, 'pretrained_cfg': cfg}


def _record(cfg: Mapping[str, Any]) -> re.Match | None:
    notes = cfg.get('notes')
    return _RECORD.fullmatch(str(notes[0])) if isinstance(notes, (list, tuple)) and notes else None


def _registered_cfgs(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return tag -> pretrained cfg in timm's registry, for the architecture in a config and the hosts in it."""
    from timm.models import get_arch_pretrained_cfgs  # not above, since the registration imports this module

    architecture, args = config['architecture'], config.get('model_args', {})
    found: dict[str, dict[str, Any]] = {}
    while architecture:
        for name, cfg in get_arch_pretrained_cfgs(architecture).items():
            found.setdefault(name.partition('.')[2], cfg.to_dict())
        host = args.get('host')  # of an `atac_host`: the name of a model, or a dict of `model_name` and its arguments
        args = host if isinstance(host, dict) else {}
        architecture = str(args.get('model_name', host) or '').partition('.')[0]
    return found

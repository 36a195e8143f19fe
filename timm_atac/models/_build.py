"""timm's `build_model_with_cfg` for our entry functions, with the authors' files and the weights in this package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.nn as nn
from timm.models import build_model_with_cfg, resolve_pretrained_cfg

from ..weights.advice import explain_failed_download, failed_source
from ..weights.checkpoints import is_params_file
from ..weights.identity import forget_source, record_source
from ..weights.published import PUBLISHED, packaged_name

__all__ = ['SOURCES', 'build_model']

ModelT = TypeVar('ModelT', bound=nn.Module)

SOURCES = ('file', 'hf_hub_filename', 'hf_hub_id', 'state_dict', 'url')
"""Keys of a `pretrained_cfg` with the source of its weights."""


def build_model(
    model_cls: Callable[..., ModelT],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> ModelT:
    """Build a network as timm's `build_model_with_cfg` does, whose arguments these are.

    - A `file` in the authors' format needs no `custom_load`.
    - Another source in `pretrained_cfg` or `pretrained_cfg_overlay` is loaded in place of weights in this package. timm
      prefers a file.
    - The path of such weights does not stay in the model.
    - If the weights cannot be downloaded, the exception says what to do.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    packaged = None
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, dict(overlay)).to_dict()
        packaged = packaged_name(cfg.get('file'))
        if packaged and any(cfg.get(key) for key in SOURCES if key != 'file'):
            overlay['file'] = packaged = None
    if pretrained and 'custom_load' not in overlay and hasattr(model_cls, 'open_atac_layout'):
        cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, '__dict__', {})
        if is_params_file(overlay.get('file') or cfg.get('file')):
            overlay['custom_load'] = True
    try:
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            cache_dir=cache_dir,
            **kwargs,
        )
    except Exception as error:
        if pretrained and failed_source(error):
            cfg = resolve_pretrained_cfg(variant, pretrained_cfg, dict(overlay)).to_dict()
            name = f'{variant}.{cfg.get("tag")}'
            name = name if name in PUBLISHED and PUBLISHED[name].url else variant
            entries = {'file': 'FILE', **{key: value for key, value in overlay.items() if key not in SOURCES}}
            with_overlay = 'pretrained_cfg_overlay=dict(' + ', '.join(f'{k}={v!r}' for k, v in entries.items()) + ')'
            explain_failed_download(
                error,
                cfg,
                f'timm.create_model({name!r}, pretrained=True, {with_overlay})',
                "timm.create_model('local-dir:FOLDER', pretrained=True)",
                cache_dir,
            )
        raise
    _forget_packaged_file(model)
    if packaged:
        record_source(model, packaged, str(PUBLISHED[packaged].tensors))
    elif not pretrained:
        forget_source(model)
    return model


def _forget_packaged_file(model: nn.Module) -> None:
    """Remove the path of weights in this package, which timm would write to `config.json` and to checkpoints."""
    module: Any
    for module in model.modules():  # `features_only` wraps the network, which has a cfg too
        cfg = getattr(module, 'pretrained_cfg', None)
        if isinstance(cfg, dict) and packaged_name(cfg.get('file')):
            module.pretrained_cfg = module.default_cfg = {key: value for key, value in cfg.items() if key != 'file'}

"""An entry function for any model of timm with its activations replaced, for train.py, config.json and the Hub."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn as nn
from timm.layers import LayerType
from timm.models import create_model, generate_default_cfgs, resolve_pretrained_cfg

from .. import _timm
from ..replace.activations import replace_selected
from ..replace.budget import is_budget
from ..replace.where import Selection
from ..weights.advice import explain_failed_download, failed_source
from ._build import SOURCES, build_model

__all__ = ['atac_host']

# Arguments of timm's `build_model_with_cfg`; the host gets all others.
_BUILDER_ARGS = ('feature_cls', 'features_only', 'out_indices', 'pretrained_model_args', 'pretrained_strict')

# `_register.py` registers the entry function named by each key.
default_cfgs = generate_default_cfgs(
    {
        'atac_host.untrained': {  # of the default host
            'num_classes': 1000,
            'input_size': (3, 224, 224),
            'pool_size': (7, 7),
            'crop_pct': 0.875,
            'first_conv': 'conv1',
            'classifier': 'fc',
        },
    }
)


def atac_host(
    pretrained: bool = False,
    host: str | Mapping[str, Any] = 'resnet18',
    act: LayerType = 'atac',
    where: str | int | Sequence[str | int] | Mapping[str, Any] | None = None,
    rd_ratio: float | None = None,
    **kwargs,
) -> nn.Module:
    """A model of timm after `replace_activations`. The `config.json` of a saved model names this function.

    Args:
        pretrained: Load weights. If `pretrained_cfg` (of a Hub repository or a folder) or its overlay has a source of
            weights, these are the weights of the whole model; else the host's, before its activations are replaced.
        host: Name of a model, which may have a tag or a source (`hf-hub:`, `local-dir:`), or a dict of arguments of
            `timm.create_model`.
        act: As in `replace_activations`.
        where: 'paper', 'all', or `{'places': ...}` with any `where` of `replace_activations` that JSON has. None is
            'all'. A pattern, a stage number, or a list of these without `places` means what it meant in version 0.1, so
            that its folders load: a stage includes the activations inside attention modules, the name of an activation
            that several places share is all of them, and a pattern in a list may fit nothing.
        rd_ratio: Width of the units' bottleneck over the channels, None for the units' default.
        **kwargs: Arguments of the host.

    timm saves the arguments as they are given here, so a saved model needs the folder of a `local-dir:` host. To save a
    model without that dependency, use
    `save_for_hf(model, ..., model_args=model.replaced_activations.model_args)`.

    Raises:
        ValueError: As in `replace_activations`; `host` is neither a name nor a dict with one, or has a
            `checkpoint_path`; `features_only` for a host without `forward_intermediates`; `rd_ratio` is 'auto' or a
            number of parameters, which config.json would keep as it is given, and which is another ratio for another
            number of classes.
    """
    if not (host and isinstance(host, str)) and not (isinstance(host, Mapping) and host.get('model_name')):
        raise ValueError(f"host={host!r}: expected the name of a model, or a dict with it as 'model_name'.")
    if isinstance(host, Mapping) and 'checkpoint_path' in host:
        raise ValueError(
            f'host={host!r}: atac_host takes no checkpoint_path, because a config.json could name any file there, and '
            f"timm 1.0.21 runs code that is in the file. Give pretrained=True and, in the host's dict, "
            f"pretrained_cfg_overlay=dict(file='FILE')."
        )
    selection = Selection(where, saved=not isinstance(where, Mapping))
    builder = {name: kwargs.pop(name) for name in _BUILDER_ARGS if name in kwargs}
    cfg = kwargs.pop('pretrained_cfg', None)
    cfg = None if isinstance(cfg, str) else cfg  # a tag of `atac_host`; none has weights
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    own_weights = pretrained and bool(cfg or any(overlay.get(name) for name in SOURCES))
    host_args: dict[str, Any] = {'model_name': host} if isinstance(host, str) else dict(host)
    host_args['pretrained'] = pretrained and not own_weights
    host_args['pretrained_cfg_overlay'] = {
        **(host_args.get('pretrained_cfg_overlay') or {}),
        **{name: value for name, value in overlay.items() if not (own_weights and name in SOURCES)},
    }

    def make(**args) -> Any:
        host_model = _create_host({**host_args, **args})
        if is_budget(rd_ratio):
            found = replace_selected(host_model, act, selection, None, rd_ratio, dry_run=True).rd_ratio
            raise ValueError(
                f'rd_ratio={rd_ratio!r}: atac_host takes a ratio, because config.json keeps what is given, and this '
                f'would be another ratio for another number of classes. For this host, give rd_ratio={found!r}.'
            )
        model = replace_selected(host_model, act, selection, None, rd_ratio)
        if builder.get('features_only') and not hasattr(model, 'forward_intermediates'):
            raise ValueError(
                f'features_only of host={host!r}: {type(model).__name__} has no forward_intermediates. Create the host '
                f'with features_only=True and call timm_atac.replace_activations on that.'
            )
        return model

    build: Callable[..., Any] = make
    if cfg is None:  # the configuration of the host, which is known after it is created
        model = make(**kwargs)
        cfg = dict(model.pretrained_cfg)

        def build(**_) -> Any:
            return model

    return build_model(
        build,
        'atac_host',
        own_weights,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_timm.adapt_state_dict,
        feature_cfg={'feature_cls': 'getter'},
        **builder,
        **kwargs,
    )


def _create_host(host_args: dict[str, Any]) -> Any:
    """Create the host. If its weights cannot be downloaded, the exception says what to do."""
    try:
        return create_model(**host_args)
    except Exception as error:
        if failed_source(error):
            name = host_args['model_name']
            prefix, _, repository = name.rpartition(':')  # hf-hub:OWNER/NAME
            cfg: dict[str, Any] = {'hf_hub_id': repository}
            if not prefix:
                cfg = resolve_pretrained_cfg(name, None, dict(host_args['pretrained_cfg_overlay'])).to_dict()
            file_host = f"dict(model_name={name!r}, pretrained_cfg_overlay=dict(file='FILE'))"
            explain_failed_download(
                error,
                cfg,
                f"timm.create_model('atac_host', pretrained=True, host={file_host})",
                "timm.create_model('atac_host', pretrained=True, host='local-dir:FOLDER')",
                host_args.get('cache_dir'),
            )
        raise

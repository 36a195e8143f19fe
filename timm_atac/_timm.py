"""The only module that touches timm's private names."""

import sys
from collections.abc import Callable, Collection
from inspect import signature
from typing import Any, NoReturn, cast

import timm.models
import torch.nn as nn
from timm.layers import create_act
from timm.models import _registry, nfnet
from timm.models._efficientnet_blocks import SqueezeExcite as SqueezeExcite
from timm.models._features import feature_take_indices as feature_take_indices

_ACT_LAYERS = cast(dict[str, type[nn.Module]], create_act._ACT_LAYER_DEFAULT)
_ACT_LAYERS_ME = cast(dict[str, type[nn.Module]], create_act._ACT_LAYER_ME)  # preferred, unless exporting or scripting
_ACT_FNS = cast(dict[str, Callable], create_act._ACT_FN_DEFAULT)
_GAINS = cast(dict[str, float], nfnet._nonlin_gamma)


def acts(name: str) -> set[type[nn.Module]]:
    """What `get_act_layer` may give for a name, depending on the configuration."""
    return {by_name[name] for by_name in (_ACT_LAYERS_ME, _ACT_LAYERS) if name in by_name}


def add_act(name: str, layer: type[nn.Module], lean: type[nn.Module] | None, gain: float) -> None:
    """Make an activation known to timm by name.

    Args:
        name: For `get_act_layer`, `create_act_layer` and the NFNets.
        layer: What the name stands for.
        lean: Its memory-efficient form, which timm prefers unless a model is to be exported or scripted.
        gain: 1 / standard deviation of its output for a standard normal input, by which an NFNet scales its weights.
    """

    def refuse(x: Any, inplace: bool = False) -> NoReturn:
        raise ValueError(
            f'act_layer={name!r}: this model calls its activation as a function, and {layer.__name__} is a layer with '
            f'parameters. Build the model without it and call timm_atac.replace_activations(model, {name!r}).'
        )

    _ACT_LAYERS[name] = layer
    if lean is not None:
        _ACT_LAYERS_ME[name] = lean
    _ACT_FNS[name] = refuse  # for `get_act_fn`: an NFNet with `gamma_in_act`
    _GAINS[name] = gain


def forget(networks: Collection[str], modules: Collection[str], activations: Collection[str]) -> None:
    """Remove models, the modules they are listed under and activations from timm's tables, those that are there."""
    tables: list[Any] = [table for name, table in vars(_registry).items() if not name.startswith('__')]
    for table in tables:
        if isinstance(table, (dict, set)):
            for key in [key for key in table if key in modules or str(key).split('.')[0] in networks]:
                table.pop(key) if isinstance(table, dict) else table.discard(key)
    for name in activations:
        for by_name in (_ACT_LAYERS, _ACT_LAYERS_ME, _ACT_FNS, _GAINS):
            by_name.pop(name, None)


def record(model: Any, architecture: str, **args) -> dict[str, Any]:
    """Note in a model of timm by which entry function, with which arguments, it can be created again.

    timm's `save_for_hf` and `push_to_hf_hub` write that into `config.json`; before timm 1.0.31, when no arguments are
    kept in the model, they take them as `model_args`.

    Args:
        model: Has a `pretrained_cfg`, which gets the architecture's name and stays as it is otherwise.
        architecture: Name of the entry function; its argument `host` is what has created the model so far.
        args: Its other arguments, None for those that are not given.

    Returns:
        All arguments of the entry function.
    """
    created_by = model.pretrained_cfg['architecture']
    created_with = dict(getattr(model, '_model_args', {}))
    if created_by == architecture:
        host: Any = {'model_name': created_by, **created_with}
        created_with = {}
    else:
        host = created_by
    given = {name: value for name, value in args.items() if value is not None}
    model._model_args = {'host': host, **given, **created_with}
    model.pretrained_cfg = {**model.pretrained_cfg, 'architecture': architecture}
    model.default_cfg = model.pretrained_cfg
    return dict(model._model_args)


def model_args(model: Any) -> dict[str, Any]:
    """Arguments of `create_model` that the model was made with; empty before timm 1.0.31, which keeps none."""
    return dict(getattr(model, '_model_args', {}))


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width that a model takes: timm's, as it was created; of any other (3, 224, 224)."""
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    if hasattr(timm.models, 'get_model_input_config'):  # since timm 1.0.31
        return timm.models.get_model_input_config(model)['input_size'] if cfg else (3, 224, 224)
    channels, *size = cfg.get('input_size', (3, 224, 224))
    first_conv = cfg.get('first_conv')
    if isinstance(first_conv, (list, tuple)):
        first_conv = first_conv[0]
    if isinstance(first_conv, str) and hasattr(model, first_conv.partition('.')[0]):
        channels = getattr(model.get_submodule(first_conv), 'in_channels', channels)
    size = next((m.img_size for m in model.modules() if getattr(m, 'img_size', None)), size)  # a patch embedding's
    return (channels, *size)


def adapt_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What timm does with the weights of a model's class when it loads them, to another image size for one."""
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__)
    adapt = next((vars(m)['checkpoint_filter_fn'] for m in modules if 'checkpoint_filter_fn' in vars(m)), None)
    return state_dict if adapt is None else adapt(*(state_dict, model)[: len(signature(adapt).parameters)])

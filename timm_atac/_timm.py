"""The only module that uses timm's private names."""

import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NoReturn, cast

import timm.models
import torch.nn as nn
from timm.layers import create_act
from timm.models import _registry, nfnet
from timm.models._efficientnet_blocks import SqueezeExcite as SqueezeExcite
from timm.models._features import feature_take_indices as feature_take_indices

_ACT_LAYERS = cast(dict[str, type[nn.Module]], create_act._ACT_LAYER_DEFAULT)
_ACT_LAYERS_ME = cast(dict[str, type[nn.Module]], create_act._ACT_LAYER_ME)  # timm prefers these, except for export
_ACT_FNS = cast(dict[str, Callable], create_act._ACT_FN_DEFAULT)
_GAINS = cast(dict[str, float], nfnet._nonlin_gamma)
_CHECKPOINT_MODULES = ('timm.models._helpers', 'timm.models._factory', 'timm.models')
_WRAPPED_BY_US = '_timm_atac'


def acts(name: str) -> set[type[nn.Module]]:
    """The classes that `get_act_layer` returns for a name in one configuration of timm or another."""
    return {by_name[name] for by_name in (_ACT_LAYERS_ME, _ACT_LAYERS) if name in by_name}


def add_act(name: str, layer: Any, layer_me: type[nn.Module] | None, gain: float) -> None:
    """Add an activation to timm's tables.

    Args:
        name: Name for `get_act_layer`, `create_act_layer` and the NFNets.
        layer: Class of the activation, or a `partial` of it.
        layer_me: Its memory-efficient form, None if it has none. timm prefers it, except in models for export or
            scripting.
        gain: 1 / standard deviation of the output for a standard normal input. An NFNet scales its weights by it.
    """

    def refuse(x: Any, inplace: bool = False) -> NoReturn:
        raise ValueError(
            f'act_layer={name!r}: this model calls its activation as a function, and {name!r} is a layer with '
            f'parameters. Build the model without it and call timm_atac.replace_activations(model, {name!r}).'
        )

    _ACT_LAYERS[name] = layer
    if layer_me is not None:
        _ACT_LAYERS_ME[name] = layer_me
    _ACT_FNS[name] = refuse  # `get_act_fn` returns it, for an NFNet with `gamma_in_act`
    _GAINS[name] = gain


def add_checkpoint_format(reads: Callable[[Any, Any], bool], load: Callable[[Any, Any], None]) -> None:
    """Let timm's `load_checkpoint` load files of another format.

    timm gives a foreign format to the model if the file's name ends with .npz or .npy, and has no table for others. So
    the function is wrapped. It treats all other models and files as before. A second call changes nothing, and neither
    does a timm without this function.

    Args:
        reads: True for a model and a path that `load` takes.
        load: Loads the file into the model.
    """
    name = 'load_checkpoint'
    modules = [vars(sys.modules[module]) for module in _CHECKPOINT_MODULES if module in sys.modules]
    original = next((names[name] for names in modules if callable(names.get(name))), None)
    if original is None or hasattr(original, _WRAPPED_BY_US):
        return

    @wraps(original)
    def load_checkpoint(model: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not reads(model, checkpoint_path):
            return original(model, checkpoint_path, *args, **kwargs)
        load(model, checkpoint_path)
        return None  # as timm does for a foreign format

    setattr(load_checkpoint, _WRAPPED_BY_US, True)
    for names in modules:
        if names.get(name) is original:
            names[name] = load_checkpoint


def remove_model(name: str) -> None:
    """Remove a name from timm's registry, which would warn when it is registered again. An unknown name is no error."""
    _registry._model_entrypoints.pop(name, None)
    _registry._model_with_tags.pop(name, None)


def record(model: Any, architecture: str, **args) -> dict[str, Any]:
    """Write the entry function and the arguments that create a model again into the model.

    timm's `save_for_hf` and `push_to_hf_hub` copy them from there into `config.json`. Before 1.0.31 timm keeps no
    arguments in a model, and these functions take them as `model_args`.

    Args:
        model: Model of timm. The architecture in its `pretrained_cfg` changes, the other entries stay.
        architecture: Name of the entry function. Its argument `host` becomes what has created the model so far.
        args: Other arguments of the entry function, None for one that is not given.

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


def keeps_args() -> bool:
    """True since timm 1.0.31, which keeps the arguments of `create_model` in the model and writes them."""
    return hasattr(timm.models, 'get_model_args')


def model_args(model: Any) -> dict[str, Any]:
    """The arguments of `create_model` that made the model. Before timm 1.0.31 only those that `record` has written."""
    return dict(getattr(model, '_model_args', {}))


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model of timm was created for, (3, 224, 224) for other models."""
    cfg = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    if hasattr(timm.models, 'get_model_input_config'):  # since timm 1.0.31
        return timm.models.get_model_input_config(model)['input_size'] if cfg else (3, 224, 224)
    channels, *size = cfg.get('input_size', (3, 224, 224))
    first_conv = cfg.get('first_conv')
    if isinstance(first_conv, (list, tuple)):
        first_conv = first_conv[0]
    if isinstance(first_conv, str) and hasattr(model, first_conv.partition('.')[0]):
        channels = getattr(model.get_submodule(first_conv), 'in_channels', channels)
    size = next((m.img_size for m in model.modules() if getattr(m, 'img_size', None)), size)  # of a patch embedding
    return (channels, *size)


def adapt_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Change weights as timm does when it loads them into this class of models, for example for another image size."""
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__)
    adapt = next((vars(m)['checkpoint_filter_fn'] for m in modules if 'checkpoint_filter_fn' in vars(m)), None)
    return state_dict if adapt is None else adapt(*(state_dict, model)[: len(signature(adapt).parameters)])

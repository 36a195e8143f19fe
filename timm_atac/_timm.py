"""The only module that touches timm's private names."""

from collections.abc import Collection
from typing import Any, cast

import torch.nn as nn
from timm.layers import create_act
from timm.models import _registry
from timm.models._features import feature_take_indices as feature_take_indices

_ACT_LAYERS = cast(dict[str, type[nn.Module]], create_act._ACT_LAYER_DEFAULT)
_ACT_LAYERS_ME = cast(dict[str, type[nn.Module]], create_act._ACT_LAYER_ME)  # preferred, unless exporting or scripting


def get_act(name: str, default: type[nn.Module]) -> type[nn.Module]:
    """What `get_act_layer` would give for a name, `default` where it knows none of that name."""
    return _ACT_LAYERS_ME.get(name, _ACT_LAYERS.get(name, default))


def add_act(name: str, layer: type[nn.Module]) -> None:
    """Make `layer` known to `get_act_layer` and `create_act_layer` as `name`."""
    _ACT_LAYERS[name] = layer


def forget(networks: Collection[str], modules: Collection[str], activations: Collection[str]) -> None:
    """Remove models, the modules they are listed under and activations from timm's tables, those that are there."""
    tables: list[Any] = [table for name, table in vars(_registry).items() if not name.startswith('__')]
    for table in tables:
        if isinstance(table, (dict, set)):
            for key in [key for key in table if key in modules or str(key).split('.')[0] in networks]:
                table.pop(key) if isinstance(table, dict) else table.discard(key)
    for name in activations:
        _ACT_LAYERS.pop(name, None)

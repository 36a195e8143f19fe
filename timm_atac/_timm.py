"""The only module that touches timm's private names."""

from typing import Any, cast

import torch.nn as nn
from timm.layers import create_act
from timm.models import _registry
from timm.models._features import feature_take_indices as feature_take_indices
from timm.version import __version__ as __version__


def add_act_layer(name: str, layer: type[nn.Module]) -> None:
    """Make `layer` known to `get_act_layer` and `create_act_layer` as `name`.

    Raises:
        RuntimeError: The name is taken.
    """
    for table in (create_act._ACT_LAYER_ME, create_act._ACT_LAYER_DEFAULT):
        taken = table.get(name, layer)
        if taken is not layer:
            raise RuntimeError(f'the activation name {name!r} is taken by {taken!r}')
    cast(dict[str, type[nn.Module]], create_act._ACT_LAYER_DEFAULT)[name] = layer


class Snapshot:
    """What timm's tables of models and activations hold, to be put back when a registration breaks in the middle."""

    def __init__(self) -> None:
        named = {**vars(_registry), 'act_layers': create_act._ACT_LAYER_DEFAULT}
        self._tables = {k: v for k, v in named.items() if isinstance(v, (dict, set)) and not k.startswith('__')}
        self._contents = {k: _copy(table) for k, table in self._tables.items()}

    def restore(self) -> None:
        for name, table in self._tables.items():
            table.clear()
            table.update(self._contents[name])


def _copy(table: Any) -> Any:
    """Copy a table and the sets and lists in it; everything else in timm's tables is replaced, never changed."""
    if isinstance(table, dict):
        values: dict[Any, Any] = {k: v.copy() if isinstance(v, (set, list)) else v for k, v in table.items()}
        return values
    members: set[Any] = set(table)
    return members

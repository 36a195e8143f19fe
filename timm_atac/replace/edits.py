"""The changes to a model that replace the activations of chosen places by units."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerType

from ..units.create import create_activation
from ..units.deferred import ChannelModule
from ..utils.forward_pass import floating_point_tensors
from .places import Place, Rewritable, SharedModule
from .rewrite import rewrite

__all__ = ['Edits', 'UnitPerWidth']

_HOOKS = [name for name in vars(nn.Identity()) if 'hook' in name and 'state_dict' not in name]


class UnitPerWidth(nn.Module):
    """Replaces one activation that is called with several widths: each input goes to the unit for its width.

    The widths are those of the units now, which may have been pruned. Their names stay.

    Args:
        units: The units by the number of their channels. The activation itself may serve some of the widths.
        channel_dim: The dimension of the channels in every input, 1 or -1.

    Raises:
        ValueError: No unit has the width of the input, or several have it.
    """

    def __init__(self, units: Mapping[int, nn.Module], channel_dim: int) -> None:
        super().__init__()
        self.units = nn.ModuleDict({str(channels): unit for channels, unit in units.items()})
        self.channel_dim = channel_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = int(x.shape[self.channel_dim])
        widths = {
            name: unit.channels if isinstance(unit, ChannelModule) else int(name) for name, unit in self.units.items()
        }
        names = [name for name, channels in widths.items() if channels == width]
        if len(names) != 1:
            raise ValueError(
                f'Got an input of shape {tuple(x.shape)}: expected the channels of one unit in dimension '
                f'{self.channel_dim}. The units have {", ".join(map(str, widths.values()))} channels.'
            )
        return self.units[names[0]](x)


class Edits:
    """The changes to a model that put units into places. Nothing changes before `applied`.

    Args:
        model: The model.
        places: The places, all of which can be replaced.
        all_places: All places of the model.
        act: As in `replace_activations`.
        rd_ratio: Width of the units' bottleneck over the channels, None for the units' default.
        device: Device of the units, None for that of the layers around them.

    Attributes:
        units: The place of each new unit.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Sequence[Place],
        all_places: Sequence[Place],
        act: LayerType,
        rd_ratio: float | None,
        device: torch.device | None = None,
    ) -> None:
        self._model, self._act, self._rd_ratio, self._device = model, act, rd_ratio, device
        self.units: dict[nn.Module, Place] = {}
        self._children: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, new child
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []  # module, new class

        by_owner: dict[Rewritable | SharedModule, list[Place]] = defaultdict(list)
        for place in places:
            if place.owner is not None:
                by_owner[place.owner].append(place)
        for owner, chosen in by_owner.items():
            if isinstance(owner, Rewritable):
                self._rewrite(owner, chosen)
            else:
                self._replace(owner, chosen, [place for place in all_places if place.owner is owner])

    @contextmanager
    def applied(self, keep: bool = True) -> Iterator[None]:
        """Change the model. If the body of the `with` statement raises an exception, the model is changed back.

        Args:
            keep: False to change the model back in any case.
        """
        touched: list[Any] = [parent for parent, *_ in (*self._children, *self._classes)]
        before = {module: (type(module), dict(vars(module)), dict(module._modules)) for module in touched}
        succeeded = False
        try:
            for parent, name, child in self._children:
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # else PyTorch's fast path computes ReLU or GELU itself
                setattr(parent, name, child)
            for module, cls in self._classes:
                module.__class__ = cls
            yield
            succeeded = True
        finally:
            for module, (cls, attributes, children) in before.items() if not (succeeded and keep) else ():
                module.__class__ = cls
                vars(module).update(attributes)
                module._modules.clear()
                module._modules.update(children)

    def _rewrite(self, owner: Rewritable, places: Sequence[Place]) -> None:
        """Add a unit for each place in the forward of a module."""
        units: list[nn.Module | None] = [None] * len(owner.sites)
        for place in places:
            units[place.site] = unit = self._create_unit(place, owner.caller.training)
            _copy_hooks(place.activation, unit)
        if any(owner.needs_graph[place.site] for place in places):
            cls, children = rewrite(owner.caller, owner.graph, owner.sites, owner.names, units, owner.constants)
            self._classes.append((owner.caller, cls))
        else:
            children = {name: unit for name, unit in zip(owner.names, units, strict=True) if unit is not None}
        self._children += [(owner.caller, name, child) for name, child in children.items()]

    def _replace(self, owner: SharedModule, places: Sequence[Place], of_owner: Sequence[Place]) -> None:
        """Add units for an activation module under each of its names."""
        units = {place.width[0]: self._create_unit(place, owner.activation.training) for place in places}
        if len(of_owner) == 1:
            (new,) = units.values()
            _copy_hooks(owner.activation, new)
        else:
            by_width = {place.width[0]: units.get(place.width[0], owner.activation) for place in of_owner}
            new = UnitPerWidth(by_width, 1 if places[0].width[1] in ('NCHW', 'NCL') else -1)
            new.train(owner.activation.training)
            for unit in [new] if len(units) == len(of_owner) else units.values():  # an activation keeps its hooks
                _copy_hooks(owner.activation, unit)
        self._children += [(parent, child, new) for parent, child in owner.parents]

    def _create_unit(self, place: Place, training: bool) -> nn.Module:
        modules = [module for module in (place.calls[0].layer, self._model) if module is not None]
        reference = next((t for module in modules for t in floating_point_tensors(module)), torch.empty(0))
        dd: dict[str, Any] = {'device': self._device or reference.device, 'dtype': reference.dtype}
        channels, input_fmt = place.width
        unit = create_activation(self._act, channels, self._rd_ratio, input_fmt=input_fmt, **dd).train(training)
        self.units[unit] = place
        return unit


def _copy_hooks(activation: nn.Module | str, unit: nn.Module) -> None:
    """Copy the hooks of an activation to the unit that replaces it. timm takes features by such hooks."""
    if isinstance(activation, nn.Module):
        vars(unit).update({name: copy(vars(activation)[name]) for name in _HOOKS if name in vars(activation)})

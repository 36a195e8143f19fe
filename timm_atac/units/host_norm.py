"""A warning for units with BatchNorm in a model that has another norm.

timm creates activations by `act_layer(inplace=True)` and does not say which norm the model has. The norms show when
the modules around a unit are put together. The first norm that shows next to a unit decides.
"""

import logging
import weakref
from collections.abc import Sequence

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from .infer_width import is_norm

__all__ = ['HostNorm', 'host_norm']

_logger = logging.getLogger(__name__)
_GIVE_UP_AFTER = 100  # registrations of modules; a model without norms never shows one


class HostNorm:
    """Watches what one unit at a time is put into, and warns once in a process.

    Attributes:
        is_watching: True while no norm next to the unit has shown.
    """

    def __init__(self) -> None:
        self._outermost: weakref.ref[nn.Module] | None = None
        self._place = ''
        self._left = 0
        self._has_warned = False

    @property
    def is_watching(self) -> bool:
        return self._outermost is not None

    def watch(self, unit: nn.Module, place: str, parents: Sequence[nn.Module]) -> None:
        """Look for norms next to a unit, and go on looking if there are none yet.

        Args:
            unit: The unit. Only a unit with BatchNorm is watched.
            place: Where it is, for the message.
            parents: The modules that contain it, from the inside outwards.
        """
        if self._has_warned or self.is_watching or not any(isinstance(m, _BatchNorm) for m in unit.children()):
            return
        self._place = place
        if parents and not any(self._decides(parent) for parent in parents):
            self._outermost, self._left = weakref.ref(parents[-1]), _GIVE_UP_AFTER

    def on_registration(self, parent: nn.Module, module: nn.Module | None) -> None:
        """Follow the unit when the module that contains it becomes a child of `parent`."""
        outermost = self._outermost() if self._outermost is not None else None
        self._left -= 1
        if outermost is None or self._left < 0:
            self._outermost = None
        elif parent is outermost and module is not None:
            if self._decides(module):
                self._outermost = None
        elif module is outermost:
            self._outermost = None if self._decides(parent) else weakref.ref(parent)

    def _decides(self, module: nn.Module) -> bool:
        """True if a module or one of its children is a norm. Warn if none of these is a BatchNorm."""
        norms = [m for m in (module, *module.children()) if is_norm(m)]
        if norms and not any(isinstance(m, _BatchNorm) for m in norms):
            self._has_warned = True
            _logger.warning(
                'The unit%s has BatchNorm, and the layers around it have %s. In training, its output for an image '
                "depends on the other images of the batch. act_layer='atac_layernorm2d' does not mix images. (This is "
                'said once.)',
                self._place,
                type(norms[0]).__name__,
            )
        return bool(norms)


host_norm = HostNorm()
"""The one of this process. The hook of `deferred.py` calls it."""

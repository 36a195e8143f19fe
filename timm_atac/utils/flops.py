"""Counts the floating-point operations of convolutions and matrix products while a model runs."""

from contextlib import suppress
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ['FlopCounter']


class FlopCounter(TorchDispatchMode):
    """Counts by the formulas of PyTorch's `FlopCounterMode`, but does not follow modules, which takes hooks.

    Attributes:
        flops: Two for each multiply-add so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if formula is not None:
            with suppress(Exception):  # a formula does not know every kind of tensor
                self.flops += formula(*args, **kwargs, out_val=output)
        return output

"""The gates of a model's modules in one forward pass, taken with hooks."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from ..inference.fuse import FusedATAC
from ..units.atac import ATAC
from ..units.infer_width import width_at
from ..units.xunit import XUnit
from ..utils.forward_pass import evaluation_mode
from .gate import UNITS, channels_first, has_gate, hooks_are_heard, in_layout, unknown_gate
from .gate import gate as gate_of

__all__ = ['Types', 'gate_maps', 'gated_modules', 'gated_units', 'maps_and_ends']

Types = type[nn.Module] | tuple[type[nn.Module], ...] | None


def gated_units(model: nn.Module) -> dict[str, ATAC | FusedATAC | XUnit]:
    """The units of a model that have a gate, by name: `ATAC`, `SEActivation`, `LocalSE`, `XUnit`, and fused ones."""
    return {
        name: unit
        for name, unit in model.named_modules()
        if isinstance(unit, UNITS) and not isinstance(unit.gate, nn.Identity)
    }


def gated_modules(model: nn.Module, types: Types = None) -> dict[str, Any]:
    """The modules of a model that are of these types, by name; None is `gated_units`."""
    if types is None:
        return gated_units(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, types)}


def gate_maps(model: nn.Module, x: torch.Tensor, types: Types = None) -> dict[str, torch.Tensor]:
    """The gates of every `ATAC`, `SEActivation`, `LocalSE` and `XUnit` in one forward pass, in the order they ran in.

    Hooks take them, as in inference; the model is the same afterwards, whether the forward pass succeeds or not.

    Args:
        model: Any model with such units, on any device and in any dtype. A unit whose `gate_layer` is None has numbers
            of any size instead of gates, and is left out, as is one that the forward pass does not call.
        x: Images (B, C, H, W) as the model takes them; moved to the device and dtype of its first parameter.
        types: Take the gates of all modules of these types instead, such as `nn.ReLU` or `(nn.ReLU, SEModule)`: any
            that `timm_atac.gate` knows.

    Returns:
        Gates by the name of their unit ('layer3.0.act1'), float32 on the CPU, channels first whatever the unit's
        layout: (B, C, H, W), for tokens (B, C, L), and (B, C, 1, 1) where there is one gate for all positions
        (`SEActivation`) or are no positions. B is the unit's: larger than that of `x` where a host cuts images into
        windows. Further calls of the same unit are 'act#2', 'act#3'. The layout of an activation that does not know it
        is that of the layers around it.

    Raises:
        ValueError: No unit of the model has a gate, none with one is called, or `x` is not (B, C, H, W) with B >= 1.
        TypeError: `types` has one that `timm_atac.gate` does not know.

    Source:
        `sigmoid(BN2(conv2(relu(BN1(conv1(x))))))` of the paper's section III.
    """
    return maps_and_ends(model, x, types)[0]


def maps_and_ends(
    model: nn.Module, x: torch.Tensor, types: Types = None
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """As `gate_maps`; and, given `types`, the names of those modules with which the module around them ends.

    In a residual block such an activation comes after the addition.
    """
    _check_types(types)
    modules = gated_modules(model, types)
    _check(model, x, types, modules)
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), x)
    taken = _Taken()
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())  # the tensors of inference_mode are of no use in a cache
        stack.enter_context(hooks_are_heard())
        for name, module in modules.items():
            handles = taken.watch_unit(name, module) if types is None else taken.watch(name, module, model)
            for handle in handles:
                stack.callback(handle.remove)
        model(x.to(like.device, like.dtype))
    if not taken.gates:
        raise ValueError(
            f'The forward pass of {type(model).__name__} calls none of its {len(modules)} '
            f'{"units with a gate" if types is None else "modules of these types"}. Of a model '
            f'compiled by a PyTorch before 2.6, give the one that was compiled.'
        )
    return taken.gates, frozenset(taken.ends)


def _check_types(types: Types) -> None:
    for cls in types if isinstance(types, tuple) else (types,):
        if cls is not None and not isinstance(cls, type):
            raise TypeError(f'types={types!r}: expected a type or a tuple of types, such as (nn.ReLU, nn.GELU).')
        if cls is not None and not has_gate(cls):
            raise unknown_gate(cls)


def _check(model: nn.Module, x: torch.Tensor, types: Types, modules: dict[str, Any]) -> None:
    if not modules and types is None:
        raise ValueError(
            f'{type(model).__name__} has no unit with a gate (ATAC, SEActivation, LocalSE): expected a model such as '
            f"atac_resnet50, one that timm made with act_layer='atac', or any after timm_atac.replace_activations."
        )
    if not modules:
        names = ', '.join(cls.__name__ for cls in (types if isinstance(types, tuple) else (types,)) if cls)
        raise ValueError(f'{type(model).__name__} has no module of types=({names}): expected types that it has.')
    if x.ndim != 4 or not len(x):
        raise ValueError(f'x of shape {tuple(x.shape)}: expected images (B, C, H, W), at least one; x[None] for one.')


class _Taken:
    """What the hooks of one forward pass have taken."""

    def __init__(self) -> None:
        self.gates: dict[str, torch.Tensor] = {}
        self.ends: set[str] = set()
        self._is_busy = False

    def _add(self, name: str, gate: torch.Tensor) -> str:
        calls = sum(key.partition('#')[0] == name for key in self.gates)
        key = f'{name}#{calls + 1}' if calls else name
        self.gates[key] = gate.to('cpu', torch.float32, copy=True)
        return key

    def watch_unit(self, name: str, unit: ATAC | FusedATAC) -> Iterator[RemovableHandle]:
        """Hooks for a unit's gates as it runs: the layer `gate` has the values, the unit the layout of its input."""
        latest: list[torch.Tensor] = []

        def on_gate(module: nn.Module, args: Any, gate: torch.Tensor) -> None:
            latest[:] = [gate]

        def on_unit(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if latest:  # else a subclass that does without
                gate = in_layout(unit, latest.pop(), output.shape)
                self._add(name, channels_first(gate, unit.input_fmt))

        yield unit.gate.register_forward_hook(on_gate)
        yield unit.register_forward_hook(on_unit, prepend=True)  # others may change the output

    def watch(self, name: str, module: nn.Module, model: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks for the gates of any module, from its input: some write over it."""
        place, _, own = name.rpartition('.')
        parent = model.get_submodule(place) if name else None
        latest: list[Any] = []  # of the last call, name and output

        def before(module: nn.Module, args: Any) -> None:
            if self._is_busy:  # inside a module whose gate is being taken, or that module itself
                return
            self._is_busy = True
            try:
                gate = gate_of(module, args[0])
            finally:
                self._is_busy = False
            latest[:] = [self._add(name, channels_first(gate, _layout(module, gate.shape, parent, own)))]

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not self._is_busy:
                latest[1:] = [output]

        def after_parent(module: nn.Module, args: Any, output: Any) -> None:
            if len(latest) == 2 and latest.pop() is output:
                self.ends.add(latest[0])

        yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after)
        if parent is not None:
            yield parent.register_forward_hook(after_parent, prepend=True)


def _layout(module: nn.Module, shape: torch.Size, parent: nn.Module | None, own: str) -> str:
    """Layout of a module's gates: its own, or that of the layers around it, or else channels first."""
    if isinstance(module, UNITS):
        return module.input_fmt
    width = width_at(parent, own) if parent is not None else None
    return width.likely_fmt if width is not None and width.channels == shape[-1] else 'NCHW'

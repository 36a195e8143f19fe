"""The gates of a model's modules in one forward pass, recorded with hooks."""

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
from ..utils.words import counted
from .gate import UNITS, has_gate, in_layout_of_input, output_of_gate_layer, unknown_gate, without_compiled_code
from .gate import gate as gate_of

__all__ = ['GatesError', 'ModuleTypes', 'gate_maps', 'gate_maps_and_block_ends', 'gated_units', 'modules_of_types']


class GatesError(ValueError):
    """The gates of a model cannot be recorded or drawn; the message says why, and what to do."""


ModuleTypes = type[nn.Module] | tuple[type[nn.Module], ...] | None


def gated_units(model: nn.Module) -> dict[str, ATAC | FusedATAC | XUnit]:
    """Return the `ATAC`, `SEActivation`, `LocalSE`, `XUnit` and fused units of a model that have a gate, by name."""
    return {
        name: unit
        for name, unit in model.named_modules()
        if isinstance(unit, UNITS) and not isinstance(unit.gate, nn.Identity)
    }


def modules_of_types(model: nn.Module, types: ModuleTypes = None) -> dict[str, Any]:
    """Return the modules of a model that have one of these types, by name; for None, `gated_units`."""
    if types is None:
        return gated_units(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, types)}


def gate_maps(model: nn.Module, x: torch.Tensor, types: ModuleTypes = None) -> dict[str, torch.Tensor]:
    """Return the gates of every `ATAC`, `SEActivation`, `LocalSE` and `XUnit` in one forward pass, in running order.

    The model runs in evaluation mode, with hooks. Afterwards it is unchanged, also if the forward pass fails.

    Args:
        model: Any model with such units, on any device and in any dtype. Units with `gate_layer=None` are left out,
            since their "gates" are any real numbers, and so are units that the forward pass does not call.
        x: Images (B, C, H, W) as the model takes them. They are moved to the device and dtype of its first parameter.
        types: Return the gates of all modules of these types instead, such as `nn.ReLU` or `(nn.ReLU, SEModule)`.
            `timm_atac.gate` must support them.

    Returns:
        Gates by the name of their module ('layer3.0.act1'), in float32 on the CPU, channels first in any layout of the
        module: (B, C, H, W), or (B, C, L) for tokens. It is (B, C, 1, 1) if all positions have one gate
        (`SEActivation`) or there are no positions. B is the module's batch size, larger than that of `x` if the model
        splits images into windows. If a module is called again, these gates are named 'act#2', 'act#3'. The layout of
        an activation is inferred from the layers next to it.

    Raises:
        GatesError: The model has no unit with a gate, or calls none, or `x` is not (B, C, H, W) with B >= 1.
        TypeError: `timm_atac.gate` does not support one of `types`.

    Source:
        `sigmoid(BN2(conv2(relu(BN1(conv1(x))))))` of the paper's section III.
    """
    return gate_maps_and_block_ends(model, x, types)[0]


def gate_maps_and_block_ends(
    model: nn.Module, x: torch.Tensor, types: ModuleTypes = None
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """Return `gate_maps`, and the names of the modules whose output is the output of their parent module.

    In a residual block this is the activation after the addition.
    """
    check_model(model)
    _check_types(types)
    modules = modules_of_types(model, types)
    _check(model, x, types, modules)
    reference = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), x)
    recorder = _Recorder()
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())  # tensors of inference_mode in a cache of the model could not train later
        stack.enter_context(without_compiled_code())
        for name, module in modules.items():
            for handle in recorder.add_hooks(model, name, module):
                stack.callback(handle.remove)
        model(x.to(reference.device, reference.dtype))
    if not recorder.gates:
        raise GatesError(
            f'{type(model).__name__} has {counted(len(modules), "module")} '
            f'{"with a gate" if types is None else "of these types"}, and its forward pass calls none of them. '
            f'If the model was compiled with PyTorch before 2.6, give the model before torch.compile.'
        )
    return recorder.gates, frozenset(recorder.block_ends)


def _check_types(types: ModuleTypes) -> None:
    for cls in types if isinstance(types, tuple) else (types,):
        if cls is not None and not isinstance(cls, type):
            raise TypeError(f'types={types!r}: expected a type or a tuple of types, such as (nn.ReLU, nn.GELU).')
        if cls is not None and not has_gate(cls):
            raise unknown_gate(cls)


def check_model(model: Any, name: str = 'model') -> None:
    """Raise a TypeError if an argument is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'{name} is a {type(model).__name__}: expected a network, such as timm.create_model("atac_resnet50").'
        )


def _check(model: nn.Module, x: torch.Tensor, types: ModuleTypes, modules: dict[str, Any]) -> None:
    if not modules and types is None:
        raise GatesError(
            f'{type(model).__name__} has no unit with a gate (ATAC, SEActivation, LocalSE): expected a model such as '
            f"atac_resnet50, one that timm made with act_layer='atac', or any after timm_atac.replace_activations."
        )
    if not modules:
        names = ', '.join(cls.__name__ for cls in (types if isinstance(types, tuple) else (types,)) if cls)
        raise GatesError(f'{type(model).__name__} has no module of types=({names}): expected types that it has.')
    if not isinstance(x, torch.Tensor):
        raise TypeError(f'x is a {type(x).__name__}: expected a tensor of images (B, C, H, W).')
    if x.ndim != 4 or not len(x):
        raise GatesError(
            f'x of shape {tuple(x.shape)}: expected images (B, C, H, W), at least one; use x[None] for a single image.'
        )


class _Recorder:
    """Records gates with hooks.

    Attributes:
        gates: Gates (B, C, ...) by the name of their module, in the order of the calls.
        block_ends: Names of the modules whose output is the output of their parent.
    """

    def __init__(self) -> None:
        self.gates: dict[str, torch.Tensor] = {}
        self.block_ends: set[str] = set()
        self._is_computing = False

    def add_hooks(self, model: nn.Module, name: str, module: Any) -> Iterator[RemovableHandle]:
        """Add hooks that record the gates of a module of the model; yield their handles."""
        parent_name, _, child_name = name.rpartition('.')
        parent = model.get_submodule(parent_name) if name else None
        has_gate_layer = gate_of.dispatch(type(module)) is output_of_gate_layer
        gates: list[torch.Tensor] = []  # of the call that is running
        latest: list[Any] = []  # key and output of the last call

        def on_gate_layer(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
            gates[:] = [output]

        def before(module: nn.Module, args: Any) -> None:
            if self._is_computing:  # `gate` runs this module, or a module around it
                return
            self._is_computing = True
            try:
                gates[:] = [gate_of(module, args[0]).clone()]  # now, since the module may write over its input
            finally:
                self._is_computing = False

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._is_computing or not gates:
                return
            gate = gates.pop()
            if has_gate_layer:
                gate = in_layout_of_input(module, gate, output.shape)
            layout = _layout(module, gate.shape, parent, child_name)
            latest[:] = [self._record(name, _channels_first(gate, layout)), output]

        def after_parent(module: nn.Module, args: Any, output: Any) -> None:
            if latest and latest.pop() is output:
                self.block_ends.add(latest[0])
            latest.clear()

        if has_gate_layer:
            yield module.gate.register_forward_hook(on_gate_layer)
        else:
            yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after, prepend=True)  # before hooks that change the output
        if parent is not None:
            yield parent.register_forward_hook(after_parent, prepend=True)

    def _record(self, name: str, gate: torch.Tensor) -> str:
        calls = sum(key.partition('#')[0] == name for key in self.gates)
        key = f'{name}#{calls + 1}' if calls else name
        self.gates[key] = gate.to('cpu', torch.float32, copy=True)
        return key


def _layout(module: nn.Module, shape: torch.Size, parent: nn.Module | None, child_name: str) -> str:
    """Return the layout of a module's gates: that of the unit, else that of the layers next to it, else 'NCHW'."""
    if isinstance(module, UNITS):
        return module.input_fmt
    width = width_at(parent, child_name) if parent is not None else None
    return width.likely_fmt if width is not None and width.channels == shape[-1] else 'NCHW'


def _channels_first(gate: torch.Tensor, input_fmt: str) -> torch.Tensor:
    """Return gates of a layout as (B, C, ...); as (B, C, 1, 1) if there is one gate per channel."""
    if input_fmt in ('NHWC', 'NLC'):
        gate = gate.movedim(-1, 1)
    return gate if gate.shape[2:].numel() > 1 else gate.reshape(*gate.shape[:2], 1, 1)

"""What the gates of a model do on an image: taken with hooks.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.utils.hooks import RemovableHandle

from ._timm import input_size
from .fused import FusedATAC
from .layers import ATAC, SEActivation
from .plot import plot_gates

__all__ = ['gate_maps', 'gated_units', 'gates_picture', 'plot_gates']


def gated_units(model: nn.Module) -> dict[str, ATAC | FusedATAC]:
    """The units of a model that have a gate, by name: `ATAC`, `SEActivation`, `LocalSE`, and fused ones."""
    return {
        name: unit
        for name, unit in model.named_modules()
        if isinstance(unit, (ATAC, FusedATAC)) and not isinstance(unit.gate, nn.Identity)
    }


def gate_maps(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gates of every `ATAC`, `SEActivation` and `LocalSE` in one forward pass, in the order in which they ran.

    Hooks take them, as in inference; the model is the same afterwards, whether the forward pass succeeds or not.

    Args:
        model: Any model with such units, on any device and in any dtype. A unit whose `gate_layer` is None has numbers
            of any size instead of gates, and is left out, as is one that the forward pass does not call.
        x: Images (B, C, H, W) as the model takes them; moved to the device and dtype of its first parameter.

    Returns:
        Gates by the name of their unit ('layer3.0.act1'), float32 on the CPU, channels first whatever the unit's
        layout: (B, C, H, W), for tokens (B, C, L), and (B, C, 1, 1) where there is one gate for all positions
        (`SEActivation`) or are no positions. B is the unit's: larger than that of `x` where a host cuts images into
        windows. Further calls of the same unit are 'act#2', 'act#3'.

    Raises:
        ValueError: No unit of the model has a gate, none with one is called, or `x` is not (B, C, H, W) with B >= 1.

    Source:
        `sigmoid(BN2(conv2(relu(BN1(conv1(x))))))` of the paper's section III.
    """
    units = gated_units(model)
    if not units:
        raise ValueError(
            f'{type(model).__name__} has no unit with a gate (ATAC, SEActivation, LocalSE): expected a model such as '
            f"atac_resnet50, one that timm made with act_layer='atac', or any after timm_atac.replace_activations."
        )
    if x.ndim != 4 or not len(x):
        raise ValueError(f'x of shape {tuple(x.shape)}: expected images (B, C, H, W), at least one; x[None] for one.')
    like = next(t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    gates: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(_inference(model))
        if hasattr(torch.compiler, 'set_stance'):  # since PyTorch 2.6: compiled code does not hear of new hooks
            stack.enter_context(torch.compiler.set_stance('force_eager'))
        for name, unit in units.items():
            for handle in _watch(name, unit, gates):
                stack.callback(handle.remove)
        model(x.to(like.device, like.dtype))
    if not gates:
        raise ValueError(
            f'The forward pass of {type(model).__name__} calls none of its {len(units)} units with a gate. Of a model '
            f'compiled by a PyTorch before 2.6, give the one that was compiled.'
        )
    return gates


def _watch(name: str, unit: ATAC | FusedATAC, gates: dict[str, torch.Tensor]) -> Iterator[RemovableHandle]:
    """Hooks that put the unit's gates into `gates`: the gate has the values, the unit the layout of its input."""
    latest: list[torch.Tensor] = []

    def on_gate(module: nn.Module, args: Any, gate: torch.Tensor) -> None:
        latest[:] = [gate]

    def on_unit(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if latest:  # else a subclass that does without
            calls = sum(key.partition('#')[0] == name for key in gates)
            gate = _channels_first(unit, latest.pop(), output.shape)
            gates[f'{name}#{calls + 1}' if calls else name] = gate.to('cpu', torch.float32, copy=True)

    yield unit.gate.register_forward_hook(on_gate)
    yield unit.register_forward_hook(on_unit, prepend=True)  # others may change the output


def _channels_first(unit: ATAC | FusedATAC, gate: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo what `ChannelModule.forward` does to the positions of an input of `shape`: the gate is (B, C, N, 1)."""
    positions = shape[2:] if unit.input_fmt in ('NCHW', 'NCL') else shape[1:-1]
    if isinstance(unit, SEActivation) or not positions:
        return gate
    return gate.reshape(*gate.shape[:2], *positions)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Every module as in `eval()`, no gradients; then modes and buffers as before.

    Not `inference_mode`, whose tensors would stay in the cache of a host that has one and be of no use in training.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        if modes[model]:
            model.train()  # timm's LeViT and others forget here what they have cached
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def gates_picture(
    model: nn.Module,
    image: Image.Image,
    path: str | os.PathLike[str],
    title: str | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Run a model on an image, prepared as timm prepares it for validation, and draw its gates over what it saw.

    Args:
        model: As in `gate_maps`; takes images of one channel or three.
        image: Any size and mode; turned to grey for a model of one channel, to RGB for three.
        path: As in `plot_gates`.
        title: As in `plot_gates`.
        img_size: Height and width for the model, None for its own.

    Returns:
        As `gate_maps`, B = 1.

    Raises:
        ValueError: As `gate_maps`; the model takes images of another number of channels.
        ImportError: matplotlib is not installed.
    """
    channels, *size = input_size(model)
    if channels not in (1, 3):
        raise ValueError(
            f'{type(model).__name__} takes images of {channels} channels: expected 1 (grey) or 3 (RGB). For others '
            f'call gate_maps with a tensor (B, {channels}, H, W), then plot_gates with a picture to draw over.'
        )
    if img_size is not None:
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    config = resolve_model_data_config(model, args={'input_size': (channels, *size)})
    for name in ('mean', 'std'):
        if len(config[name]) != channels:  # timm's are those of RGB
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    x = create_transform(**config, is_training=False)(image.convert('L' if channels == 1 else 'RGB'))
    gates = gate_maps(model, x[None])
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
    plot_gates(gates, (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(), path, title)
    return gates

"""The cost of a network: parameters, multiply-adds and activations, as in timm's model cards."""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import _timm
from ..utils.forward_pass import evaluation_mode

__all__ = ['Profile', 'profile']


class Profile(NamedTuple):
    """Cost of one image.

    Attributes:
        params: Parameters, in millions.
        gmacs: Multiply-adds of convolutions, matrix products and linear layers, in billions.
        activations: Output values of convolutions and linear layers, in millions.
        input_size: Channels, height and width of the image.
    """

    params: float
    gmacs: float
    activations: float
    input_size: tuple[int, int, int]


def profile(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Profile:
    """Count parameters, multiply-adds and activations of a forward pass.

    Args:
        model: Any model; on the device 'meta' nothing is computed. It is unchanged afterwards.
        input_size: Channels, height and width of the image, None for the size that the model was created for.
    """
    size = input_size or _timm.input_size(model)
    outputs: list[int] = []

    def count(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        outputs.append(output.numel())

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    parameter = next(model.parameters())
    try:
        # FlopCounterMode does not count the attention kernels for CPUs
        with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    params = sum(p.numel() for p in model.parameters())
    return Profile(params / 1e6, counter.get_total_flops() / 2e9, sum(outputs) / 1e6, size)

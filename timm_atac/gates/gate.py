"""The gate of an activation or an attention module: the factor G in `module(x) == G * x`.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)

Activations and attention modules are both such a product. They differ in what the gate of a value x depends on:

| module                       | G of a value x                         | depends on                     |
| ---------------------------- | -------------------------------------- | ------------------------------ |
| `nn.ReLU`                    | 1 for x >= 0, else 0                   | x                              |
| `nn.SiLU` (Swish)            | sigmoid(x)                             | x                              |
| `nn.SELU`                    | scale, or scale alpha (e^x - 1) / x    | x                              |
| `nn.GELU`                    | normal distribution function of x      | x                              |
| `Sine` (SIREN)               | sin(omega x) / x                       | x                              |
| `SEModule`, `SEActivation`   | a bottleneck and a sigmoid             | the mean of each channel       |
| `GatherExcite`               | a bottleneck and a sigmoid             | weighted sums over positions   |
| `ATAC`, `LocalSE`            | a bottleneck and a sigmoid             | all channels at x's position   |
| `XUnit`                      | a convolution and a Gaussian           | the positions around x         |
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import singledispatch
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import EffectiveSEModule, SEModule, activations, activations_me
from timm.layers import GatherExcite as TimmGatherExcite

from .._timm import SqueezeExcite
from ..inference.fuse import FusedATAC
from ..units.atac import ATAC, NiN, SEActivation
from ..units.deferred import ChannelModule
from ..units.gather_excite import GatherExcite
from ..units.sine import Sine
from ..units.xunit import XUnit

__all__ = ['gate']


@singledispatch
def gate(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the gate G of a module, with `module(x) == G * x`.

    At x = 0, G is a limit: the limit from the right if the two sides differ, such as 1 for a ReLU. G is differentiable
    with respect to x and the parameters. The module runs in its current mode, training or evaluation. Its buffers, such
    as running statistics, do not change.

    Args:
        module: An activation of PyTorch or timm, `Sine`, an SE or Gather-Excite module, or a unit of this package
            except `NiN`. With `gate_layer=None`, the gates of a unit are any real numbers. The decorator
            `timm_atac.gate.register(Type)` adds a type; it is put on a function of a module and x. A subclass has the
            gate of its base class unless it is registered itself.
        x: Input of the module, of any shape that the module takes and any floating-point type. It is not changed.

    Returns:
        For an activation or a local unit (ATAC, LocalSE, XUnit), a tensor of the shape of x. For a module with one gate
        per channel (SE, SEActivation, GatherExcite), each position is 1, in the layout of the module: (B, C, 1, 1) or
        (B, 1, 1, C). timm's Gather-Excite returns one or the other, depending on its `extent`.

    Raises:
        TypeError: `module` is not a module, has no gate or one that is not known, or x is not a floating-point tensor.
        ValueError: The input of a unit has another number of channels than the unit.

    Source:
        Section III of the paper. The limits at 0 are ours.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f'module={module!r}: expected a module, such as nn.ReLU() or a layer of a model.')
    raise unknown_gate(type(module))


def unknown_gate(cls: type) -> TypeError:
    """Return the error for a type without a known gate. It lists the types that have one."""
    if issubclass(cls, NiN):
        return TypeError(f'{cls.__name__} has no gate: its output is not a product with its input.')
    known = sorted({known.__name__ for known in gate.registry if known is not object})
    name = f'{cls.__module__}.{cls.__name__}' if cls.__name__ in known else cls.__name__
    return TypeError(
        f'{name}: its gate is not known; expected one of {", ".join(known)}. To add another type, put the '
        f'decorator @timm_atac.gate.register({cls.__name__}) on a function (module, x) -> G.'
    )


def has_gate(cls: type) -> bool:
    """Return True if `gate` supports modules of a type."""
    return gate.dispatch(cls) is not gate.dispatch(object)


def activation_types() -> tuple[type[nn.Module], ...]:
    """Return the registered types whose gate is elementwise: all except the units, channel attention and identity."""
    others = (object, nn.Identity, *UNITS, *CHANNEL_ATTENTION)
    return tuple(cls for cls in gate.registry if cls not in others)


# Elementwise gates. At 0 and at infinity, each of these functions returns the limit and has a gradient.


def _one_or_slope(x: torch.Tensor, slope: float | torch.Tensor) -> torch.Tensor:
    """Return 1 for x >= 0, else the slope. The gradient of x is zero; the slope has a gradient too."""
    is_negative = torch.sign(-x).relu()
    return slope * is_negative + (1 - is_negative)


def _per_channel(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1, *(1,) * (x.ndim - 2)) if len(weight) > 1 else weight[0]


def _elu(x: torch.Tensor, alpha: float, scale: float = 1.0) -> torch.Tensor:
    is_negative = x < 0
    negative = torch.where(is_negative, x, -1)  # 0 / 0 would make the gradient NaN even where it is not selected
    return scale * torch.where(is_negative, alpha * torch.expm1(negative) / negative, 1)


def _normal(x: torch.Tensor) -> torch.Tensor:
    """Return the normal distribution function. `erfc` is accurate for large negative x too."""
    return 0.5 * torch.erfc(-math.sqrt(0.5) * x)


def _normal_by_tanh(x: torch.Tensor) -> torch.Tensor:
    x = x.clamp(-30, 30)  # outside, the result is 0 or 1 in every type, and the cube may overflow
    return torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)  # alpha, scale; as in PyTorch

_ELEMENTWISE: dict[tuple[type[nn.Module], ...], Callable[[Any, torch.Tensor], torch.Tensor]] = {
    (nn.Identity,): lambda act, x: _one_or_slope(x, 1.0),
    (nn.ReLU,): lambda act, x: _one_or_slope(x, 0.0),
    (nn.ReLU6,): lambda act, x: _one_or_slope(x, 0.0) * (6 / x.clamp(min=6)),
    (nn.LeakyReLU,): lambda act, x: _one_or_slope(x, act.negative_slope),
    (nn.PReLU,): lambda act, x: _one_or_slope(x, _per_channel(act.weight, x)),
    (nn.ELU,): lambda act, x: _elu(x, act.alpha),
    (nn.CELU,): lambda act, x: _elu(x / act.alpha, 1.0),
    (nn.SELU,): lambda act, x: _elu(x, *_SELU),
    (nn.GELU,): lambda act, x: (_normal if act.approximate == 'none' else _normal_by_tanh)(x),
    (activations.GELU,): lambda act, x: _normal(x),
    (activations.GELUTanh,): lambda act, x: _normal_by_tanh(x),
    (activations.QuickGELU,): lambda act, x: torch.sigmoid(1.702 * x),
    (nn.SiLU, activations.Swish, activations_me.SwishMe): lambda act, x: torch.sigmoid(x),
    (nn.Mish, activations.Mish, activations_me.MishMe): lambda act, x: torch.tanh(F.softplus(x)),
    (nn.Hardswish, activations.HardSwish, activations_me.HardSwishMe): lambda act, x: F.hardsigmoid(x),
    (Sine,): lambda act, x: act.omega * torch.sinc(act.omega / math.pi * x),
}


def _check(x: Any) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        given = f'x of {x.dtype}' if isinstance(x, torch.Tensor) else f'x={x!r}'
        raise TypeError(f'{given}: expected a tensor of a floating-point type, such as x.float().')


def _in_float32(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return a gate function that computes in float32 for inputs in float16 and bfloat16."""

    def elementwise_gate(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        _check(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return function(module, wide).to(x.dtype)

    return elementwise_gate


for _types, _function in _ELEMENTWISE.items():
    for _type in _types:
        gate.register(_type, _in_float32(_function))


def without_compiled_code() -> AbstractContextManager:
    """Return a context in which compiled modules run uncompiled: compiled code ignores hooks that are added later.

    It does nothing before PyTorch 2.6, and in code that is being compiled.
    """
    if hasattr(torch.compiler, 'set_stance') and not torch.compiler.is_compiling():
        return torch.compiler.set_stance('force_eager')
    return nullcontext()


# Modules that multiply their input by the output of their layer `gate`

UNITS = (ATAC, FusedATAC, XUnit)  # with the subclasses SEActivation, LocalSE and ATACMe
CHANNEL_ATTENTION = (SEModule, EffectiveSEModule, SqueezeExcite, GatherExcite, TimmGatherExcite)


def output_of_gate_layer(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Run the module on copies of its buffers, and return the output of its layer `gate`."""
    _check(x)
    if isinstance(module, ChannelModule):
        module.check_input(x)  # a unit without a width has no layers yet
    outputs: list[torch.Tensor] = []
    handle = module.gate.register_forward_hook(lambda layer, args, output: outputs.append(output))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with without_compiled_code():
            torch.func.functional_call(module, buffers, (x,))
    finally:
        handle.remove()
    if not outputs:
        raise TypeError(
            f'{type(module).__name__} does not call its layer `gate`: expected a class that does, or one with a gate '
            f'of its own by timm_atac.gate.register.'
        )
    return in_layout_of_input(module, outputs[-1], x.shape)


for _type in (*UNITS, *CHANNEL_ATTENTION):
    gate.register(_type, output_of_gate_layer)


def in_layout_of_input(module: nn.Module, output: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the output of the layer `gate` in the layout of the module's input.

    It reverses how `ChannelModule.forward` reshapes the positions.

    Args:
        module: A unit, or any module whose layer `gate` has the layout of the input.
        output: Output of the layer. For a unit (B, C, H, W), (B, C, 1, 1), or in another layout than NCHW (B, C, N, 1).
        shape: Shape of the module's input.
    """
    if not isinstance(module, ChannelModule) or module.input_fmt == 'NCHW':
        return output
    is_channels_last = module.input_fmt != 'NCL'
    positions = shape[1:-1] if is_channels_last else shape[2:]
    if isinstance(module, SEActivation):
        positions = torch.Size([1] * len(positions))
    output = output.reshape(*output.shape[:2], *positions)
    return output.movedim(1, -1) if is_channels_last else output

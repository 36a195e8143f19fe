"""The gate of an activation or an attention module: the factor G in `module(x) == G * x`.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)

Both kinds of modules are such a product; they differ in what a gate looks at:

| module                       | G of a value x                      | looks at                     |
| ---------------------------- | ----------------------------------- | ---------------------------- |
| `nn.ReLU`                    | 1 for x >= 0, else 0                | the value                    |
| `nn.SiLU` (Swish)            | sigmoid(x)                          | the value                    |
| `nn.SELU`                    | scale, or scale alpha (e^x - 1) / x | the value                    |
| `nn.GELU`                    | distribution function of the normal | the value                    |
| `Sine` (SIREN)               | sin(omega x) / x                    | the value                    |
| `SEModule`, `SEActivation`   | a bottleneck and a sigmoid          | the channels' means          |
| `GatherExcite`               | a bottleneck and a sigmoid          | weighted sums over positions |
| `ATAC`, `LocalSE`            | a bottleneck and a sigmoid          | the channels of the position |
| `XUnit`                      | a convolution and a Gaussian        | the positions around it      |
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
    """The gate G of a module, with `module(x) == G * x`.

    At x = 0 it is the limit: from the right where the sides differ, 1 for a ReLU. Gradients flow through it to x and to
    the parameters. The module runs in the mode it is in; its buffers, such as running statistics, stay as they are.

    Args:
        module: An activation of PyTorch or timm, `Sine`, SE of timm, Gather-Excite, or a unit of this package but
            `NiN`. With `gate_layer=None` a unit has numbers of any size in place of gates. Another type is added by
            `timm_atac.gate.register(Type)`, a decorator of a function of a module and x; a subclass has the gate of its
            base unless it has one of its own.
        x: Input of the module, of any shape it takes and any floating-point type. Never changed.

    Returns:
        Of an activation and of a local unit (ATAC, LocalSE, XUnit), the shape of x; where there is one gate a channel
        (SE, SEActivation, GatherExcite) 1 in place of each position, in the layout of the module: (B, C, 1, 1) or
        (B, 1, 1, C). Of timm's Gather-Excite, either.

    Raises:
        TypeError: The module has no gate, or one that is not known; it is no module; x is not of a floating-point type.
        ValueError: Of a unit, an input of another width.

    Source:
        Section III of the paper. The limits at 0 are ours.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f'module={module!r}: expected a module, such as nn.ReLU() or a layer of a model.')
    raise unknown_gate(type(module))


def unknown_gate(cls: type) -> TypeError:
    """The error that a type has no gate, with what has one."""
    if issubclass(cls, NiN):
        return TypeError(f'{cls.__name__} has no gate: its output is not a product with its input.')
    known = sorted({known.__name__ for known in gate.registry if known is not object})
    name = f'{cls.__module__}.{cls.__name__}' if cls.__name__ in known else cls.__name__
    return TypeError(
        f'{name}: its gate is not known; expected one of {", ".join(known)}. Add another by '
        f'@timm_atac.gate.register({cls.__name__}) over a function (module, x) -> G.'
    )


def has_gate(cls: type) -> bool:
    """Whether `gate` knows modules of a type."""
    return gate.dispatch(cls) is not gate.dispatch(object)


def activation_types() -> tuple[type[nn.Module], ...]:
    """The types whose gate looks at a value alone: all that are registered but attention and the identity."""
    others = (object, nn.Identity, *UNITS, *CHANNEL_ATTENTION)
    return tuple(cls for cls in gate.registry if cls not in others)


# Elementwise: each form is the limit, and has a gradient, at 0 and at infinity


def _sides(x: torch.Tensor, slope: float | torch.Tensor) -> torch.Tensor:
    """1 for x >= 0, else the slope; with a gradient to x, of zeros, and to the slope."""
    below = torch.sign(-x).relu()
    return slope * below + (1 - below)


def _per_channel(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1, *(1,) * (x.ndim - 2)) if len(weight) > 1 else weight[0]


def _elu(x: torch.Tensor, alpha: float, scale: float = 1.0) -> torch.Tensor:
    below = x < 0
    safe = torch.where(below, x, -1)  # no 0 / 0, whose gradient would be NaN even where it is not taken
    return scale * torch.where(below, alpha * torch.expm1(safe) / safe, 1)


def _normal(x: torch.Tensor) -> torch.Tensor:
    """The distribution function; by erfc, which is exact far below 0 too."""
    return 0.5 * torch.erfc(-math.sqrt(0.5) * x)


def _normal_by_tanh(x: torch.Tensor) -> torch.Tensor:
    x = x.clamp(-30, 30)  # beyond, 0 or 1 in every type, and the cube may overflow
    return torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)  # alpha, scale; as in PyTorch

_FORMS: dict[tuple[type[nn.Module], ...], Callable[[Any, torch.Tensor], torch.Tensor]] = {
    (nn.Identity,): lambda act, x: _sides(x, 1.0),
    (nn.ReLU,): lambda act, x: _sides(x, 0.0),
    (nn.ReLU6,): lambda act, x: _sides(x, 0.0) * (6 / x.clamp(min=6)),
    (nn.LeakyReLU,): lambda act, x: _sides(x, act.negative_slope),
    (nn.PReLU,): lambda act, x: _sides(x, _per_channel(act.weight, x)),
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


def _rounded_once(form: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A form that computes in float32 what it gets in half of that."""

    def of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        _check(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return form(module, wide).to(x.dtype)

    return of


for _types, _form in _FORMS.items():
    for _type in _types:
        gate.register(_type, _rounded_once(_form))


def hooks_are_heard() -> AbstractContextManager:
    """Compiled code does not hear of new hooks; since PyTorch 2.6 it can be told not to run."""
    if hasattr(torch.compiler, 'set_stance') and not torch.compiler.is_compiling():
        return torch.compiler.set_stance('force_eager')
    return nullcontext()


# Modules that have a layer `gate`, whose output they multiply by their input

UNITS = (ATAC, FusedATAC, XUnit)  # and their subclasses SEActivation, LocalSE, ATACMe
CHANNEL_ATTENTION = (SEModule, EffectiveSEModule, SqueezeExcite, GatherExcite, TimmGatherExcite)


def _from_its_layer(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The module runs, with copies of its buffers, and its layer `gate` is listened to."""
    _check(x)
    heard: list[torch.Tensor] = []
    handle = module.gate.register_forward_hook(lambda layer, args, output: heard.append(output))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with hooks_are_heard():
            torch.func.functional_call(module, buffers, (x,))
    finally:
        handle.remove()
    if not heard:
        raise TypeError(
            f'{type(module).__name__} does not call its layer `gate`: expected a class that does, or one with a gate '
            f'of its own by timm_atac.gate.register.'
        )
    return in_layout(module, heard[-1], x.shape)


for _type in (*UNITS, *CHANNEL_ATTENTION):
    gate.register(_type, _from_its_layer)


def in_layout(module: nn.Module, output: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What the layer `gate` of a module gives, in the layout of the module's input.

    It undoes what `ChannelModule.forward` does to the positions.

    Args:
        module: A unit, or any whose layer `gate` has the layout of the input.
        output: Of the layer: of a unit (B, C, H, W), (B, C, N, 1) where it is not for NCHW, or (B, C, 1, 1).
        shape: Of the module's input.
    """
    if not isinstance(module, ChannelModule) or module.input_fmt == 'NCHW':
        return output
    is_last = module.input_fmt != 'NCL'
    positions = shape[1:-1] if is_last else shape[2:]
    if isinstance(module, SEActivation):
        positions = torch.Size([1] * len(positions))
    output = output.reshape(*output.shape[:2], *positions)
    return output.movedim(1, -1) if is_last else output


def channels_first(values: torch.Tensor, input_fmt: str) -> torch.Tensor:
    """Gates in a layout as (B, C, ...), and as (B, C, 1, 1) where there is one for all positions, or are none."""
    if input_fmt in ('NHWC', 'NLC'):
        values = values.movedim(-1, 1)
    return values if values.shape[2:].numel() > 1 else values.reshape(*values.shape[:2], 1, 1)

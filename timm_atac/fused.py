"""A model made for inference: norms folded into convolutions, and ATAC without its norms."""

import copy
import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.activations import Sigmoid
from timm.utils import reparameterize_model, unwrap_model

from .complete import ChannelModule
from .eager import is_recorded, is_watched
from .fold import Adjacency, can_fold, fold, rest_of
from .kernels.gate import gate_
from .layers import ATAC, LocalSE
from .lean import ATACMe
from .precision import autocast_dtype, cast, without_autocast
from .watch import example_inputs, run_watched, shapes

__all__ = ['FusedATAC', 'fuse']

_logger = logging.getLogger(__name__)


class FusedATAC(ChannelModule):
    """An `ATAC` of inference: `x * sigmoid(conv2(relu(conv1(x))))`, where the convolutions have the norms in them.

    Where nothing has to be kept for a backward pass, each value is overwritten as soon as the next is known.

    Args:
        unit: What it computes, in `eval()`; unchanged. A norm that is no BatchNorm stays.
    """

    def __init__(self, unit: ATAC) -> None:
        super().__init__(unit.input_fmt)
        self.channels, self.place = unit.channels, unit.place
        self.conv1, self.bn1 = _folded(unit.conv1, unit.bn1)
        self.act = unit.act
        self.conv2, self.bn2 = _folded(unit.conv2, unit.bn2)
        self.gate = unit.gate
        self.is_standard = (
            isinstance(self.bn1, nn.Identity)
            and isinstance(self.bn2, nn.Identity)
            and type(unit.act) is nn.ReLU
            and type(unit.gate) in (nn.Sigmoid, Sigmoid)
        )

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            parts = (self.conv1, self.act, self.conv2, self.gate)
            watched = any(is_watched(part) for part in parts)
            if self.is_standard and not watched and not torch.is_grad_enabled() and not is_recorded(x):
                return self._activate_in_place(x)
        return x * self.gate(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))

    def _activate_in_place(self, x: torch.Tensor) -> torch.Tensor:
        dtype = autocast_dtype(x)
        with without_autocast(x.device):
            if x.is_contiguous(memory_format=torch.channels_last):  # rows of channels: products of matrices
                rows = x.permute(0, 2, 3, 1).flatten(0, 2)
                y = _product(rows, self.conv1, dtype, relu=True)
                y = _product(y, self.conv2, dtype).view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
            else:
                y = _convolution(x, self.conv1, dtype).relu_()
                y = _convolution(y, self.conv2, dtype)
            return gate_(x, y) if x.dtype == y.dtype else x * y.sigmoid_()


def _product(rows: torch.Tensor, conv: Any, dtype: torch.dtype | None, relu: bool = False) -> torch.Tensor:
    """A 1x1 convolution of (N, C), with bias and ReLU in the product's own pass where the device can do that."""
    rows, weight, bias = cast(rows, dtype), cast(conv.weight.flatten(1), dtype), cast(conv.bias, dtype)
    if relu:
        return torch._addmm_activation(bias, rows, weight.t())
    return F.linear(rows, weight, bias)


def _convolution(x: torch.Tensor, conv: Any, dtype: torch.dtype | None) -> torch.Tensor:
    return F.conv2d(cast(x, dtype), cast(conv.weight, dtype), cast(conv.bias, dtype))


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    return (fold(conv, norm), rest_of(norm)) if can_fold(conv, norm) else (conv, norm)


@torch.no_grad()
def fuse(model: nn.Module, *, example_input: Any = None) -> nn.Module:
    """Make a model for inference of another one: the same function in fewer operations.

    BatchNorms go into the convolutions and linear layers before them, as a forward pass shows them (on the `meta`
    device where the model can do that); what timm can reparameterize is; each `ATAC` becomes a `FusedATAC`. The rest
    stays as it is: norms behind something else, several norms behind one layer, layers with hooks, other norms.

    Args:
        model: Any model, on any device; unchanged. Of one that is compiled or wrapped by DDP, what is inside.
        example_input: What the model takes: a tensor, or a tuple of positional arguments. None is a batch of two
            images of the size for which timm has created the model, or (2, 3, 224, 224).

    Returns:
        A copy in `eval()`, equal to the model within rounding. It has no state dict: save the model it was made of.

    Raises:
        ValueError: The model does not take `example_input`.
    """
    fused = reparameterize_model(copy.deepcopy(unwrap_model(model)).eval(), inplace=True)
    inputs = example_inputs(fused, example_input)
    try:
        watcher, output, _ = run_watched(fused, inputs, Adjacency)
    except Exception as error:
        raise ValueError(
            f'{type(model).__name__} does not run on {shapes(inputs)}: {type(error).__name__}: {error} '
            f'Give an example_input that it takes, a tensor or a tuple of positional arguments.'
        ) from error

    folded: dict[nn.Module, nn.Module] = {}
    for layer, norm in watcher.pairs(output):
        folded |= {layer: fold(layer, norm), norm: rest_of(norm)}
    fused = _replace(fused, folded)
    units = [m for m in fused.modules() if isinstance(m, ATAC) and type(m) in (ATAC, ATACMe, LocalSE)]
    fused = _replace(fused, {unit: FusedATAC(unit) for unit in units}).eval()
    for module in fused.modules():
        if module is fused or isinstance(module, FusedATAC):
            module.register_state_dict_pre_hook(_refuse_to_save)
            module.register_load_state_dict_pre_hook(_refuse_to_load)
    _logger.info('%s: %d norms folded, %d units', type(fused).__name__, len(folded) // 2, len(units))
    return fused


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in place of others, under all their names."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in new:
                module._modules[name] = new[child]
    return new.get(model, model)


_WAY_OUT = 'the model that it was made of has the weights, in the layout that everything else reads'


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not keep_vars:  # torch.export asks for the parameters themselves
        raise RuntimeError(
            f'{type(module).__name__} is fused for inference and has no state dict of its own: save '
            f'model.state_dict() of before timm_atac.fuse(model); {_WAY_OUT}.'
        )


def _refuse_to_load(module: nn.Module, *args: Any) -> NoReturn:
    raise RuntimeError(
        f'{type(module).__name__} is fused for inference and loads no state dict: load it into the model before '
        f'timm_atac.fuse(model); {_WAY_OUT}.'
    )

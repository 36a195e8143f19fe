"""A model made for inference: norms folded into convolutions, and ATAC without its norms."""

import copy
import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.activations import Sigmoid
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..kernels.gate import gate_
from ..kernels.switch import DTYPES, MOST_HIDDEN, can_run, check_choice, is_wanted, layout
from ..units.atac import ATAC, LocalSE
from ..units.deferred import ChannelModule
from ..units.memory_efficient import ATACMe
from ..utils.autocast import autocast_dtype, cast, without_autocast
from ..utils.forward_pass import example_inputs, observe_forward, shapes
from ..utils.op_by_op import has_hooks, must_run_op_by_op
from .fold_norms import Adjacency, fold

__all__ = ['FusedATAC', 'fuse']

_logger = logging.getLogger(__name__)
_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)


class FusedATAC(ChannelModule):
    """An `ATAC` of inference: `x * sigmoid(conv2(relu(conv1(x))))`, where the convolutions have the norms in them.

    One kernel on a GPU, where that is wanted and can be (`timm_atac.use_kernels`). Else, where nothing has to be kept
    for a backward pass, each value is overwritten as soon as the next is known.

    Args:
        unit: Whose parts it takes, with norms that are folded, or are still there.
        kernel: Whether it is one kernel; None is what the process wants.
    """

    kernel: bool | None = None  # also of what was pickled before there was one

    def __init__(self, unit: ATAC, kernel: bool | None = None) -> None:
        super().__init__(unit.input_fmt)
        self.kernel = kernel
        self.channels, self.place = unit.channels, unit.place
        self.conv1, self.bn1, self.act = unit.conv1, unit.bn1, unit.act
        self.conv2, self.bn2, self.gate = unit.conv2, unit.bn2, unit.gate

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if is_wanted('atac', x.device, self.channels, self.kernel) and self._fits_kernel(x):
                return self._activate_by_kernel(x)
            if not torch.is_grad_enabled() and not must_run_op_by_op(x) and self._is_standard():
                return self._activate_in_place(x)
        return x * self.gate(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))

    @torch.jit.unused
    def _is_standard(self) -> bool:
        parts = (self.conv1, self.bn1, self.act, self.conv2, self.bn2, self.gate)
        return (
            type(self.conv1) is type(self.conv2) is nn.Conv2d
            and self.conv1.bias is not None
            and self.conv2.bias is not None
            and type(self.bn1) is type(self.bn2) is nn.Identity
            and type(self.act) is nn.ReLU
            and type(self.gate) in (nn.Sigmoid, Sigmoid)
            and not any(has_hooks(part) for part in parts)
        )

    @torch.jit.unused
    def _fits_kernel(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling():
            is_seen = torch.onnx.is_in_onnx_export() or torch._C._are_functorch_transforms_active()
            runs = x.device.type == 'cuda' or can_run(x.device)  # the operation itself asks what GPU it is
        else:
            is_seen = must_run_op_by_op(x)
            runs = not is_seen and can_run(x.device)
        if is_seen or not runs or not self._is_standard() or layout(x) is None:
            return False
        if self.conv1.out_channels > MOST_HIDDEN:
            return False
        cast_to = autocast_dtype(x)
        dtype = self.conv1.weight.dtype if cast_to is None else cast_to
        return dtype in DTYPES and (x.dtype == dtype or (cast_to is not None and x.dtype == torch.float32))

    @torch.jit.unused
    def _activate_by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        from ..kernels import atac  # loads Triton, and registers the operation

        dtype = autocast_dtype(x)
        convs: tuple[Any, Any] = (self.conv1, self.conv2)
        parameters = [cast(t, dtype) for conv in convs for t in (conv.weight.flatten(1), conv.bias)]
        return atac.atac(x, *parameters)

    @torch.jit.unused
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

    def extra_repr(self) -> str:
        if not self._is_standard():
            return super().extra_repr()
        weight = self.conv1.weight
        wanted = is_wanted('atac', weight.device, self.channels, self.kernel)
        fits = wanted and weight.dtype in DTYPES and weight.shape[0] <= MOST_HIDDEN
        fits = fits and type(weight.data) is torch.Tensor and can_run(weight.device)
        return f'{super().extra_repr()}, {"one kernel" if fits else "two products"} on {weight.device.type}'


def _product(rows: torch.Tensor, conv: Any, dtype: torch.dtype | None, relu: bool = False) -> torch.Tensor:
    """A 1x1 convolution of (N, C), with bias and ReLU in the product's own pass where the device can do that."""
    rows, weight, bias = cast(rows, dtype), cast(conv.weight.flatten(1), dtype), cast(conv.bias, dtype)
    if relu and rows.device.type in ('cpu', 'cuda'):
        return torch._addmm_activation(bias, rows, weight.t())
    product = F.linear(rows, weight, bias)
    return product.relu_() if relu else product


def _convolution(x: torch.Tensor, conv: Any, dtype: torch.dtype | None) -> torch.Tensor:
    return F.conv2d(cast(x, dtype), cast(conv.weight, dtype), cast(conv.bias, dtype))


@torch.no_grad()
def fuse(model: nn.Module, *, example_input: Any = None, kernel: bool | None = None) -> nn.Module:
    """Make a model for inference of another one: the same function in fewer operations.

    BatchNorms go into the convolutions and linear layers before them, as a forward pass shows them (on the `meta`
    device where the model can do that); blocks that timm can reparameterize are; each `ATAC` becomes a `FusedATAC`. The
    rest stays as it is: norms behind something else, several norms behind one layer, what has hooks, other norms. What
    a model would do for other inputs than `example_input`, on another way through its code, is not seen.

    Args:
        model: Any model, on any device; unchanged. Of one that is compiled, or wrapped for parallel training or
            averaging, what is inside.
        example_input: What the model takes: a tensor, or a tuple of positional arguments. None is a batch of two
            images of the size for which timm has created the model, or (2, 3, 224, 224).
        kernel: Whether its units are one Triton kernel each where they can be: on a GPU, in float16, bfloat16 or
            float32, of inputs that lie densely in memory, channels last or first. None is what the process wants
            (`timm_atac.use_kernels`); printed, each unit tells what it is on the device where its weights are.

    Returns:
        A copy in `eval()`, equal to the model within rounding. It has no state dict: save the model it was made of.

    Raises:
        ValueError: The model does not take `example_input`, or `kernel` is none of True, False, None.
        ImportError: `kernel=True`, and Triton is not installed, does not load, or PyTorch is older than 2.7.
    """
    check_choice('fuse: kernel', kernel)
    fused = copy.deepcopy(_unwrapped(model)).eval()
    for module in list(fused.modules()):  # what has branches, such as RepVGG's block, makes one convolution of them
        by_timm = type(module).__module__.startswith('timm.') and hasattr(module, 'reparameterize')
        if by_timm and not any(has_hooks(part) for part in module.modules()):
            block: Any = module
            block.reparameterize()
    inputs = example_inputs(fused, example_input)
    try:
        watcher, output, _ = observe_forward(fused, inputs, Adjacency)
    except Exception as error:
        raise ValueError(
            f'{type(model).__name__} does not run on {shapes(inputs)}: {type(error).__name__}: {error} '
            f'Give an example_input that it takes, a tensor or a tuple of positional arguments.'
        ) from error

    pairs = watcher.pairs(output)
    for layer, norm in pairs:
        fold(layer, norm)
    units: dict[nn.Module, nn.Module] = {}
    for module in fused.modules():
        if isinstance(module, ATAC) and _is_one_of_ours(module):
            units[module] = FusedATAC(module, kernel)
        elif isinstance(module, FusedATAC) and kernel is not None:
            module.kernel = kernel
    fused = _replace(fused, units).eval()
    for module in fused.modules():
        module.register_state_dict_pre_hook(_refuse_to_save)
        module.register_load_state_dict_pre_hook(_refuse_to_load)
    _logger.info('%s: %d norms folded, %d units', type(fused).__name__, len(pairs), len(units))
    return fused


def _is_one_of_ours(unit: ATAC) -> bool:
    """Whether a unit computes what it is said to, and nobody looks on."""
    changed = {'activate', 'bottleneck'} & vars(unit).keys()
    return type(unit) in (ATAC, ATACMe, LocalSE) and not changed and not has_hooks(unit)


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, _WRAPPERS) or type(model).__name__ == 'OptimizedModule':
        inside: Any = model._orig_mod if hasattr(model, '_orig_mod') else model.module
        model = inside
    return model


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

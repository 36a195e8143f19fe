"""Makes a copy of a model for inference: norms are folded into convolutions, and ATAC units run without norms."""

import copy
import logging
from typing import Any, NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.activations import Sigmoid
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..kernels.gate import gate_
from ..kernels.linear import linear
from ..kernels.switch import DTYPES, MOST_HIDDEN, can_run, check_choice, is_wanted, layout
from ..units.atac import ATAC, LocalSE
from ..units.deferred import ChannelModule
from ..units.memory_efficient import ATACMe
from ..utils.autocast import autocast_dtype, cast, without_autocast
from ..utils.forward_pass import example_inputs, floating_point_tensors, observe_forward, observe_on_meta
from ..utils.op_by_op import has_hooks, must_run_op_by_op
from .adjacency import Adjacency, Findings, combine
from .checks import check_can_be_copied, first_names
from .comparison import Comparison, keep_random_state, with_other_shapes
from .fold_norms import fold, make_scale_shift
from .norms import FoldedNorm

__all__ = ['FusedATAC', 'fuse']

_logger = logging.getLogger(__name__)
_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)


class FusedATAC(ChannelModule):
    """An `ATAC` for inference: `x * sigmoid(conv2(relu(conv1(x))))`, (B, C, H, W) -> (B, C, H, W).

    The convolutions contain the norms. A unit runs as one Triton kernel if `kernel` and its input allow that. Without
    gradients, it else computes in place, so that it needs memory for fewer feature maps.

    Args:
        unit: Its layers are used, not copied. A norm that could not be folded stays and is computed.
        kernel: True runs one Triton kernel where that is possible, False never. None does what
            `timm_atac.use_kernels` says.
    """

    def __init__(self, unit: ATAC, kernel: bool | None = None) -> None:
        super().__init__(unit.input_fmt)
        self.kernel = kernel
        self.created_channels, self.place, self.inferred_from = unit.created_channels, unit.place, unit.inferred_from
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
            not self.training  # its norms then raise an error
            and type(self.conv1) is type(self.conv2) is nn.Conv2d
            and self.conv1.bias is not None
            and self.conv2.bias is not None
            and type(self.bn1) in (nn.Identity, FoldedNorm)
            and type(self.bn2) in (nn.Identity, FoldedNorm)
            and type(self.act) is nn.ReLU
            and type(self.gate) in (nn.Sigmoid, Sigmoid)
            and not any(has_hooks(part) for part in parts)
        )

    @torch.jit.unused
    def _fits_kernel(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling():
            op_by_op = torch.onnx.is_in_onnx_export() or torch._C._are_functorch_transforms_active()
            runs = x.device.type == 'cuda' or can_run(x.device)  # the operator checks the type of GPU when it runs
        else:
            op_by_op = must_run_op_by_op(x)
            runs = not op_by_op and can_run(x.device)
        if (
            not runs
            or op_by_op
            or not self._is_standard()
            or layout(x) is None
            or self.conv1.out_channels > MOST_HIDDEN
        ):
            return False
        cast_to = autocast_dtype(x)
        dtype = self.conv1.weight.dtype if cast_to is None else cast_to
        return dtype in DTYPES and (x.dtype == dtype or (cast_to is not None and x.dtype == torch.float32))

    @torch.jit.unused
    def _activate_by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        from ..kernels import atac  # this import loads Triton and registers the operator

        dtype = autocast_dtype(x)
        convs: tuple[Any, Any] = (self.conv1, self.conv2)
        parameters = [cast(t, dtype) for conv in convs for t in (conv.weight.flatten(1), conv.bias)]
        return atac.atac(x, *parameters)

    @torch.jit.unused
    def _activate_in_place(self, x: torch.Tensor) -> torch.Tensor:
        dtype = autocast_dtype(x)
        with without_autocast(x.device):
            if x.is_contiguous(memory_format=torch.channels_last):
                # a view as rows of channels: the convolutions are matrix products
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
        fits = (
            is_wanted('atac', weight.device, self.channels, self.kernel)
            and weight.dtype in DTYPES
            and weight.shape[0] <= MOST_HIDDEN
            and type(weight.data) is torch.Tensor
            and can_run(weight.device)
        )
        return f'{super().extra_repr()}, {"one kernel" if fits else "two products"} on {weight.device.type}'


def _product(rows: torch.Tensor, conv: Any, dtype: torch.dtype | None, relu: bool = False) -> torch.Tensor:
    """Compute a 1x1 convolution of rows (N, C)."""
    return linear(cast(rows, dtype), cast(conv.weight.flatten(1), dtype), cast(conv.bias, dtype), relu)


def _convolution(x: torch.Tensor, conv: Any, dtype: torch.dtype | None) -> torch.Tensor:
    return F.conv2d(cast(x, dtype), cast(conv.weight, dtype), cast(conv.bias, dtype))


@torch.no_grad()
def fuse(model: nn.Module, *, example_input: Any = None, kernel: bool | None = None) -> nn.Module:
    """Return a copy of a model for inference, which computes the same function in fewer operations.

    A forward pass shows which BatchNorm follows which layer; it runs on the `meta` device if the model can. Then:

    * Blocks that timm can reparameterize are reparameterized.
    * BatchNorms are folded into the convolutions and linear layers before them.
    * Other BatchNorms become a product and a sum per channel: behind another operation, or behind a layer whose output
      is used twice.
    * Each `ATAC` becomes a `FusedATAC`.

    Norms of other types stay, and norms whose tensors other code uses. Norms with hooks on them or on their layer stay
    too, and the logger warns of them.

    The copy is only right for inputs that take the same way through the code of the model as `example_input`. So the
    pass on `meta` is repeated with a quarter, the half and the double of the height and width, and a norm is changed
    only if that is right in each of these passes. Sizes that the model does not take are left out.

    In the end the outputs of the copy are compared with those of the model, in two forward passes on the device of the
    model. They are not compared if weights are on `meta`, and the logger warns if the model does not run there, if its
    outputs are random beyond PyTorch's generators, or if rounding alone changes them much.

    Args:
        model: Any model, on any device. It is not changed. Of a compiled model, or of a wrapper for parallel training
            or for averaged weights, the model inside is copied.
        example_input: The input of the model: a tensor, or a tuple of positional arguments. None is a batch of two
            images of the size for which timm has created the model, or (2, 3, 224, 224). The comparison takes random
            numbers for None and for tensors that are constant.
        kernel: True runs each unit as one Triton kernel where that is possible: on a GPU, in float16, bfloat16 or
            float32, for dense inputs in channels-last or contiguous memory format. False never does. None does what
            `timm_atac.use_kernels` says. `print(model)` shows which form each unit has on the device of its weights.

    Returns:
        The copy, in `eval()`. Its outputs equal the model's up to rounding. It has no state dict: save the state dict
        of `model`. In training mode, norms that were changed raise a RuntimeError when they run.

    Raises:
        ValueError: The model does not run on `example_input`, or has tensors that cannot be copied (of pruning, or of
            the old `weight_norm` or `spectral_norm`), or `kernel` is not True, False or None.
        RuntimeError: The copy computes another function than the model.
        ImportError: `kernel=True`, and Triton is not installed, does not load, or PyTorch is older than 2.7.
    """
    check_choice('fuse: kernel', kernel)
    model = _unwrap(model)
    check_can_be_copied(model)
    fused = copy.deepcopy(model).eval()
    inputs = example_inputs(fused, example_input)
    comparison = Comparison(fused, inputs if example_input is not None else (inputs[0][:1],))
    with keep_random_state(floating_point_tensors(fused)):
        _fuse_in_place(fused, inputs, kernel)
    comparison.check(fused, model)
    return fused


def _fuse_in_place(model: nn.Module, inputs: tuple, kernel: bool | None) -> None:
    module: Any
    for module in list(model.modules()):
        # timm's `reparameterize_model` also calls `fuse()`, which returns float32 layers of others, and ignores hooks
        by_timm = type(module).__module__.startswith('timm.') and hasattr(module, 'reparameterize')
        if by_timm and not any(has_hooks(part) for part in module.modules()):
            module.reparameterize()
    observed = _observe(model, inputs)
    _warn_of_hooks(model, observed.of_hooked(True))
    found = observed.of_hooked(False)
    for norm, layer in found.layer_of.items():
        fold(layer, norm)
    for norm, ndim in found.alone.items():
        make_scale_shift(norm, ndim)
    units = []
    for module in list(model.modules()):
        if isinstance(module, ATAC) and _is_unmodified_unit(module):
            module.__dict__ = vars(FusedATAC(module, kernel).eval())
            module.__class__ = FusedATAC  # type: ignore[assignment]
        elif isinstance(module, FusedATAC) and kernel is not None:
            module.kernel = kernel
        if isinstance(module, FusedATAC):
            units.append(module)
        module.register_state_dict_pre_hook(_refuse_to_save)
        module.register_load_state_dict_pre_hook(_refuse_to_load)
    if kernel:
        _warn_of_devices(model, units)
    _logger.info(
        '%s: %d norms folded, %d norms became scale and shift, %d units fused',
        *(type(model).__name__, len(found.layer_of), len(found.alone), len(units)),
    )


def _observe(model: nn.Module, inputs: tuple) -> Findings:
    """Return what can be done with each norm, for inputs of these shapes and of others that the model takes."""
    observer, output, on_meta = observe_forward(model, inputs, Adjacency)
    findings = [observer.findings(output)]
    if on_meta:
        for others in with_other_shapes(inputs):
            observed = observe_on_meta(model, others, Adjacency)
            if observed is not None:
                findings.append(observed[0].findings(observed[1]))
    return combine(findings)


def _warn_of_hooks(model: nn.Module, hooked: Findings) -> None:
    norms = hooked.layer_of.keys() | hooked.ndim_of.keys()
    names = [name for name, module in model.named_modules() if module in norms]
    if names:
        _logger.warning(
            '%s: %d norms are not folded, because they or the layers before them have hooks or a `forward` of their '
            'own: %s. Remove the hooks before fuse (those of pruning: torch.nn.utils.prune.remove).',
            *(type(model).__name__, len(names), first_names(names)),
        )


def _warn_of_devices(model: nn.Module, units: list[FusedATAC]) -> None:
    """Warn that `kernel=True` has no effect."""
    devices = {unit.conv1.weight.device for unit in units}  # type: ignore[union-attr]
    if not units:
        _logger.warning('%s: kernel=True has no effect, because the model has no ATAC units.', type(model).__name__)
    elif not any(device.type == 'meta' or can_run(device) for device in devices):
        _logger.warning(
            '%s: kernel=True has no effect on %s: each unit runs as two products there. The kernel runs on NVIDIA GPUs '
            'of compute capability 8.0 or newer, to which the fused model can be moved.',
            *(type(model).__name__, ', '.join(sorted(map(str, devices)))),
        )


def _is_unmodified_unit(unit: ATAC) -> bool:
    """True for exactly our classes with the formula of `FusedATAC`, without hooks or methods set on the instance."""
    changed = {'activate', 'bottleneck'} & vars(unit).keys()
    return type(unit) in (ATAC, ATACMe, LocalSE) and not changed and not has_hooks(unit)


def _unwrap(model: Any) -> nn.Module:
    """Return the model inside compiled modules and known wrappers.

    timm's `unwrap_model` takes any module's `module` for the model, also that of a model that computes more with it.
    """
    while isinstance(model, _WRAPPERS) or hasattr(model, '_orig_mod'):  # `_orig_mod`: torch.compile's
        model = model._orig_mod if hasattr(model, '_orig_mod') else model.module
    return model


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not keep_vars:  # torch.export sets keep_vars, because it needs the parameters themselves
        raise RuntimeError(
            f'{type(module).__name__} is fused for inference and has no state dict: save model.state_dict() of the '
            f'model that was given to timm_atac.fuse(model).'
        )


def _refuse_to_load(module: nn.Module, *args: Any) -> NoReturn:
    raise RuntimeError(
        f'{type(module).__name__} is fused for inference and loads no state dict: load it into the model that is given '
        f'to timm_atac.fuse(model).'
    )

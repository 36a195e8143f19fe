"""Units that are created before their width is known, and get their layers when they are put into a module.

timm creates activations with `act_layer(inplace=True)` and does not pass the number of channels. PyTorch calls a
registration hook whenever a module is put into another one. The hook of this file reads width, layout, device and dtype
from the neighbouring layers (`infer_width.py`) and creates the layers of the unit. No forward pass is needed, and timm
is not patched. The hook is installed only while a unit waits, or while `host_norm.py` looks for the norm of the model.
After that, the next registration removes it.
"""

import threading
import weakref
from numbers import Integral
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from .batch_norm import BatchNorm
from .host_norm import host_norm
from .infer_width import Width, several_widths, width_at

__all__ = ['ChannelModule', 'UnknownWidth']

FORMATS = ('NCHW', 'NCL', 'NHWC', 'NLC')
_REMEDY = (
    'Build the model without it and call timm_atac.replace_activations(model), which finds widths by a forward pass.'
)


class ChannelModule(nn.Module):
    """Base of the units, for inputs of `channels` channels in the layout `input_fmt`.

    A subclass creates its layers in `build` and computes its output from (B, C, H, W) in `activate`. Its constructor
    calls `initialize_parameters` at the end.

    The width is that of the unit's first layer, so it follows when a network is pruned. A gate multiplies the input:
    pruning must remove the same channels of the input and of the last layers. The width of the bottleneck is free, and
    `rd_ratio` only says what it was at first.

    Args:
        input_fmt: Layout of the input: 'NCHW' is (B, C, H, W), 'NCL' (B, C, ...), 'NHWC' and 'NLC' are (B, ..., C).

    Raises:
        ValueError: `input_fmt` is not one of the four.
    """

    first_layer = 'conv1'
    """Name of the convolution whose input has the channels of the unit's input."""

    __jit_unused_properties__: ClassVar = ['channels']  # TorchScript compiles other properties

    def __init__(self, input_fmt: str = 'NCHW') -> None:
        super().__init__()
        if input_fmt not in FORMATS:
            raise ValueError(f'input_fmt={input_fmt!r}: expected one of {FORMATS}.')
        self.created_channels: int | None = None
        self.input_fmt = str(getattr(input_fmt, 'value', input_fmt))  # timm's Format is a str
        # for error messages: where a unit without a width was put, and the layer that its width comes from
        self.place = ''
        self.inferred_from = ''

    @property
    def channels(self) -> int | None:
        """Width C of the input, None while it is unknown."""
        layer: Any = self._modules.get(self.first_layer)
        if layer is not None:
            weight = layer._parameters.get('weight')  # absent if it is parametrized
            # an expanded weight has a shape but no `ndim`, and an uninitialised one has no shape
            has_shape = isinstance(weight, torch.Tensor) and not isinstance(weight, UninitializedParameter)
            if has_shape and len(weight.shape) == 4:
                return weight.shape[1] * layer.groups
            width = getattr(layer, 'in_channels', None)
            if width is not None:
                return width
        return self.created_channels  # another layer has taken the place of the first

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if 'channels' in state:  # pickled when the width was an attribute
            state.setdefault('created_channels', state.pop('channels'))
        super().__setstate__({'inferred_from': '', **state})

    def initialize_parameters(self, channels: int | None, device=None, dtype=None) -> None:
        """Create the layers if `channels` is given. Otherwise wait until the unit is put into a module.

        A bool counts as no width, because the first argument of `nn.ReLU` is `inplace`.

        Raises:
            ValueError: `channels` is not an integer >= 1.
        """
        if channels is None or isinstance(channels, bool):
            self.unknown_width = UnknownWidth(self)
            _wait(self)
            return
        if not isinstance(channels, Integral) or channels < 1:
            raise ValueError(f'channels={channels!r}: expected an integer >= 1, the width C of the (B, C, H, W) input.')
        self.build(channels, device=device, dtype=dtype)
        self.created_channels = int(channels)

    def build(self, channels: int, device=None, dtype=None) -> None:
        """Create the layers."""
        raise NotImplementedError

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output, (B, C, H, W) -> (B, C, H, W)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            self.check_input(x)
        if self.input_fmt == 'NCHW':
            return self.activate(x)
        if self.input_fmt == 'NCL':
            return self.activate(x.unsqueeze(-1).flatten(2).unsqueeze(-1)).reshape(x.shape)
        nchw = x.unsqueeze(1).transpose(1, -1).flatten(2).unsqueeze(-1)  # (B, C, N, 1), a view
        return self.activate(nchw).squeeze(-1).transpose(1, 2).reshape(x.shape)

    def check_input(self, x: torch.Tensor) -> None:
        """Check that the unit takes an input. Tracing skips the check.

        Raises:
            ValueError: The unit has no width, the input has another width or layout, or BatchNorms in training would
                get one value per channel.
        """
        if torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
            return
        channels = self.channels
        if channels is None:
            raise ValueError(_unknown_width_message(self))
        dim = 1 if self.input_fmt in ('NCHW', 'NCL') else -1
        if x.ndim < 2 or x.shape[dim] != channels or (self.input_fmt == 'NCHW' and x.ndim != 4):
            raise ValueError(_wrong_input_message(self, x, dim))
        if self.training and self.has_one_value_per_channel(x):
            _check_batch_norms(self, x)

    def has_one_value_per_channel(self, x: torch.Tensor) -> bool:
        """True if the norms of the unit get one value of each channel, in an input of the right width."""
        return x.numel() == self.channels

    def extra_repr(self) -> str:
        return f'{"unknown width" if self.channels is None else self.channels}, input_fmt={self.input_fmt}'


def _wrong_input_message(unit: ChannelModule, x: torch.Tensor, dim: int) -> str:
    name, shape, channels, input_fmt = (
        f'{type(unit).__name__}{unit.place}',
        tuple(x.shape),
        unit.channels,
        unit.input_fmt,
    )
    is_wrong_format = x.ndim < 2 or (input_fmt == 'NCHW' and x.ndim != 4)
    formats = {'NCHW': 1, 'NHWC': -1} if x.ndim == 4 else {'NCL': 1, 'NLC': -1}
    fitting = [fmt for fmt, d in formats.items() if x.ndim > 1 and shape[d] == channels and fmt != input_fmt]
    if fitting:
        advice = f'give input_fmt={fitting[0]!r}'
    elif is_wrong_format:
        advice = "give `channels`, and input_fmt='NCL' for (B, C, ...) or 'NLC' for (B, ..., C)"
    else:
        advice = f'give channels={shape[dim]}'
    remedy = f'One unit cannot serve several widths. If another package creates it: {_REMEDY}'
    if not unit.inferred_from or channels != unit.created_channels:
        return f'{name} is for {channels} channels in {input_fmt} and got an input of shape {shape}: {advice}. {remedy}'
    got = shape if is_wrong_format else shape[dim]
    return (
        f'{name} inferred {channels} from {unit.inferred_from!r}, got {got}: {advice}. The input has the shape '
        f'{shape}, the unit is for {input_fmt}. {remedy}'
    )


def _check_batch_norms(unit: ChannelModule, x: torch.Tensor) -> None:
    """Raise ValueError if a BatchNorm of a unit would take the statistics of one value per channel."""
    for norm in unit.children():
        if isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None):
            if BatchNorm.sync_group(norm) is None:
                raise ValueError(
                    f'{type(unit).__name__}{unit.place} ({unit.channels} channels) got an input of shape '
                    f'{tuple(x.shape)} in training: Expected more than 1 value per channel, since its norms '
                    f'({type(norm).__name__}) take the statistics of the batch. Train with at least two images '
                    f'(`drop_last=True` leaves out a smaller last batch), call eval() of these norms, or give the '
                    f'unit another `norm_layer`.'
                )


_GRAD_FN = vars(torch._C.TensorBase)['grad_fn'].__get__


class UnknownWidth(UninitializedParameter):
    """Placeholder for the parameters of a waiting unit. Any use raises an error, so that none is missed silently."""

    _unit: 'weakref.ref[ChannelModule]'

    def __new__(cls, unit: ChannelModule) -> 'UnknownWidth':
        self = super().__new__(cls)
        self._unit = weakref.ref(unit)
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__hash__, _GRAD_FN):  # registering it and putting it into a set need these
            return super().__torch_function__(func, types, args, kwargs)
        unit = next((arg._unit() for arg in args if isinstance(arg, UnknownWidth)), None)
        raise ValueError(_unknown_width_message(unit))

    @property
    def shape(self):  # type: ignore[override]
        raise ValueError(_unknown_width_message(self._unit()))


def _unknown_width_message(unit: ChannelModule | None) -> str:
    return (
        f'{type(unit).__name__ if unit is not None else "Unit"}{getattr(unit, "place", "")} was created without '
        f'`channels`, and the neighbouring layers do not give its width. Pass `channels`. If another package creates '
        f'the unit: {_REMEDY}'
    )


_waiting: 'weakref.WeakKeyDictionary[ChannelModule, list]' = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_handle: RemovableHandle | None = None
_depth = 0  # of the calls of the hook: the layers of a unit are registered inside of one


def _wait(unit: ChannelModule) -> None:
    """Add a unit to the waiting ones, and install the hook."""
    global _handle
    with _lock:
        _waiting[unit] = []  # (weak reference to a parent, name in it), from the innermost parent outwards
        if _handle is None:
            _handle = register_module_module_registration_hook(_on_registration)


def _on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """The registration hook. PyTorch calls it just before `module` becomes `parent.name`."""
    global _depth
    with _lock:
        _depth += 1
        try:
            if host_norm.is_watching:
                host_norm.on_registration(parent, module)
            for unit, places in list(_waiting.items()):
                if module is not None:
                    _infer_width(unit, places, parent, name, module)
        finally:
            _depth -= 1
            if not _depth:
                _remove_hook_if_none_waits()


def _infer_width(unit: ChannelModule, places: list, parent: nn.Module, name: str, module: nn.Module) -> None:
    """Create the unit's layers if its width is known now that `module` becomes `parent.name`."""
    outermost = places[-1][0]() if places else unit
    if module is outermost:
        places.append((weakref.ref(parent), name))
        if len(places) == 1:
            unit.place = f' at {name!r} of {type(parent).__module__}.{type(parent).__qualname__}'
            _check_one_width(unit, parent, name)
        width = width_at(parent, name)
    else:
        inside = next((inside for known, inside in places if known() is parent), None)
        width = width_at(parent, inside, following=(name, module)) if inside is not None else None
    if width is not None:
        _materialize(unit, width)
        host_norm.watch(unit, unit.place, [module for known, _ in places if (module := known()) is not None])


def _check_one_width(unit: ChannelModule, parent: nn.Module, name: str) -> None:
    """Raise ValueError for a host that calls the unit with inputs of several widths."""
    widths = several_widths(parent, name)
    if widths:
        del _waiting[unit]
        sources = ', '.join(f'{channels} from {layer!r}' for layer, channels in widths.items())
        raise ValueError(
            f'{type(unit).__name__}{unit.place} would get {sources}. One unit cannot serve several widths. {_REMEDY}'
        )


def _materialize(unit: ChannelModule, width: Width) -> None:
    """Create the layers of a waiting unit, with device and dtype of the layer that its width comes from."""
    del _waiting[unit]
    del unit.unknown_width
    unit.input_fmt = width.likely_fmt
    unit.inferred_from = width.name
    tensors = (*width.layer.parameters(), *width.layer.buffers())
    dd = next(({'device': t.device, 'dtype': t.dtype} for t in tensors if t.is_floating_point()), {})
    unit.initialize_parameters(width.channels, **dd)


def _remove_hook_if_none_waits() -> None:
    global _handle
    if _waiting or host_norm.is_watching or _handle is None:
        return
    hooks = _handle.hooks_dict_ref()
    # PyTorch is iterating over its hooks now. Only the last one can be removed without an error there
    if hooks is not None and next(reversed(hooks)) == _handle.id:
        _handle.remove()
        _handle = None

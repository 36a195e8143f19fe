"""Units without a width: completed, with every parameter, when they are put into a module.

timm creates activations with `act_layer(inplace=True)` and tells them nothing. A unit created like that waits. PyTorch
calls a hook of ours whenever a module is put into another one, and there the unit gets width, layout, device and dtype
from the layers around it (`infer_width.py`). No forward pass, nothing of timm is patched, and the hook is there only
while a unit waits: it goes with the first registration after the last one is complete, or gone.
"""

import threading
import weakref
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from .infer_width import Width, width_at

__all__ = ['ChannelModule', 'UnknownWidth']

FORMATS = ('NCHW', 'NCL', 'NHWC', 'NLC')
_WAY_OUT = 'Build the model without it and call timm_atac.replace_activations(model), which goes by a forward pass.'


class ChannelModule(nn.Module):
    """Base of the units: knows its input's channels and layout, and can be created before they are known.

    A subclass makes its layers in `build` and works on (B, C, H, W) in `activate`. Its constructor ends with
    `initialize_parameters`.

    Args:
        input_fmt: Layout of the input: 'NCHW' is (B, C, H, W), 'NCL' (B, C, ...), 'NHWC' and 'NLC' are (B, ..., C).

    Raises:
        ValueError: `input_fmt` is none of the four.
    """

    channels: int | None

    def __init__(self, input_fmt: str = 'NCHW') -> None:
        super().__init__()
        if input_fmt not in FORMATS:
            raise ValueError(f'input_fmt={input_fmt!r}: expected one of {FORMATS}.')
        self.channels = None
        self.input_fmt = str(getattr(input_fmt, 'value', input_fmt))  # timm's Format is a str
        self.place = ''  # where a unit created without a width was put, for messages

    def initialize_parameters(self, channels: int | None, device=None, dtype=None) -> None:
        """Make the layers, or wait for a place. Bool counts as no width: `nn.ReLU` has `inplace` there."""
        if channels is None or isinstance(channels, bool):
            self.unknown_width = UnknownWidth(self)
            _wait(self)
        else:
            self.build(channels, device=device, dtype=dtype)
            self.channels = channels

    def materialize(self, channels: int, input_fmt: str, device=None, dtype=None) -> None:
        """Give a waiting unit its layers."""
        del self.unknown_width
        self.input_fmt = input_fmt
        self.initialize_parameters(channels, device=device, dtype=dtype)

    def build(self, channels: int, device=None, dtype=None) -> None:
        raise NotImplementedError

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            self._check(x)
        if self.input_fmt == 'NCHW':
            return self.activate(x)
        if self.input_fmt == 'NCL':
            return self.activate(x.unsqueeze(-1).flatten(2).unsqueeze(-1)).reshape(x.shape)
        nchw = x.unsqueeze(1).transpose(1, -1).flatten(2).unsqueeze(-1)  # (B, C, N, 1), a view
        return self.activate(nchw).squeeze(-1).transpose(1, 2).reshape(x.shape)

    def _check(self, x: torch.Tensor) -> None:
        if torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
            return
        if self.channels is None:
            raise ValueError(_unknown(self))
        dim = 1 if self.input_fmt in ('NCHW', 'NCL') else -1
        if x.shape[dim] != self.channels or (self.input_fmt == 'NCHW' and x.ndim != 4):
            raise ValueError(
                f'{type(self).__name__}{self.place} is for {self.channels} channels in {self.input_fmt} and got an '
                f'input of shape {tuple(x.shape)}. One unit cannot serve several widths. {_WAY_OUT}'
            )

    def extra_repr(self) -> str:
        return f'{"unknown width" if self.channels is None else self.channels}, input_fmt={self.input_fmt}'


_GRAD_FN = vars(torch._C.TensorBase)['grad_fn'].__get__


class UnknownWidth(UninitializedParameter):
    """Stands for the parameters of a waiting unit, so that none is missed silently: any use is an error."""

    _unit: Any

    def __new__(cls, unit: ChannelModule | None = None) -> 'UnknownWidth':
        self = super().__new__(cls)
        self._unit = weakref.ref(unit) if unit is not None else lambda: None
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__hash__, _GRAD_FN):  # what registration and a set need
            return super().__torch_function__(func, types, args, kwargs)
        unit = next((arg._unit() for arg in args if isinstance(arg, UnknownWidth)), None)
        raise ValueError(_unknown(unit))

    @property
    def shape(self):  # type: ignore[override]
        raise ValueError(_unknown(self._unit()))


def _unknown(unit: ChannelModule | None) -> str:
    return (
        f'{type(unit).__name__ if unit is not None else "Unit"}{getattr(unit, "place", "")} was created without '
        f'`channels`, and nothing around it tells its width. Give it `channels`. In a model of somebody else: '
        f'{_WAY_OUT}'
    )


_waiting: 'weakref.WeakKeyDictionary[ChannelModule, list]' = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_handle: RemovableHandle | None = None


def _wait(unit: ChannelModule) -> None:
    global _handle
    with _lock:
        _waiting[unit] = []  # (weak reference to parent, name), outwards
        if _handle is None:
            _handle = register_module_module_registration_hook(_on_registration)


def _on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """PyTorch's hook: `module` is about to become `parent.name`."""
    with _lock:
        for unit, places in list(_waiting.items()):
            if module is not None:
                _infer_width(unit, places, parent, name, module)
        _stop_if_none_waits()


def _infer_width(unit: ChannelModule, places: list, parent: nn.Module, name: str, module: nn.Module) -> None:
    outermost = places[-1][0]() if places else unit
    if module is outermost:
        places.append((weakref.ref(parent), name))
        if len(places) == 1:
            unit.place = f' at {name!r} of {type(parent).__module__}.{type(parent).__qualname__}'
        width = width_at(parent, name)
    else:
        place = next((place for place in places if place[0]() is parent), None)
        if place is None:
            return
        width = width_at(parent, place[1], following=(name, module))
    if width is not None:
        _materialize(unit, width)


def _materialize(unit: ChannelModule, width: Width) -> None:
    del _waiting[unit]
    like = next((t for t in (*width.layer.parameters(), *width.layer.buffers()) if t.is_floating_point()), None)
    unit.place += f', its width from {width.name!r},'
    unit.materialize(
        width.channels,
        width.likely_fmt,
        device=like.device if like is not None else None,
        dtype=like.dtype if like is not None else None,
    )


def _stop_if_none_waits() -> None:
    global _handle
    if _waiting or _handle is None:
        return
    hooks = _handle.hooks_dict_ref()
    # PyTorch is walking through its hooks: the last one can go, taking out another would be an error there
    if hooks is not None and next(reversed(hooks)) == _handle.id:
        _handle.remove()
        _handle = None

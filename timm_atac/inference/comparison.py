"""Compares the outputs of a model before and after `fuse` has changed it."""

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only

from ..utils.autocast import without_autocast
from ..utils.forward_pass import floating_point_tensors

__all__ = ['Comparison', 'with_other_shapes']

_logger = logging.getLogger(__name__)

# of the largest value of an output, several times what models of timm have shown in float32 (2e-4) and bfloat16
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
_LOW_PRECISION = 0.25


class Comparison:
    """The outputs of a model, to be compared with those of the same model after a change.

    Each pass runs on a copy that shares only the parameters, so that nothing that a forward pass keeps is left in the
    model. Both passes start with the same state of PyTorch's random number generators, and restore it.

    Args:
        model: The model before the change, in evaluation mode.
        inputs: Positional arguments. Tensors without information, which are constant or on `meta`, become random.
    """

    def __init__(self, model: nn.Module, inputs: tuple) -> None:
        self._expected: Any = None
        self._inputs: tuple | None = None
        tensors = [*model.parameters(), *model.buffers()]
        if any(t.is_meta for t in tensors):
            return
        devices = {t.device for t in tensors}
        device = devices.pop() if len(devices) == 1 else None
        given = tree_map_only(torch.Tensor, lambda t: _on_device(t, device), inputs)
        error: Exception | None = None
        for candidate in (tree_map_only(torch.Tensor, _randomize_constant, given), given):
            try:
                self._expected = _run(model, candidate)
            except Exception as e:  # the forward pass that observes the model reports it
                error = e
                continue
            self._inputs = candidate
            return
        _logger.warning(
            '%s: the outputs of the fused model are not compared, because the model does not run on %s: %s',
            *(type(model).__name__, device or 'its devices', str(error).partition('\n')[0]),
        )

    def check(self, model: nn.Module) -> None:
        """Raise RuntimeError if the model, which has been changed, has other outputs."""
        if self._inputs is None:
            return
        tolerance = _tolerance(model, self._expected)
        try:
            found = _run(model, self._inputs)
        except Exception as error:
            raise RuntimeError(
                f'fuse: the fused copy of {type(model).__name__} does not run: {type(error).__name__}: '
                f'{str(error).partition(chr(10))[0]}. {_REMEDY}'
            ) from error
        difference = _difference(self._expected, found)
        if difference <= tolerance:
            return
        if _difference(found, _run(model, self._inputs)) > tolerance:
            _logger.warning('%s: outputs are random, and are not compared.', type(model).__name__)
            return
        raise RuntimeError(
            f'fuse: the fused copy of {type(model).__name__} computes another function: its outputs on the example '
            f'input differ by {difference:.2g} of the largest output, and rounding explains {tolerance:g}. {_REMEDY}'
        )


_REMEDY = (
    'Code of the model probably depends on the types or tensors of its norms, or on values. Give an example_input like '
    'the inputs in use, or fuse the parts of the model that have no such code: model.backbone = fuse(model.backbone).'
)


def with_other_shapes(inputs: tuple) -> Iterator[tuple]:
    """Yield the inputs with a quarter, the half and the double of the height and width (or length).

    The tensors are on `meta`. Those of the half size have a batch of one.

    Args:
        inputs: Positional arguments. Only floating-point tensors (B, C, ...) get other shapes.
    """

    def resize(t: torch.Tensor, factor: float) -> torch.Tensor:
        if t.ndim < 3 or not t.is_floating_point():
            return t
        batch = 1 if factor == 0.5 else t.shape[0]
        sizes = [max(1, int(size * factor)) for size in t.shape[2:]]
        return torch.empty(batch, t.shape[1], *sizes, dtype=t.dtype, device='meta')

    shapes = [_shapes(inputs)]
    for factor in (0.25, 0.5, 2):
        others = tree_map_only(torch.Tensor, partial(resize, factor=factor), inputs)
        if _shapes(others) not in shapes:
            shapes.append(_shapes(others))
            yield others


def _shapes(values: Any) -> list[torch.Size]:
    return [value.shape for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def _on_device(t: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Return a tensor on a device, None for the device where it is. Of one on `meta`, the values are zero."""
    return torch.zeros_like(t, device=device or 'cpu') if t.is_meta else t.to(device or t.device)


def _randomize_constant(t: torch.Tensor) -> torch.Tensor:
    if not t.is_floating_point() or t.numel() < 2 or not bool((t == t.flatten()[0]).all()):
        return t
    values = torch.randn(t.shape, generator=torch.Generator().manual_seed(0), device='cpu', dtype=torch.float32)
    return torch.empty_like(t).copy_(values)


def _run(model: nn.Module, inputs: tuple) -> Any:
    """Return the outputs of a copy of the model. Autocast is disabled, and the random state is restored."""
    tensors = [*model.parameters(), *model.buffers(), *(t for t in tree_iter(inputs) if isinstance(t, torch.Tensor))]
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    devices = {t.device for t in tensors}
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(without_autocast(device))
        for device_type in {device.type for device in devices} - {'cpu'}:
            indices = [device.index for device in devices if device.type == device_type]
            stack.enter_context(torch.random.fork_rng(indices, device_type=device_type))
        stack.enter_context(torch.random.fork_rng([]))
        output = copied(*tree_map_only(torch.Tensor, torch.clone, inputs))
        return tree_map_only(torch.Tensor, lambda t: t.detach().clone(), output)


def _difference(expected: Any, found: Any) -> float:
    """Return the largest difference of a tensor relative to its largest value, infinity for another structure."""
    (leaves, structure), (others, other_structure) = tree_flatten(expected), tree_flatten(found)
    if structure != other_structure:
        return float('inf')
    pairs = zip(leaves, others, strict=True)
    return max((_relative(a, b) for a, b in pairs if isinstance(a, torch.Tensor)), default=0.0)


def _relative(expected: torch.Tensor, found: Any) -> float:
    if not isinstance(found, torch.Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return float('inf')
    if expected.is_sparse or expected.is_quantized or not expected.numel():
        return 0.0
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (expected.cpu(), found.cpu()))
    finite = a.isfinite()  # a sum that overflows before a norm need not overflow in a folded layer
    if not finite.all():
        finite &= b.isfinite()
    difference, largest = (a - b)[finite].abs(), a[finite].abs()
    if not len(difference) or not difference.any():
        return 0.0
    return (difference.max() / largest.max()).nan_to_num(float('inf')).item() if largest.any() else float('inf')


def _tolerance(model: nn.Module, output: Any) -> float:
    """Return the largest relative difference that rounding explains, for the lowest precision in use."""
    tensors = [*floating_point_tensors(model), *(t for t in tree_iter(output) if isinstance(t, torch.Tensor))]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    return max((_TOLERANCES.get(dtype, _LOW_PRECISION) for dtype in dtypes), default=0.0)

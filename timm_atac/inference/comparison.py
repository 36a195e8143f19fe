"""Compares the outputs of a model before and after `fuse` has changed it."""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only

from ..utils.autocast import without_autocast
from ..utils.forward_pass import floating_point_tensors

__all__ = ['Comparison', 'keep_random_state', 'with_other_shapes']

_logger = logging.getLogger(__name__)

# Differences relative to the largest value of an output that are accepted at once. With random norms, models of timm
# showed up to 2.4e-4 in float32 and 0.007 in float16; bfloat16 mostly 0.05, but 0.3 in efficientnet_b0.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.1}
_OTHER_TOLERANCE = 0.25
_MOST_ROUNDING = 0.2  # above, a network (fa_resnet50 in bfloat16) is chaotic, and the comparison says nothing
_TF32_EPS = 2**-10


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

    def check(self, model: nn.Module, original: nn.Module) -> None:
        """Raise RuntimeError if the changed model has other outputs.

        If they differ much, the difference is compared with that of a model whose weights have other rounding errors,
        because some models amplify these.

        Args:
            model: The model after the change.
            original: The model before the change, in any mode.
        """
        if self._inputs is None:
            return
        name = type(model).__name__
        tolerance = _tolerance(model, self._expected)
        try:
            found = _run(model, self._inputs)
        except Exception as error:
            raise RuntimeError(
                f'fuse: the fused copy of {name} does not run: {type(error).__name__}: '
                f'{str(error).partition(chr(10))[0]}. {_REMEDY}'
            ) from error
        difference = _difference(self._expected, found)
        if difference <= tolerance:
            return
        if _difference(found, _run(model, self._inputs)) > tolerance:
            _logger.warning('%s: its outputs are random, so those of the fused model are not compared.', name)
            return
        rounding = _difference(self._expected, _run(_with_rounding_errors(original), self._inputs))
        if rounding > _MOST_ROUNDING and difference != float('inf'):
            _logger.warning(
                '%s: the outputs of the fused model are not compared, because rounding alone changes them by %.2g of '
                'the largest output.',
                *(name, rounding),
            )
            return
        tolerance = max(tolerance, 4 * rounding)
        if difference > tolerance:
            raise RuntimeError(
                f'fuse: the fused copy of {name} computes another function: its outputs on the example input differ '
                f'by {difference:.2g} of the largest output, and rounding explains {tolerance:.2g}. {_REMEDY}'
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


@contextmanager
def keep_random_state(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """A context that restores PyTorch's random number generators of the CPU and of the devices of some tensors."""
    devices = {t.device for t in tensors} - {torch.device('cpu'), torch.device('meta')}
    with ExitStack() as stack:
        for device_type in {device.type for device in devices}:
            indices = [device.index for device in devices if device.type == device_type]
            stack.enter_context(torch.random.fork_rng(indices, device_type=device_type))
        stack.enter_context(torch.random.fork_rng([]))
        yield


def _run(model: nn.Module, inputs: tuple) -> Any:
    """Return the outputs of a copy of the model. Autocast is disabled, and the random state is restored."""
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    tensors = [*model.parameters(), *model.buffers(), *(t for t in tree_iter(inputs) if isinstance(t, torch.Tensor))]
    with ExitStack() as stack:
        for device in {t.device for t in tensors}:
            stack.enter_context(without_autocast(device))
        stack.enter_context(keep_random_state(tensors))
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
    if not expected.is_floating_point() and not expected.is_complex():
        # rounding may change a few, for example an index of the largest value
        return float('inf') if (expected != found).double().mean() > 0.5 else 0.0
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (expected.cpu(), found.cpu()))
    finite = a.isfinite()  # a sum that overflows before a norm need not overflow in a folded layer
    if not finite.all():
        finite &= b.isfinite()
    difference, largest = (a - b)[finite].abs(), a[finite].abs()
    if not len(difference) or not difference.any():
        return 0.0
    return (difference.max() / largest.max()).nan_to_num(float('inf')).item() if largest.any() else float('inf')


def _tolerance(model: nn.Module, output: Any) -> float:
    """Return the relative difference that is accepted at once, for the lowest precision in use."""
    tensors = [*floating_point_tensors(model), *(t for t in tree_iter(output) if isinstance(t, torch.Tensor))]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    return max((_TOLERANCES.get(dtype, _OTHER_TOLERANCE) for dtype in dtypes), default=0.0)


def _with_rounding_errors(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose weights differ by about the precision of their dtype."""
    copied = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    for p in copied.parameters():
        if p.is_floating_point():
            eps = torch.finfo(p.dtype).eps
            if p.is_cuda and p.dtype == torch.float32:
                eps = _TF32_EPS  # in which convolutions compute by default
            noise = torch.randn(p.shape, generator=generator, device='cpu', dtype=torch.float32)
            p.data = (p.data.double() * (1 + eps * noise.to(p.device))).to(p.dtype)
    return copied

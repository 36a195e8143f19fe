"""ATAC in place of the activations of a finished model, whatever it is and wherever it is from."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerType, get_act_layer
from torch.utils._pytree import tree_leaves

from .. import _timm
from ..units.atac import ACTIVATIONS
from ..units.memory_efficient import ACTIVATIONS_ME
from ..utils.forward_pass import example_inputs, shapes
from .edits import Edits, Replaced
from .trace import Trace, is_activation, trace
from .where import Selection, Where

__all__ = ['Report', 'replace_activations']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What `replace_activations` did to a model."""

    act: str
    replaced: tuple[Replaced, ...]
    left: tuple[tuple[str, str], ...]  # activation, and why it stayed
    model_args: dict[str, Any] | None = None  # of a model of timm: those of `atac_host` that create it again

    def __str__(self) -> str:
        lines = [f'{len(self.replaced)} units ({self.act})']
        lines += [
            f'  {r.name}: {r.was} -> {r.channels} channels, {r.input_fmt}'
            + (f', shared by {r.places} places' if r.places > 1 else '')
            for r in self.replaced
        ]
        return '\n'.join([*lines, *self._left()])

    def caveats(self) -> str:
        """What is not as one would expect: units that serve several places, activations that stay; '' if all is."""
        shared = [r.name for r in self.replaced if r.places > 1]
        lines = [f'  one unit each for several places: {", ".join(shared)}'] if shared else []
        return '\n'.join([*lines, *self._left()])

    def _left(self) -> list[str]:
        return [f'  {name} stays: {reason}' for name, reason in self.left]


def replace_activations(
    model: nn.Module,
    act: LayerType = 'atac',
    *,
    where: Where | Sequence[Where] | None = None,
    example_input: Any = None,
    rd_ratio: float | None = None,
) -> nn.Module:
    """Put units in place of a model's activations. Its weights and everything else stay as they are.

    A forward pass, on the `meta` device where the model can do that, tells width and layout of each activation. An
    activation module that is called at several places becomes one unit for each, by rewriting the module that calls it
    with torch.fx; where its forward pass has no one graph, one unit for each width. Activations called as functions
    are replaced in the same way, or stay. Attributes on which a rewritten forward pass depends can then no longer be
    set to another value. `where=None` also means the activations inside of attention modules.

    Args:
        model: Any model; changed in place, all of it or, with an error, nothing.
        act: 'atac', 'se_act', 'nin', 'xunit', a class or `partial` whose constructor takes `channels` and `input_fmt`.
        where: Which activations, None for all: a pattern of names (`'layer4.*'`), a type (`nn.GELU`), a stage by its
            number from 1 as `atac_stages` has it, or from the last (`(-2, -1)`; by the model's `feature_info`), a
            function of name and module; or several of those, of which one has to fit.
        example_input: What the model takes: a tensor, or a tuple of positional arguments. None is a batch of two
            images of the size for which timm has created the model, or (2, 3, 224, 224).
        rd_ratio: Width of the units' bottleneck over the channels, None for their own (0.5).

    Returns:
        The model. Its `replaced_activations` is a `Report`, which is also logged, with a warning if anything in `where`
        stayed as it was or shares a unit. A model of timm can be saved and loaded by timm alone: its `pretrained_cfg`
        names the architecture 'atac_host', which has the arguments of this function. (Not `example_input`, and of an
        `act` without a name nothing can be saved.)

    Raises:
        ValueError: `where` fits no activation that can be replaced, the model does not take `example_input`, or `act`
            is no unit.
    """
    selection = Selection(where)
    _check_act(act)
    inputs = example_inputs(model, example_input)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    watch = {m for m in names if is_activation(m) or isinstance(m, selection.types)}
    try:
        seen = trace(model, inputs, watch)
    except Exception as error:
        raise ValueError(
            f'{type(model).__name__} does not run on {shapes(inputs)}: {type(error).__name__}: {error} '
            f'Give an example_input that it takes, a tensor or a tuple of positional arguments.'
        ) from error
    selection.watch_stages(model, seen)

    plan = Edits(model, names, watch, seen, selection, act, rd_ratio)
    if not plan.replaced:
        left = ''.join(f' {name} stays: {reason}.' for name, reason in plan.left[:10])
        there = [name for activation in plan.activations for name in names[activation]]
        raise ValueError(
            f'where={where!r} fits no activation of {type(model).__name__} that can be replaced.{left} '
            f'There are {len(there)} activation modules: {", ".join(there[:10])}{", ..." if len(there) > 10 else ""}'
        )
    undo = plan.apply()
    try:
        _check(model, inputs, plan, seen)
        name = _act_name(act)
        cfg = getattr(model, 'pretrained_cfg', None)
        recipe = None
        if isinstance(cfg, dict) and cfg.get('architecture'):
            recipe = _timm.record(model, 'atac_host', act=name or act, where=plan.where, rd_ratio=rd_ratio)
    except BaseException:
        undo()
        raise
    report = Report(name or repr(act), tuple(plan.replaced), tuple(plan.left), recipe)
    model.replaced_activations = report  # type: ignore[assignment]
    _logger.info('%s: %s', type(model).__name__, report)
    if report.caveats():
        _logger.warning('%s: %d units (%s)\n%s', type(model).__name__, len(plan.replaced), report.act, report.caveats())
    return model


def _check(model: nn.Module, inputs: tuple, plan: Edits, before: Trace) -> None:
    """Run the changed model: it has to use every unit, and to return what it did.

    Raises:
        ValueError: It does not.
    """
    way_out = 'Nothing is changed; leave that place out by `where`.'
    try:
        after = trace(model, inputs, set(plan.units))
    except Exception as error:
        raise ValueError(
            f'{type(model).__name__} does not run with {len(plan.replaced)} of its activations replaced: '
            f'{type(error).__name__}: {error} {way_out}'
        ) from error
    called = {call.activation for _, call in after.calls()}
    unused = [r.name for r, unit in zip(plan.replaced, plan.units, strict=True) if unit not in called]
    if unused:
        raise ValueError(f'{type(model).__name__} would not call its new units {", ".join(unused[:10])}. {way_out}')
    shapes = [[t.shape for t in tree_leaves(run.output) if isinstance(t, torch.Tensor)] for run in (before, after)]
    # with values there may be other numbers of them, such as boxes
    if before.on_meta and after.on_meta and shapes[0] != shapes[1]:
        raise ValueError(f'{type(model).__name__} would return {shapes[1]}, not {shapes[0]}. {way_out}')


def _check_act(act: LayerType) -> None:
    try:
        layer = get_act_layer(act)
        accepted = signature(layer).parameters if layer is not None else {}
    except (KeyError, TypeError, ValueError):
        accepted = {}
    if not {'channels', 'input_fmt'} <= set(accepted):
        raise ValueError(
            f"act={act!r}: expected 'atac', 'se_act', 'nin', 'xunit', or a class or partial whose constructor takes "
            f'`channels` and `input_fmt`, such as partial(timm_atac.ATAC, gate_layer=...).'
        )


def _act_name(act: LayerType) -> str | None:
    """The name under which timm knows a unit, None for what it does not know."""
    if isinstance(act, str):
        return act
    return next((n for table in (ACTIVATIONS, ACTIVATIONS_ME) for n, layer in table.items() if layer is act), None)

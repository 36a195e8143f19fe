"""Replaces the activations of a finished model by ATAC or another unit, for any model."""

import html
import logging
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
from ..utils.forward_pass import ForwardError, example_inputs
from ..utils.words import counted, did_you_mean, shortened
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
    left: tuple[tuple[str, str], ...]  # name of an activation that stays, and why
    model_args: dict[str, Any] | None = None  # of a timm model: the arguments of `atac_host` that create it again

    def __str__(self) -> str:
        lines = [f'{counted(len(self.replaced), "unit")} ({self.act})']
        for r in self.replaced:
            shared = f', shared by {r.places} places' if r.places > 1 else ''
            lines.append(f'  {r.name}: {r.was} -> {r.channels} channels, {r.input_fmt}{shared}')
        return '\n'.join([*lines, *self._stays()])

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        head = ('unit', 'was', 'channels', 'layout', 'places')
        rows = [(r.name, r.was, r.channels, r.input_fmt, r.places) for r in self.replaced]
        cells = [f'<td>{"</td><td>".join(html.escape(str(cell)) for cell in row)}</td>' for row in rows]
        body = ''.join(f'<tr>{row}</tr>' for row in cells)
        stays = ''.join(f'<p>{html.escape(line.strip())}</p>' for line in self._stays())
        title = html.escape(f'{counted(len(self.replaced), "unit")} ({self.act})')
        return (
            f'<p>{title}</p><table><thead><tr><th>{"</th><th>".join(head)}</th></tr></thead>'
            f'<tbody>{body}</tbody></table>{stays}'
        )

    def caveats(self) -> str:
        """Return the units that serve several places and the activations that stay, or '' if there are none."""
        shared = [r.name for r in self.replaced if r.places > 1]
        lines = [f'  one unit each for several places: {", ".join(shared)}'] if shared else []
        return '\n'.join([*lines, *self._stays()])

    def _stays(self) -> list[str]:
        return [f'  {name} stays: {reason}' for name, reason in self.left]


def replace_activations(
    model: nn.Module,
    act: LayerType = 'atac',
    *,
    where: Where | Sequence[Where] | None = None,
    example_input: Any = None,
    rd_ratio: float | None = None,
) -> nn.Module:
    """Replace the activations of a model by units. Its weights and everything else stay as they are.

    A forward pass shows the width and layout of each activation's input. It runs on the `meta` device if the model can.

    * An activation module that is called at several places becomes one unit for each place: torch.fx rewrites the
      module that calls it. If its forward pass has no single graph, there is one unit for each width.
    * Activations that are called as functions are replaced in the same way, or stay if there is no graph.
    * Attributes that a rewritten forward pass depends on can no longer be set to another value.
    * `where=None` includes the activations inside of attention modules.

    Args:
        model: Any model. All of it is changed in place, or, after an error, nothing. Of a model of `torch.compile`, the
            model inside is changed. The next forward pass compiles it again.
        act: 'atac', 'se_act', 'nin', 'xunit', a class or `partial` whose constructor takes `channels` and `input_fmt`.
        where: Selects activations, None all of them: a pattern of names (`'layer4.*'`), a type (`nn.GELU`), a stage
            number from 1 as in `atac_stages`, or from the last (`(-2, -1)`; by the model's `feature_info`), a function
            of name and module, or a sequence of those, of which one has to fit.
        example_input: The input of the model: a tensor, or a tuple of positional arguments. None is a batch of two
            images of the size for which timm has created the model, or (2, 3, 224, 224).
        rd_ratio: Width of the units' bottleneck over the channels, None for the units' default (0.5).

    Returns:
        The model. Its `replaced_activations` is a `Report`, which is also logged, with a warning if a selected
        activation stays or several places share a unit. A timm model can be saved and loaded by timm alone: its
        `pretrained_cfg` names the architecture 'atac_host', which has the arguments of this function, except for
        `example_input`. An `act` without a name cannot be saved.

    Raises:
        ValueError: `where` selects no activation that can be replaced, the model does not run on `example_input`, its
            weights are offloaded, or `act` is no unit.
    """
    if isinstance(inside := getattr(model, '_orig_mod', None), nn.Module):  # of torch.compile
        replace_activations(inside, act, where=where, example_input=example_input, rd_ratio=rd_ratio)
        return model
    selection = Selection(where)
    _check_act(act)
    inputs = example_inputs(model, example_input)
    activations = {m for m in model.modules() if is_activation(m) or isinstance(m, selection.types)}
    before = trace(model, inputs, activations)
    selection.locate_stages(model, before)
    edits = Edits(model, activations, before, selection, act, rd_ratio)
    if not edits.replaced:
        kept = ''.join(f' {name} stays: {reason}.' for name, reason in edits.kept[:10])
        names = edits.activation_names
        raise ValueError(
            f'where={where!r} fits no activation of {type(model).__name__} that can be replaced.{kept} '
            f'There {"is" if len(names) == 1 else "are"} {counted(len(names), "activation module")}'
            f'{": " if names else ""}{", ".join(shortened(names, 10))}.'
        )
    name = _act_name(act)
    model_args = None
    with edits.applied():
        _check(model, inputs, edits, before)
        cfg = getattr(model, 'pretrained_cfg', None)
        if isinstance(cfg, dict) and cfg.get('architecture'):
            model_args = _timm.record(model, 'atac_host', act=name or act, where=edits.where, rd_ratio=rd_ratio)
    report = Report(name or repr(act), tuple(edits.replaced.values()), tuple(edits.kept), model_args)
    model.replaced_activations = report  # type: ignore[assignment]
    _logger.info('%s: %s', type(model).__name__, report)
    if report.caveats():
        units = counted(len(report.replaced), 'unit')
        _logger.warning('%s: %s (%s)\n%s', type(model).__name__, units, report.act, report.caveats())
    return model


def _check(model: nn.Module, inputs: tuple, edits: Edits, before: Trace) -> None:
    """Run the changed model.

    Raises:
        ValueError: It does not run, does not call every unit, or returns other shapes than before.
    """
    remedy = 'Nothing is changed. Leave that activation out by `where`.'
    try:
        after = trace(model, inputs, set(edits.replaced))
    except ForwardError as error:
        raise ValueError(
            f'{type(model).__name__} does not run with {len(edits.replaced)} of its activations replaced: '
            f'{type(error.__cause__).__name__}: {str(error.__cause__).rstrip(". ")}. {remedy}'
        ) from error
    called = {call.activation for _, call in after.calls()}
    unused = [replaced.name for unit, replaced in edits.replaced.items() if unit not in called]
    if unused:
        raise ValueError(f'{type(model).__name__} would not call its new units {", ".join(unused[:10])}. {remedy}')
    shapes = [[t.shape for t in tree_leaves(run.output) if isinstance(t, torch.Tensor)] for run in (before, after)]
    # with values, shapes may depend on them: the number of boxes for example
    if before.on_meta and after.on_meta and shapes[0] != shapes[1]:
        raise ValueError(f'{type(model).__name__} would return {shapes[1]}, not {shapes[0]}. {remedy}')


def _check_act(act: LayerType) -> None:
    try:
        accepted: Any = signature(get_act_layer(act)).parameters  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        accepted = {}
    if not {'channels', 'input_fmt'} <= set(accepted):
        hint = did_you_mean(act, (*ACTIVATIONS, *ACTIVATIONS_ME)) if isinstance(act, str) else ''
        expected = f'{hint} Expected' if hint else 'expected'
        raise ValueError(
            f"act={act!r}: {expected} 'atac', 'se_act', 'nin', 'xunit', or a class or partial "
            f'whose constructor takes `channels` and `input_fmt`, such as partial(timm_atac.ATAC, gate_layer=...).'
        )


def _act_name(act: LayerType) -> str | None:
    """Return the name under which timm knows a unit, or None."""
    if isinstance(act, str):
        return act
    return next((n for table in (ACTIVATIONS, ACTIVATIONS_ME) for n, layer in table.items() if layer is act), None)

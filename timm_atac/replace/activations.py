"""Replaces the activations of a finished model by ATAC or another unit, for any model."""

import logging
from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import Any, Literal, overload

import torch
import torch.nn as nn
from timm.layers import LayerType, get_act_layer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from .. import _timm
from ..units.infer_width import is_norm
from ..units.names import ACTIVATIONS, describe_names, name_of
from ..utils.forward_pass import ForwardError, example_inputs
from ..utils.words import counted, did_you_mean
from .budget import choose_rd_ratio, is_budget
from .edits import Edits
from .imitation import start_units
from .placement import Placement
from .places import describe, find_places
from .report import Replaced, Report
from .stages import find_stages
from .trace import Trace, is_activation, trace
from .where import Selection, Where, stage_lines

__all__ = ['Report', 'replace_activations', 'replace_selected']

_logger = logging.getLogger(__name__)


@overload
def replace_activations(
    model: nn.Module,
    act: LayerType = 'atac',
    *,
    where: Where | Sequence[Where] | Mapping[str, Any] | None = None,
    example_input: Any = None,
    rd_ratio: float | str | None = None,
    imitate: bool = True,
    dry_run: Literal[False] = False,
) -> nn.Module: ...
@overload
def replace_activations(
    model: nn.Module,
    act: LayerType = 'atac',
    *,
    where: Where | Sequence[Where] | Mapping[str, Any] | None = None,
    example_input: Any = None,
    rd_ratio: float | str | None = None,
    imitate: bool = True,
    dry_run: Literal[True],
) -> Report: ...
def replace_activations(
    model: nn.Module,
    act: LayerType = 'atac',
    *,
    where: Where | Sequence[Where] | Mapping[str, Any] | None = None,
    example_input: Any = None,
    rd_ratio: float | str | None = None,
    imitate: bool = True,
    dry_run: bool = False,
) -> nn.Module | Report:
    """Replace the activations of a model by units. Its weights and everything else stay as they are.

    A forward pass shows the width and layout of each activation's input. It runs on the `meta` device if the model can.

    * An activation module that is called at several places becomes one unit for each place: torch.fx rewrites the
      module that calls it. If its forward pass has no single graph, there is one unit for each width.
    * Activations that are called as functions are replaced in the same way, or stay if there is no graph.
    * Attributes that a rewritten forward pass depends on can no longer be set to another value.

    Args:
        model: Any model. All of it is changed in place, or, after an error, nothing. Of a model of `torch.compile`, the
            model inside is changed. The next forward pass compiles it again.
        act: 'atac', 'se_act', 'nin', 'xunit', a class or `partial` whose constructor takes `channels` and `input_fmt`.
            These names stand for units with BatchNorm. 'atac_layernorm2d' and 'atac_groupnorm1' have norms that do not
            mix images. So do the other names with these endings.
        where: Selects activations by one of these, or a sequence of them, of which one has to fit. (A dict with one of
            these as 'places', as config.json has it, is the same.)

            * 'paper': as in the paper's ATAC-ResNet-50, the inner activations of the blocks of the last two stages. See
              docs/any_model.md.
            * 'all', or None: all activations, also those inside of attention modules.
            * A pattern of names: `'layer4.*'`. The report has the names.
            * A stage number from 1 as in `atac_stages`, or from the last: `(-2, -1)`. The report lists the stages.
            * A type: `nn.GELU`.
            * A function of name and module.
            * 'attention': the activations inside of attention modules. In a sequence, 'paper', stages and types then
              include those inside of attention modules, which they leave out otherwise.
        example_input: The input of the model: a tensor, or a tuple of positional arguments. None is a batch of two
            images of the size for which timm has created the model, or (2, 3, 224, 224).
        rd_ratio: Width of the units' bottleneck over the channels, None for the units' default (0.5). A whole number
            greater than 1 is the number of parameters that the units may add, and 'auto' is a tenth of the parameters
            of the model. Then the ratio is the largest of 1/2, 1/3, 1/4, ... that keeps within it.
        imitate: Let ATAC units that follow a trained BatchNorm start close to the activations that they replace. False
            starts all units from random weights, as those of an untrained model do.
        dry_run: Change nothing, and return the report.

    Returns:
        The model. Its `replaced_activations` is a `Report`, which is also logged, with a warning if a selected
        activation stays, several places share a unit, the units bring BatchNorm into a model without it, or the model
        was trained. A timm model can be saved and loaded by timm alone: its `pretrained_cfg` names the architecture
        'atac_host', which has the arguments of this function, except for `example_input`, `imitate` and `dry_run`. An
        `act` without a name cannot be saved. With `dry_run`, the `Report`.

    Raises:
        ValueError: A part of `where` fits no activation, no selected activation can be replaced, the model does not run
            on `example_input`, its weights are offloaded, `act` is no unit, or `rd_ratio` is too small a number of
            parameters.
    """
    return replace_selected(model, act, Selection(where), example_input, rd_ratio, imitate, dry_run)


def replace_selected(
    model: nn.Module,
    act: LayerType,
    selection: Selection,
    example_input: Any,
    rd_ratio: Any,
    imitate: bool = True,
    dry_run: bool = False,
) -> Any:
    """Do what `replace_activations` does, for a `where` that is already checked."""
    if isinstance(inside := getattr(model, '_orig_mod', None), nn.Module):  # of torch.compile
        result = replace_selected(inside, act, selection, example_input, rd_ratio, imitate, dry_run)
        return result if dry_run else model
    _check_act(act)
    inputs = example_inputs(model, example_input)
    activations = {m for m in model.modules() if is_activation(m) or isinstance(m, selection.types)}
    before = trace(model, inputs, activations)
    placement = Placement(before)
    places, stages = find_places(model, activations, before), find_stages(model, before, placement, selection.saved)
    selected = selection.choose(model, places, placement, stages)
    left = [(place.name, place.reason) for place in selected if place.reason is not None]
    chosen = [place for place in selected if place.reason is None]
    left_out = selection.not_chosen(model, places, placement, stages)
    if not chosen:
        kept = ''.join(f' {name} stays: {reason}.' for name, reason in left[:10])
        raise ValueError(
            f'where={selection.where!r} fits no activation of {type(model).__name__} that can be replaced.{kept}'
        )
    how = ''
    if is_budget(rd_ratio):
        rd_ratio, how = choose_rd_ratio(model, chosen, act, rd_ratio)
    elif isinstance(rd_ratio, str):
        raise ValueError(f"rd_ratio={rd_ratio!r}: expected a ratio in (0, 1], a number of parameters, or 'auto'.")

    name = name_of(act)
    model_args = None
    parameters = sum(p.numel() for p in model.parameters())
    with torch.random.fork_rng([], enabled=dry_run):
        device = torch.device('meta') if dry_run and before.on_meta else None
        edits = Edits(model, chosen, places, act, rd_ratio, device)
    with edits.applied(keep=not dry_run):
        after = _check(model, inputs, edits, before)
        start = start_units(model, edits.units, imitate, dry_run)
        total = sum(p.numel() for p in model.parameters())
        cfg = getattr(model, 'pretrained_cfg', None)
        if isinstance(cfg, dict) and cfg.get('architecture') and not dry_run:
            where = selection.serializable(chosen)
            model_args = _timm.record(model, 'atac_host', act=name or act, where=where, rd_ratio=rd_ratio)
    report = Report(
        name or repr(act),
        _rows(edits, after, _batch_size(inputs)),
        tuple(left),
        model_args,
        rd_ratio,
        how,
        (parameters, total),
        (_flops(before, model) / 2e9 / _batch_size(inputs), _flops(after, model) / 2e9 / _batch_size(inputs)),
        tuple(stage_lines(stages)),
        tuple((reason, tuple(names)) for reason, names in left_out.items()),
        *_norms(model, edits.units),
        start,
    )
    if dry_run:
        return report
    model.replaced_activations = report  # type: ignore[assignment]
    _logger.info('%s: %s', type(model).__name__, report)
    if report.caveats():
        units = counted(len(report.replaced), 'unit')
        _logger.warning('%s: %s (%s)\n%s', type(model).__name__, units, report.act, report.caveats())
    return model


def _rows(edits: Edits, after: Trace, batch_size: int) -> tuple[Replaced, ...]:
    rows = []
    for unit, place in sorted(edits.units.items(), key=lambda item: item[1].sort_key):
        gmacs = _flops(after, unit) / 2e9 / batch_size
        count = sum(p.numel() for p in unit.parameters())
        rows.append(Replaced(place.name, describe(place.activation), *place.width, len(place.calls), count, gmacs))
    return tuple(rows)


def _norms(model: nn.Module, units: Collection[nn.Module]) -> tuple[tuple[str, ...], bool]:
    """Return the types of the units' norms, and True if these have BatchNorm and the rest of the model has none."""
    inside = {norm: type(norm).__name__ for unit in units for norm in unit.modules() if is_norm(norm)}
    rest = any(isinstance(module, _BatchNorm) for module in model.modules() if module not in inside)
    return tuple(dict.fromkeys(inside.values())), not rest and any(isinstance(norm, _BatchNorm) for norm in inside)


def _flops(run: Trace, module: nn.Module) -> int:
    return sum(invocation.flops for invocation in run.invocations if invocation.module is module)


def _batch_size(inputs: tuple) -> int:
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.ndim > 0]
    return max(1, tensors[0].shape[0]) if tensors else 1


def _check(model: nn.Module, inputs: tuple, edits: Edits, before: Trace) -> Trace:
    """Run the changed model.

    Raises:
        ValueError: It does not run, does not call every unit, or returns other shapes than before.
    """
    remedy = 'Nothing is changed. Leave that activation out by `where`.'
    try:
        after = trace(model, inputs, set(edits.units))
    except ForwardError as error:
        raise ValueError(
            f'{type(model).__name__} does not run with {len(edits.units)} of its activations replaced: '
            f'{type(error.__cause__).__name__}: {str(error.__cause__).rstrip(". ")}. {remedy}'
        ) from error
    called = {call.activation for _, call in after.calls()}
    unused = [place.name for unit, place in edits.units.items() if unit not in called]
    if unused:
        raise ValueError(f'{type(model).__name__} would not call its new units {", ".join(unused[:10])}. {remedy}')
    shapes = [[t.shape for t in tree_leaves(run.output) if isinstance(t, torch.Tensor)] for run in (before, after)]
    # with values, shapes may depend on them: the number of boxes for example
    if before.on_meta and after.on_meta and shapes[0] != shapes[1]:
        raise ValueError(f'{type(model).__name__} would return {shapes[1]}, not {shapes[0]}. {remedy}')
    return after


def _check_act(act: LayerType) -> None:
    try:
        accepted: Any = signature(get_act_layer(act)).parameters  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        accepted = {}
    if not {'channels', 'input_fmt'} <= set(accepted):
        hint = did_you_mean(act, ACTIVATIONS) if isinstance(act, str) else ''
        expected = f'{hint} Expected' if hint else 'expected'
        raise ValueError(
            f'act={act!r}: {expected} {describe_names()}, or a class or partial '
            f'whose constructor takes `channels` and `input_fmt`, such as partial(timm_atac.ATAC, gate_layer=...).'
        )

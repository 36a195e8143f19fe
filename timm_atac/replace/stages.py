"""The stages of a model: what runs at one size of the feature maps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from .placement import Placement
from .trace import Call, Trace

__all__ = ['Stage', 'find_stages']


@dataclass(frozen=True)
class Stage:
    """A stage of a model.

    Attributes:
        modules: Names of the modules that run in it and call activations.
        calls: The ids of the calls of activations in it.
    """

    modules: tuple[str, ...]
    calls: frozenset[int]


def find_stages(model: nn.Module, trace: Trace, placement: Placement) -> list[Stage]:
    """Return the stages of a model, the first of which is stage 1.

    * In a model of timm, a stage is an entry of `feature_info`. It starts where the stage before it ends, the first one
      where its module starts, and it ends with its module. An entry whose module has no children is a stem and no
      stage. In a ViT, every block is a stage.
    * In any other model, a stage is all blocks whose outputs have one number of positions, with what runs before them.
      If that is the same for all blocks, every block is a stage. Without blocks, as in a VGG, a stage is all
      activations of maps with one number of positions. What runs before the first and after the last block, and what
      gets one value per channel, is in no stage.

    Args:
        model: The model.
        trace: A forward pass of the model.
        placement: The places of the activations in this forward pass.
    """
    calls = sorted((call for _, call in trace.calls()), key=lambda call: call.step)
    spans = _spans(model, trace)
    if sum(first < last for first, last in spans.values()) > 1:
        groups = [
            (name, [call for call in calls if first < call.step <= last]) for (_, name), (first, last) in spans.items()
        ]
    else:
        groups = [('', group) for group in _by_map_size(calls, placement)]
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    return [Stage(_modules(trace, names, calls, group) or (name,), frozenset(map(id, group))) for name, group in groups]


def _spans(model: nn.Module, trace: Trace) -> dict[tuple[int, str], tuple[int, int]]:
    """Return the first and the last step of each stage of timm's `feature_info`, by its index and its module."""
    feature_info: Any = getattr(model, 'feature_info', None)
    feature_info = getattr(feature_info, 'info', feature_info)  # timm's class of a `features_only` model has a list
    modules = dict(model.named_modules())
    spans: dict[tuple[int, str], tuple[int, int]] = {}
    end: int | None = None
    for index, entry in enumerate(feature_info if isinstance(feature_info, (list, tuple)) else []):
        name = entry.get('module', '')
        module = modules.get(name)
        runs = [invocation for invocation in trace.invocations if invocation.module is module]
        if module is not None and runs and any(True for _ in module.children()):
            spans[index, name] = (runs[0].start if end is None else end, runs[-1].end)
            end = runs[-1].end
    return spans


def _by_map_size(calls: Iterable[Call], placement: Placement) -> list[list[Call]]:
    blocks = placement.blocks
    by_size: dict[int, list[Call]] = {}
    by_block: dict[int, list[Call]] = {}
    for call in calls:
        if call.source is None:
            continue
        if not blocks:
            if call.source.positions > 1:
                by_size.setdefault(call.source.positions, []).append(call)
            continue
        around = [block for block in blocks if block.start <= call.step <= block.end]
        block = around[-1] if around else next((block for block in blocks if block.start > call.step), None)
        if call.step >= blocks[0].start and block is not None and block.output is not None:
            by_size.setdefault(block.output.positions, []).append(call)
            by_block.setdefault(id(block), []).append(call)
    return list((by_block if len(by_size) == 1 and blocks else by_size).values())


def _modules(trace: Trace, names: dict[nn.Module, str], calls: list[Call], group: list[Call]) -> tuple[str, ...]:
    """Return the names of the outermost modules that call activations of one stage only."""
    inside = set(map(id, group))
    found: list[str] = []
    end = 0
    for invocation in trace.invocations:
        if invocation.start < end:
            continue
        steps = [id(call) in inside for call in calls if invocation.start <= call.step <= invocation.end]
        if steps and all(steps) and names.get(invocation.module):
            found.append(names[invocation.module])
            end = invocation.end
    return tuple(dict.fromkeys(found))

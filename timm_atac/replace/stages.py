"""The stages of a model: what runs at one size of the feature maps."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from .placement import Placement
from .places import callee_names
from .trace import Call, Trace

__all__ = ['Stage', 'find_stages']


@dataclass(frozen=True)
class Stage:
    """A stage of a model.

    Attributes:
        modules: Names of the modules that run in it and have activations.
        calls: The ids of the calls of activations in it.
    """

    modules: tuple[str, ...]
    calls: frozenset[int]


def find_stages(model: nn.Module, trace: Trace, placement: Placement, saved: bool = False) -> list[Stage]:
    """Return the stages of a model, the first of which is stage 1.

    * In a model of timm, a stage is an entry of `feature_info`. It starts where the stage before it ends, the first one
      where its module starts, and it ends with its module. First entries whose modules have no children are the stem
      and no stage. In a ViT, every block is a stage.
    * In any other model, a stage is all blocks whose outputs have one number of positions, with what runs before them.
      If that is the same for all blocks, every block is a stage. Without blocks, as in a VGG, a stage is all
      activations of maps with one number of positions. What runs before the first and after the last block, and what
      gets one value per channel, is in no stage.

    Args:
        model: The model.
        trace: A forward pass of the model.
        placement: The places of the activations in this forward pass.
        saved: Count as version 0.1 did: no entry whose module has no children is a stage. In the NFNets, for example,
            the last stage ends with such a module.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    in_order = sorted(trace.calls(), key=lambda pair: pair[1].step)
    paths = {id(call): callee_names(call, invocation.module, names)[0] for invocation, call in in_order}
    calls = [call for _, call in in_order]
    spans = _spans(model, trace, saved)
    if sum(first < last for first, last in spans.values()) > (0 if saved else 1):
        groups = [
            (name, [call for call in calls if first < call.step <= last]) for (_, name), (first, last) in spans.items()
        ]
    else:
        groups = [('', group) for group in _by_map_size(calls, placement)]
    ids = [(name, frozenset(map(id, group))) for name, group in groups]
    return [Stage(_modules(paths, group) or (name,), group) for name, group in ids]


def _spans(model: nn.Module, trace: Trace, saved: bool) -> dict[tuple[int, str], tuple[int, int]]:
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
        is_stage = module is not None and (any(True for _ in module.children()) or (bool(spans) and not saved))
        if runs and is_stage:
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


def _modules(paths: dict[int, str], group: frozenset[int]) -> tuple[str, ...]:
    """Return the names of the outermost modules whose activations are called in one stage only.

    Args:
        paths: The name of what is called, by the id of the call.
        group: The ids of the calls in the stage.
    """
    elsewhere = {prefix for call, path in paths.items() if call not in group for prefix in _prefixes(path)}
    found = (
        next((p for p in _prefixes(paths[call]) if p not in elsewhere), paths[call]) for call in paths if call in group
    )
    return tuple(dict.fromkeys(found))


def _prefixes(path: str) -> Iterator[str]:
    """Yield 'a', 'a.b' and 'a.b.c' for 'a.b.c'."""
    return itertools.accumulate(path.split('.'), '{}.{}'.format)

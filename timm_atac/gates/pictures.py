"""What the gates of models do on an image, as pictures.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from .._timm import input_size
from ..units.atac import LocalSE
from .gate import CHANNEL_ATTENTION, activation_types
from .maps import Types, gate_maps, gated_modules, gated_units, maps_and_ends
from .plot import plot_comparison, plot_gates

__all__ = [
    'check_comparable',
    'compare_picture',
    'gate_maps',
    'gated_units',
    'gates_picture',
    'plot_comparison',
    'plot_gates',
]

ImgSize = int | tuple[int, int] | None


def gates_picture(
    model: nn.Module,
    image: Image.Image,
    path: str | os.PathLike[str],
    title: str | None = None,
    img_size: ImgSize = None,
) -> dict[str, torch.Tensor]:
    """Run a model on an image, prepared as timm prepares it for validation, and draw its gates over what it saw.

    Args:
        model: As in `gate_maps`; takes images of one channel or three.
        image: Any size and mode; turned to grey for a model of one channel, to RGB for three.
        path: As in `plot_gates`.
        title: As in `plot_gates`.
        img_size: Height and width for the model, None for its own.

    Returns:
        As `gate_maps`, B = 1.

    Raises:
        ValueError: As `gate_maps`; the model takes images of another number of channels.
        ImportError: matplotlib is not installed.
    """
    config = _data_config(model, img_size)
    x = _prepared(image, config)
    gates = gate_maps(model, x[None])
    plot_gates(gates, _seen(x, config), path, title)
    return gates


def compare_picture(
    models: Mapping[str, nn.Module],
    image: Image.Image,
    path: str | os.PathLike[str],
    title: str | None = None,
    img_size: ImgSize = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Run several models on one image, and draw their gates side by side: a column each, a row for each block.

    Of a model these gates are taken: of its units (ATAC, SEActivation, LocalSE) if it has any with a gate, else of its
    SE or Gather-Excite modules if it has any, else of its activations, such as ReLU.

    A row is a place that all models have: the module that a gate is in, as a block 'layer3.0', or, if it is in none,
    the gate itself, as 'act1'. Of several gates in one place, the first model with units in an activation's place (any
    but LocalSE) gives its last one there. The others give the one of the same name, such as 'act2'; where they have
    none, or there is no such model, the last one there but that with which the block ends: in a residual block this is
    the activation after the addition.

    Args:
        models: Two or more by what to call them; all take images of one size, of one channel or of three.
        image: Any size and mode. It is cut and scaled for all as for the first, and normalised for each as for itself.
        path: As in `plot_comparison`.
        title: As in `plot_comparison`.
        img_size: Height and width for the models, None for their own.

    Returns:
        For each model, in the order of the rows, gates by the name of the module that they are of, as `gate_maps`
        returns them, B = 1.

    Raises:
        ValueError: Fewer than two models, without a common place or with different sizes or channels of images.
        ImportError: matplotlib is not installed.

    Source:
        Section III of the paper: all of these are gates, and differ in what they look at.
    """
    check_comparable(models, img_size)
    configs = {label: _data_config(model, img_size) for label, model in models.items()}
    first = next(iter(configs.values()))
    taken = {}
    for label, model in models.items():
        x = _prepared(image, {**first, 'mean': configs[label]['mean'], 'std': configs[label]['std']})
        taken[label] = maps_and_ends(model, x[None], _compared(model))
    chosen = _choose(models, {label: (list(gates), ends) for label, (gates, ends) in taken.items()})
    gates = {label: {name: taken[label][0][name] for name in names} for label, names in chosen.items()}
    plot_comparison(gates, _seen(_prepared(image, first), first), path, title)
    return gates


def check_comparable(models: Mapping[str, nn.Module], img_size: ImgSize = None) -> None:
    """Whether `compare_picture` can draw these models, as far as it shows without running them: the same errors.

    Args:
        models: As in `compare_picture`, on any device; `meta` will do.
        img_size: As in `compare_picture`.
    """
    if len(models) < 2:
        raise ValueError(f'{len(models)} models: expected at least two to compare; gates_picture draws one.')
    sizes = {label: _data_config(model, img_size)['input_size'] for label, model in models.items()}
    if len(set(sizes.values())) > 1:
        listed = ', '.join(f'{label} {"x".join(map(str, size))}' for label, size in sizes.items())
        raise ValueError(
            f'The models take different images: {listed}. Expected the same channels and size, which '
            f'`compare_picture(..., img_size=)` gives to those that can take it.'
        )
    _common_places({label: _by_place(gated_modules(model, _compared(model))) for label, model in models.items()})


def _compared(model: nn.Module) -> Types:
    """The types whose gates are compared of a model, None for its units."""
    if gated_units(model):
        return None
    return CHANNEL_ATTENTION if gated_modules(model, CHANNEL_ATTENTION) else activation_types()


def _choose(
    models: Mapping[str, nn.Module], taken: Mapping[str, tuple[list[str], frozenset[str]]]
) -> dict[str, list[str]]:
    """One gate of each model for each common place.

    Args:
        models: By label.
        taken: For each the names of its gates, in the order of their calls, and which of them end their block.
    """
    places = {label: _by_place(names) for label, (names, _) in taken.items()}
    common = _common_places(places)
    leader = next((label for label, model in models.items() if _has_unit_activations(model)), None)
    own = {place: _split(names[-1])[1] for place, names in places[leader].items()} if leader is not None else {}
    chosen: dict[str, list[str]] = {label: [] for label in models}
    for label, (_, ends) in taken.items():
        for place in common:
            names = places[label][place]
            same = [name for name in names if _split(name)[1] == own.get(place)]
            inside = [name for name in names if name not in ends]
            chosen[label].append((same or inside or names)[-1])
    return chosen


def _has_unit_activations(model: nn.Module) -> bool:
    return any(not isinstance(unit, LocalSE) for unit in gated_units(model).values())


def _split(name: str) -> tuple[str, str]:
    """The place of a gate, its own where it is in no block, and its name there, without the number of its call."""
    place, _, own = name.partition('#')[0].rpartition('.')
    return place or own, own


def _by_place(names: Any) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(_split(name)[0], []).append(name)
    return places


def _common_places(places: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """The places that all have, in the order of the first."""
    first = next(iter(places.values()))
    common = [place for place in first if all(place in others for others in places.values())]
    if not common:
        listed = '; '.join(f'{label}: {", ".join(own) or "none"}' for label, own in places.items())
        raise ValueError(
            f'The models have no place with a gate in common: {listed}. Expected models with the same blocks, such as '
            f'resnet50, seresnet50 and atac_resnet50.'
        )
    return common


def _data_config(model: nn.Module, img_size: ImgSize) -> dict[str, Any]:
    """How timm prepares an image for the validation of a model."""
    channels, *size = input_size(model)
    if channels not in (1, 3):
        raise ValueError(
            f'{type(model).__name__} takes images of {channels} channels: expected 1 (grey) or 3 (RGB). For others '
            f'call gate_maps with a tensor (B, {channels}, H, W), then plot_gates with a picture to draw over.'
        )
    if img_size is not None:
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    config = resolve_model_data_config(model, args={'input_size': (channels, *size)})
    for name in ('mean', 'std'):
        if len(config[name]) != channels:  # timm's are those of RGB
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def _prepared(image: Image.Image, config: Mapping[str, Any]) -> torch.Tensor:
    """An image as a model takes it, (C, H, W)."""
    transform: Callable[[Image.Image], Any] = create_transform(**config, is_training=False)
    return transform(image.convert('L' if config['input_size'][0] == 1 else 'RGB'))


def _seen(x: torch.Tensor, config: Mapping[str, Any]) -> np.ndarray:
    """What a model takes as a picture again, (H, W, C) from 0 to 1."""
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
    return (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()

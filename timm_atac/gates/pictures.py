"""Pictures of the gates of one model, or of several, on an image. It is public as `timm_atac.viz`.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from .._timm import input_size
from ..units.atac import LocalSE
from ..utils.words import counted
from .gate import CHANNEL_ATTENTION, activation_types
from .maps import (
    GatesError,
    ModuleTypes,
    check_model,
    gate_maps,
    gate_maps_and_block_ends,
    gated_units,
    modules_of_types,
)
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


def __dir__() -> list[str]:
    return __all__


def gates_picture(
    model: nn.Module,
    image: Image.Image,
    path: str | os.PathLike[str],
    title: str | None = None,
    img_size: ImgSize = None,
) -> dict[str, torch.Tensor]:
    """Run a model on an image, and draw its gates over the image.

    The image is resized, cropped and normalised as timm does it for validation.

    Args:
        model: A model as in `gate_maps`, for images of one channel or three.
        image: Image of any size and mode. It is converted to grey for a model of one channel, else to RGB.
        path: As in `plot_gates`.
        title: As in `plot_gates`.
        img_size: Height and width of the model's input, None for the size that the model was created for.

    Returns:
        The gates, as from `gate_maps`, with B = 1.

    Raises:
        GatesError: As `gate_maps`; the model takes images of another number of channels.
        ImportError: matplotlib is not installed.
    """
    check_model(model)
    config = _data_config(model, img_size)
    x = _to_input(image, config)
    gates = gate_maps(model, x[None])
    plot_gates(gates, _to_image(x, config), path, title)
    return gates


def compare_picture(
    models: Mapping[str, nn.Module],
    image: Image.Image,
    path: str | os.PathLike[str],
    title: str | None = None,
    img_size: ImgSize = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Run several models on one image, and draw their gates side by side: a column per model, a row per block.

    A model's units (ATAC, SEActivation, LocalSE, XUnit) are drawn if it has any with a gate, else its SE or
    Gather-Excite modules if it has any, else its activations, such as ReLU.

    A row is a block that all models have. The block of a gate is its parent module, such as 'layer3.0'; a gate without
    a parent is a block of its own, such as 'act1'. If a block has several gates, one of them is drawn. The first model
    whose units replace activations (units other than LocalSE) determines its name: the last gate of that model in the
    block, such as 'act2'. A model without a gate of that name has its last one drawn, but not the one whose output is
    the output of the block. In a residual block that is the activation after the addition.

    Args:
        models: Two or more models, by the titles of their columns. All take images of the same size, of one channel or
            three.
        image: Image of any size and mode. It is resized and cropped as for the first model, and normalised for each.
        path: As in `plot_comparison`.
        title: As in `plot_comparison`.
        img_size: Height and width of the models' input, None for the size that they were created for.

    Returns:
        For each model its drawn gates from top to bottom, by the names of their modules, as from `gate_maps`, with
        B = 1.

    Raises:
        GatesError: There are fewer than two models, they have no block in common, or they take images of different
            sizes or channels.
        ImportError: matplotlib is not installed.

    Source:
        Section III of the paper: all of these are gates, which depend on different things.
    """
    check_comparable(models, img_size)
    configs = {label: _data_config(model, img_size) for label, model in models.items()}
    first = next(iter(configs.values()))
    recorded = {}
    for label, model in models.items():
        x = _to_input(image, {**first, 'mean': configs[label]['mean'], 'std': configs[label]['std']})
        recorded[label] = gate_maps_and_block_ends(model, x[None], _compared_types(model))
    chosen = _choose(models, recorded)
    gates = {label: {name: recorded[label][0][name] for name in names} for label, names in chosen.items()}
    plot_comparison(gates, _to_image(_to_input(image, first), first), path, title)
    return gates


def check_comparable(models: Mapping[str, nn.Module], img_size: ImgSize = None) -> None:
    """Check, without running the models, that `compare_picture` can draw them.

    Args:
        models: As in `compare_picture`, on any device, 'meta' included.
        img_size: As in `compare_picture`.

    Raises:
        GatesError: As in `compare_picture`.
    """
    if not isinstance(models, Mapping):
        raise TypeError(
            f"models is a {type(models).__name__}: expected a mapping label -> model, such as {{'ReLU': model_1, "
            f"'ATAC': model_2}}."
        )
    for label, model in models.items():
        check_model(model, f'models[{label!r}]')
    if len(models) < 2:
        raise GatesError(f'{counted(len(models), "model")}: expected at least two to compare; gates_picture draws one.')
    sizes = {label: _data_config(model, img_size)['input_size'] for label, model in models.items()}
    if len(set(sizes.values())) > 1:
        listed = ', '.join(f'{label} {"x".join(map(str, size))}' for label, size in sizes.items())
        raise GatesError(
            f'The models take different images: {listed}. Expected the same channels and size. '
            f'`compare_picture(..., img_size=)` sets the size for models that take any.'
        )
    modules = {label: modules_of_types(model, _compared_types(model)) for label, model in models.items()}
    _common_blocks({label: _by_block(names) for label, names in modules.items()})


def _compared_types(model: nn.Module) -> ModuleTypes:
    """Return the types of the modules that are compared; None stands for the units."""
    if gated_units(model):
        return None
    return CHANNEL_ATTENTION if modules_of_types(model, CHANNEL_ATTENTION) else activation_types()


def _choose(
    models: Mapping[str, nn.Module], recorded: Mapping[str, tuple[Mapping[str, torch.Tensor], frozenset[str]]]
) -> dict[str, list[str]]:
    """Return for each model the name of one gate in each common block.

    Args:
        models: Models by label.
        recorded: For each label what `gate_maps_and_block_ends` returns.
    """
    blocks = {label: _by_block(gates) for label, (gates, _) in recorded.items()}
    common = _common_blocks(blocks)
    leader = next((label for label, model in models.items() if _has_activation_units(model)), None)
    preferred = {block: _split(names[-1])[1] for block, names in blocks[leader].items()} if leader is not None else {}
    chosen: dict[str, list[str]] = {label: [] for label in models}
    for label, (_, block_ends) in recorded.items():
        for block in common:
            names = blocks[label][block]
            same = [name for name in names if _split(name)[1] == preferred.get(block)]
            inside = [name for name in names if name not in block_ends]
            chosen[label].append((same or inside or names)[-1])
    return chosen


def _has_activation_units(model: nn.Module) -> bool:
    """Return True if units replace activations of the model; LocalSE is an attention module."""
    return any(not isinstance(unit, LocalSE) for unit in gated_units(model).values())


def _split(name: str) -> tuple[str, str]:
    """Return the block of a gate and its name in there. The number of the call ('#2') is dropped."""
    block, _, child = name.partition('#')[0].rpartition('.')
    return block or child, child


def _by_block(names: Iterable[str]) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_split(name)[0], []).append(name)
    return blocks


def _common_blocks(blocks: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """Return the blocks that all models have, in the order of the first model."""
    first = next(iter(blocks.values()))
    common = [block for block in first if all(block in others for others in blocks.values())]
    if not common:
        listed = '; '.join(f'{label}: {", ".join(own) or "none"}' for label, own in blocks.items())
        raise GatesError(
            f'The models have no block with a gate in common: {listed}. Expected models with the same blocks, such as '
            f'resnet50, seresnet50 and atac_resnet50.'
        )
    return common


def _data_config(model: nn.Module, img_size: ImgSize) -> dict[str, Any]:
    """Return timm's configuration of the image transforms for the validation of a model."""
    channels, *size = input_size(model)
    if channels not in (1, 3):
        raise GatesError(
            f'{type(model).__name__} takes images of {channels} channels: expected 1 (grey) or 3 (RGB). For others, '
            f'call gate_maps with a tensor (B, {channels}, H, W), then plot_gates with an image to draw over.'
        )
    if img_size is not None:
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    config = resolve_model_data_config(model, args={'input_size': (channels, *size)})
    for name in ('mean', 'std'):
        if len(config[name]) != channels:  # timm's default has three
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def _to_input(image: Image.Image, config: Mapping[str, Any]) -> torch.Tensor:
    """Return an image as the input of a model, (C, H, W)."""
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"image is a {type(image).__name__}: expected a PIL image, such as PIL.Image.open('photo.jpg')."
        )
    transform: Callable[[Image.Image], Any] = create_transform(**config, is_training=False)
    return transform(image.convert('L' if config['input_size'][0] == 1 else 'RGB'))


def _to_image(x: torch.Tensor, config: Mapping[str, Any]) -> np.ndarray:
    """Return the input (C, H, W) of a model as an image (H, W, C) from 0 to 1."""
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
    return (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()

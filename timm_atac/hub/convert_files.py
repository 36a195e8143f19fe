"""Converts the authors' `.params` files into Hub folders and back."""

import inspect
import logging
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import constants
from timm.layers import get_act_layer
from timm.models import get_arch_pretrained_cfgs, is_model, model_entrypoint

from .._files import check_free
from ..units.names import ACTIVATIONS
from ..utils.words import counted, did_you_mean, one_line
from ..weights.convert import ConversionError, array_shapes, to_arrays, to_state_dict
from ..weights.folder import load_folder
from ..weights.identity import record_source, tensor_hash
from ..weights.params import read_params, write_params
from ..weights.pretrained import check_published
from ..weights.published import PUBLISHED
from .export import export

__all__ = ['ModelError', 'check_names', 'create_model', 'folder_to_params', 'params_to_folder']

_logger = logging.getLogger(__name__)

_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError)
# names that timm has, for suggestions; `get_act_layer` decides
_ACTS = (
    'relu relu6 leaky_relu prelu elu celu selu gelu gelu_tanh quick_gelu silu swish mish sigmoid tanh hard_sigmoid '
    'hard_swish hard_mish'
).split()


class ModelError(ValueError):
    """A model cannot be created: its name or an argument is wrong, or its weights cannot be loaded."""


def params_to_folder(
    path: str | Path,
    folder: str | Path,
    name: str,
    model_args: Mapping[str, Any] | None = None,
    image: Any = None,
) -> None:
    """Convert a `.params` file of the authors' networks into a folder as `timm_atac.hub.export.export` writes it.

    Args:
        path: The file.
        folder: The new folder. After an error it does not exist.
        name: ARCH or ARCH.TAG. A registered tag sets the number of classes and the preprocessing. If the tag stands for
            a published file, `path` must be that file.
        model_args: Arguments of `create_model` that the network was trained with.
        image: PIL image for the picture of the gates. None means matplotlib's sample.

    Raises:
        ModelError: `name` is not one of the authors' networks, or the network does not take `model_args`.
        ConversionError: The file is not the published one, or has other arrays than the network.
        ParamsError: The file is not a valid `.params` file.
        FileExistsError: `folder` exists and is not empty.
    """
    check_free(Path(folder))
    architecture, _, tag = name.partition('.')
    known = timm.list_models(module=['atac_resnet', 'cifar_resnet'])
    if architecture not in known:
        similar = get_close_matches(architecture, known, n=2) or known
        raise ModelError(f"{architecture!r} is not one of the authors' networks; expected {' or '.join(similar)}.")
    authors = sorted(known for known, published in PUBLISHED.items() if published.git_blob)
    if name in authors:
        _logger.info('Checking the git blob id of %s', path)
        try:
            check_published(path, name)
        except ValueError as error:
            raise ConversionError(str(error)) from None
    elif name in PUBLISHED:
        raise ModelError(f'the tag {tag!r} belongs to the weights in this package; give another tag, or none.')
    elif tag in {published.partition('.')[2] for published in authors}:
        raise ModelError(f'the tag {tag!r} belongs to {" and ".join(authors)}; give another tag, or none.')
    arrays = read_params(path)
    size = sum(array.nbytes for array in arrays.values())
    _logger.info('Read %s: %s, %.1f MB', path, counted(len(arrays), 'array'), size / 1e6)
    model = create_model(architecture, **_cfg_args(name), **(model_args or {}))
    try:
        state_dict = to_state_dict(arrays, model)
    except ConversionError as error:
        if fitting := _fitting_networks(arrays, known):
            raise ConversionError(f'{error}\nThe arrays fit another network: give {" or ".join(fitting)}.') from None
        raise
    model.load_state_dict(state_dict)
    if name in authors:
        record_source(model, name, tensor_hash(state_dict))
    _logger.info('Writing %s: weights, config, picture and card', folder)
    facts = None  # those that are known of published weights
    if name not in authors:
        facts = {'description': f'{architecture}, converted from the MXNet file {Path(path).name}.'}
        facts |= {'name': name} if tag else {}
    export(model, folder, facts, image, model_args)


def _cfg_args(name: str) -> dict[str, Any]:
    """Return arguments of `create_model` for the pretrained cfg; the cfg of an unregistered tag names no origin."""
    tag = name.partition('.')[2]
    if name in get_arch_pretrained_cfgs(name) and tag != 'untrained':
        return {'pretrained_cfg': tag}
    return {'pretrained_cfg_overlay': {'tag': tag or None, **dict.fromkeys(('license', 'description', 'origin_url'))}}


def folder_to_params(folder: str | Path, path: str | Path) -> None:
    """Convert a folder into a `.params` file of float32 arrays for MXNet's `load_parameters`.

    Args:
        folder: Folder in timm's Hub format with one of the authors' networks.
        path: The new file. After an error it does not exist.

    Raises:
        FileExistsError: `path` exists.
        ValueError: The folder is incomplete or damaged (`FolderError`), or the authors' networks have no counterpart of
            a part of the model.
    """
    check_free(Path(path))
    write_params(path, to_arrays(load_folder(folder)))


def _fitting_networks(arrays: Mapping[str, np.ndarray], known: list[str]) -> list[str]:
    """Return for each network whose arrays have these names and shapes the arguments of `timm-atac convert`."""
    shapes = {name: array.shape for name, array in arrays.items()}
    is_cifar = 'features.1.weight' in shapes
    first, last = ('features.1.weight', 'output.bias') if is_cifar else ('conv1.weight', 'fc.bias')
    if len(shapes.get(first, ())) != 4 or len(shapes.get(last, ())) != 1:
        return []
    chans, classes = shapes[first][1], shapes[last][0]
    fitting = []
    for name in known:
        if ('cifar' in name) != is_cifar:
            continue
        model: Any = timm.create_model(name, device='meta')
        if array_shapes(model, chans, classes) == shapes:
            given = [f'in_chans={chans}'] * (chans != 3) + [f'num_classes={classes}'] * (classes != model.num_classes)
            fitting.append(f'--model {name}' + ' --model-kwargs ' * bool(given) + ' '.join(given))
    return fitting


def check_names(names: list[str]) -> None:
    """Check that timm knows models and tags by these names. Those with a colon, such as 'hf-hub:', are not checked.

    Raises:
        ModelError: timm does not know one; the message suggests a similar one.
    """
    for name in names:
        architecture, _, tag = name.partition('.')
        if ':' in name:
            continue
        if not is_model(architecture):
            hint = did_you_mean(architecture, timm.list_models()) or 'see `timm-atac list`.'
            raise ModelError(f'timm has no model {architecture!r}; {hint}')
        tags = [full.partition('.')[2] for full in get_arch_pretrained_cfgs(architecture)]
        if tag and tag not in tags:
            hint = did_you_mean(tag, tags) or f'it has {", ".join(filter(None, tags)) or "none"}.'
            raise ModelError(f'{architecture} has no tag {tag!r}; {hint}')


def create_model(name: str, **kwargs: Any) -> Any:
    """Call `timm.create_model` with a name and arguments that a user has given.

    Raises:
        ModelError: The model cannot be created: timm does not know the name, the model does not take an argument, it
            has no weights, or they cannot be loaded.
    """
    check_names([name])
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # a wrong argument can raise any exception
        given = {key: value for key, value in kwargs.items() if key not in ('pretrained', 'device', 'dtype')}
        if isinstance(error, _FAULTS) and not given:
            raise  # no argument of the user explains it
        raise ModelError(f'{name} cannot be created: {_reason(error, name, given)}') from error


def _reason(error: Exception, name: str, kwargs: Mapping[str, Any]) -> str:
    """Return in one line why a model cannot be created, and what to do."""
    for key, value in kwargs.items():
        if key.endswith('act_layer') and isinstance(value, str) and not _is_act(value):
            hint = did_you_mean(value, [*ACTIVATIONS, *filter(_is_act, _ACTS)])
            return f'{key}={value!r} is not an activation of timm; {hint or "expected a name such as relu or atac."}'
        if isinstance(error, KeyError) and error.args[:1] == (value,):
            return f'{key}={value!r} is not a name that timm knows.'
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and unknown:
        hint = did_you_mean(unknown[2], _parameters(name, unknown[1]))
        return f'{unknown[1]} has no argument {unknown[2]!r}{f"; {hint}" if hint else "."}'
    if isinstance(error, OSError) and error.filename is not None:
        return _file_reason(error)
    return one_line(error)


def _is_act(name: str) -> bool:
    try:
        return get_act_layer(name) is not None
    except KeyError:
        return False


def _parameters(name: str, class_name: str) -> list[str]:
    """Return the names of the arguments of a class in the module of a model."""
    if ':' in name:
        return []
    cls = getattr(inspect.getmodule(model_entrypoint(name)), class_name, None)
    return [] if cls is None else list(inspect.signature(cls).parameters)


def _file_reason(error: OSError) -> str:
    """Return the reason for an error of a file. For a cache of weights it says which setting names the folder."""
    path = Path(error.filename).absolute()
    reason = f'{path}: {(error.strerror or str(error)).lower()}'
    for setting, folder in (('TORCH_HOME', Path(torch.hub.get_dir()).parent), ('HF_HOME', Path(constants.HF_HOME))):
        if folder == path or folder in path.parents or path in folder.parents:
            return f'the cache {folder} cannot be used ({reason}); set {setting} to a folder that can be written.'
    return f'{reason}.'

"""Saves and loads a network as a folder in timm's Hub format: `config.json` and `model.safetensors`."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
from timm.models import is_model, save_for_hf

from .. import _timm

__all__ = ['CONFIG', 'RESERVED', 'WEIGHTS', 'FolderError', 'load_folder', 'read_config', 'save_folder']

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
RESERVED = frozenset(
    {'model_name', 'pretrained', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'}
)
"""Arguments of `timm.create_model` that load files and are not arguments of the network itself."""


class FolderError(ValueError):
    """The folder does not hold a complete network of timm; the message names the file and says what is wrong."""


def save_folder(
    model: Any,
    folder: str | Path,
    model_args: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` and transformers load.

    timm's `save_for_hf` writes it. Then `model_args` in `config.json` is reduced to the arguments that were given,
    without `num_classes`, which transformers refuses there.

    Args:
        model: A network made by `timm.create_model`.
        folder: The folder. It is created if it does not exist.
        model_args: Arguments of `create_model` that the network was made with; since 1.0.31 timm keeps them itself.
        model_config: More entries of `config.json`: `label_names`, or a `pretrained_cfg` that overrides the network's.
    """
    save_for_hf(
        _contiguous(model),
        str(folder),
        model_config=dict(model_config or {}),
        model_args=dict(model_args) if model_args else None,
        safe_serialization=True,
    )
    path = Path(folder) / CONFIG
    config = json.loads(path.read_text())
    # timm also writes arguments that were not given; of the given ones take what timm wrote (tuples are lists)
    written = config.pop('model_args', {})
    given = {name: written[name] for name in (*_timm.model_args(model), *(model_args or {})) if name in written}
    given.pop('num_classes', None)
    if given:
        config['model_args'] = given
    _correct_pretrained_cfg(model, config)
    path.write_text(json.dumps(config, indent=2) + '\n')


def _contiguous(model: Any) -> Any:
    """Return the model, or a copy if it has channels_last or transposed weights, which safetensors does not write."""
    if all(tensor.is_contiguous() for tensor in model.state_dict().values()):
        return model
    model = copy.deepcopy(model)
    model.load_state_dict({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, assign=True)
    return model


def _correct_pretrained_cfg(model: Any, config: dict[str, Any]) -> None:
    """Make `pretrained_cfg` describe the weights in the folder; before 1.0.31 timm writes the source's."""
    cfg = config['pretrained_cfg']
    cfg['custom_load'] = False
    cfg['num_classes'] = config['num_classes'] = model.num_classes
    channels = cfg['input_size'][0] = _timm.input_size(model)[0]
    if channels not in (1, 3):
        cfg['first_conv'] = None  # or timm before 1.0.31 would load this layer with random numbers
    for key in ('mean', 'std'):
        if len(cfg[key]) != channels:
            cfg[key] = [sum(cfg[key]) / len(cfg[key])] * channels
    if config['architecture'] == 'atac_host':  # these fields are the host's and not true of this network
        for key in ('tag', 'license', 'description', 'origin_url', 'paper_ids', 'paper_name', 'notes'):
            cfg.pop(key, None)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check `config.json` of a folder.

    Raises:
        FolderError: The file is missing or not JSON, timm does not know the architecture, or arguments in it would load
            other files.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FolderError(
            f"{folder} has no {CONFIG}: expected a folder that `timm-atac convert` or timm's save_for_hf has written."
        ) from None
    except (ValueError, OSError) as error:
        raise FolderError(f'{path} cannot be read: {error}') from None
    architecture = config.get('architecture') if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not is_model(architecture):
        raise FolderError(
            f'{path}: the architecture is {architecture!r}, which timm {timm.__version__} with timm_atac does not know.'
        )
    for key, default in (('pretrained_cfg', None), ('model_args', {})):
        if not isinstance(config.get(key, default), dict):
            raise FolderError(f'{path}: {key} is {config.get(key)!r}, expected an object.')
    if loading := _loading_arguments(config.get('model_args', {})):
        raise FolderError(f'{path}: model_args has {", ".join(loading)}, which would load other files.')
    return config


def _loading_arguments(args: Mapping[str, Any]) -> list[str]:
    """Return the arguments of a network, and of the host of an `atac_host`, that would load other files."""
    loading = sorted(RESERVED.intersection(args))
    host = args.get('host')  # the name of a model, or a dict of `model_name` and its arguments
    if isinstance(host, dict):
        loading += _loading_arguments({name: value for name, value in host.items() if name != 'model_name'})
        host = host.get('model_name')
    if host is not None and not is_model(str(host).partition('.')[0]):
        loading.append(f'the host {host!r}')
    return loading


def create_from_config(config: Mapping[str, Any], **kwargs: Any) -> Any:
    """Create the network that a `config.json` describes, without loading weights.

    Args:
        config: As `read_config` returns it.
        **kwargs: More arguments of `timm.create_model`, such as `device`.
    """
    cfg = dict(config.get('pretrained_cfg', {}))
    cfg |= {key: config[key] for key in ('architecture', 'num_classes') if key in config}
    return timm.create_model(config['architecture'], pretrained_cfg=cfg, **config.get('model_args', {}), **kwargs)


def load_folder(folder: str | Path) -> Any:
    """Load the network of a folder with its weights, in inference mode.

    Raises:
        FolderError: A file is missing or damaged, or a tensor is missing or does not fit.
    """
    config = read_config(folder)
    path = Path(folder) / WEIGHTS
    try:
        model = create_from_config(config)
    except Exception as error:
        raise FolderError(f'{Path(folder) / CONFIG} describes a model that cannot be created: {error}') from error
    try:
        state_dict = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise FolderError(f'{folder} has no {WEIGHTS}.') from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FolderError(f'{path} is damaged: {error}. Write it again, or download it again.') from error
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise FolderError(f'{path} does not fit {CONFIG}: {error}') from error
    return model.eval()

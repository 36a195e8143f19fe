"""Saves and loads a network as a folder in timm's Hub format: `config.json` and `model.safetensors`."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import is_model

from .. import _timm
from .file_kinds import HEAD, describe
from .identity import Identity, identify, remove_claims, tensor_hash
from .mismatch import differences

__all__ = [
    'CONFIG',
    'RESERVED',
    'WEIGHTS',
    'FolderError',
    'dump_config',
    'identify_folder',
    'load_folder',
    'mend_config',
    'read_config',
    'save_for_hf',
]

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
RESERVED = frozenset(
    {'model_name', 'pretrained', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'}
)
"""Arguments of `timm.create_model` that load files and are not arguments of the network itself."""


class FolderError(ValueError):
    """The folder does not hold a complete network of timm; the message names the file and says what is wrong."""


def save_for_hf(
    model: Any,
    save_directory: str | Path,
    model_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors` in a folder that timm and transformers load.

    timm loads it by `timm.create_model('local-dir:FOLDER', pretrained=True)`, transformers by
    `pipeline('image-classification', model='FOLDER')`. timm's `save_for_hf` writes the files. Then `config.json` is
    corrected as `mend_config` says, and its `model_args` is reduced to the arguments that were given.

    Args:
        model: A network made by `timm.create_model`, with any memory format of its weights.
        save_directory: The folder. It is created if it does not exist.
        model_config: More entries of `config.json`: `label_names`, or a `pretrained_cfg` that overrides the network's.
        model_args: Arguments of `create_model` that the network was made with. Since 1.0.31 timm keeps them itself.
            Before, those of `atac_host` and `replace_activations` are known.
    """
    if not _timm.keeps_args():
        model_args = {**_timm.model_args(model), **(model_args or {})}
    timm.models.save_for_hf(
        _contiguous(model),
        str(save_directory),
        model_config=dict(model_config or {}),
        model_args=dict(model_args) if model_args else None,
        safe_serialization=True,
    )
    path = Path(save_directory) / CONFIG
    config = json.loads(path.read_text())
    # timm also writes arguments that were not given; of the given ones take what timm wrote (tuples are lists)
    written = config.pop('model_args', {})
    given = {name: written[name] for name in (*_timm.model_args(model), *(model_args or {})) if name in written}
    if given:
        config['model_args'] = given
    config = mend_config(config, model)
    path.write_text(dump_config(config))


def _contiguous(model: Any) -> Any:
    """Return the model, or a copy if it has channels_last or transposed weights, which safetensors does not write."""
    if all(tensor.is_contiguous() for tensor in model.state_dict().values()):
        return model
    model = copy.deepcopy(model)
    model.load_state_dict({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, assign=True)
    return model


def mend_config(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return a `config.json` that timm and transformers load, and that describes the weights of the model.

    - `model_args` has no `num_classes`: transformers 5 ends with a KeyError there.
    - `pretrained_cfg` has the classes and channels of the model; timm before 1.0.31 writes those of the source.
    - `label_names` is at the top, where transformers reads it, and is left out if the model has other classes.
    - What timm's registry says of other weights is left out, see `timm_atac.weights.identity`.

    Args:
        config: The file as timm's `save_for_hf` writes it.
        model: The network with its weights.
    """
    config = {**config, 'num_classes': model.num_classes}
    args = {name: value for name, value in config.pop('model_args', {}).items() if name != 'num_classes'}
    if args:
        config['model_args'] = args
    config = remove_claims(config, identify(config, tensor_hash(model.state_dict())))
    cfg = config['pretrained_cfg']
    cfg['custom_load'] = False
    cfg['num_classes'] = model.num_classes
    names = cfg.pop('label_names', None)
    if names and len(names) == model.num_classes:
        config.setdefault('label_names', list(names))
    channels, *sides = _timm.input_size(model)
    cfg['input_size'] = [channels, *cfg.get('input_size', (0, *sides))[1:]]
    if channels not in (1, 3):
        cfg['first_conv'] = None  # or timm before 1.0.31 would load this layer with random numbers
    for key in ('mean', 'std'):
        if key in cfg and len(cfg[key]) != channels:
            cfg[key] = [sum(cfg[key]) / len(cfg[key])] * channels
    return config


def dump_config(config: Mapping[str, Any]) -> str:
    """Return the text of a `config.json`."""
    return json.dumps(config, indent=2) + '\n'


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


def identify_folder(folder: str | Path) -> Identity:
    """Return what is known of the weights in a folder.

    Raises:
        FolderError: A file is missing or damaged.
    """
    return identify(read_config(folder), tensor_hash(_read_weights(folder)))


def load_folder(folder: str | Path) -> Any:
    """Load the network of a folder with its weights, in inference mode.

    Raises:
        FolderError: A file is missing or damaged, or a tensor is missing or does not fit.
    """
    config = read_config(folder)
    try:
        model = create_from_config(config)
    except Exception as error:
        raise FolderError(f'{Path(folder) / CONFIG} describes a model that cannot be created: {error}') from error
    state_dict = _read_weights(folder)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        found, own = ({key: t.shape for key, t in tensors.items()} for tensors in (state_dict, model.state_dict()))
        reason = differences(found, own) or error
        raise FolderError(f'{Path(folder) / WEIGHTS} does not fit {CONFIG}: {reason}.') from error
    return model.eval()


def _read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    path = Path(folder) / WEIGHTS
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise FolderError(f'{folder} has no {WEIGHTS}.') from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if kind := _kind_of(path):
            raise FolderError(f'{path} is not a safetensors file. It is {kind}.') from error
        raise FolderError(f'{path} is damaged: {error}. Write it again, or download it again.') from error


def _kind_of(path: Path) -> str | None:
    try:
        with open(path, 'rb') as file:
            head = file.read(HEAD)
    except OSError:
        return None
    return None if head[8:9] == b'{' else describe(head)

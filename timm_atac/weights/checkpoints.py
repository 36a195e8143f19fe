"""`.params` files as checkpoints: for timm's `checkpoint_path`, and for options of its scripts."""

import os
from typing import Any

__all__ = ['is_params_file', 'load_checkpoint', 'reads_checkpoint']


def is_params_file(path: Any) -> bool:
    """True if this is the path of a file that begins like a `.params` file. False if it cannot be read."""
    from .params import is_params

    try:
        return isinstance(path, (str, os.PathLike)) and is_params(path)
    except (OSError, ValueError):  # no such file, a folder, or no path at all
        return False


def reads_checkpoint(model: Any, path: Any) -> bool:
    """True if the network can load the authors' files, and the path is that of a `.params` file."""
    return hasattr(type(model), 'open_atac_layout') and is_params_file(path)


def load_checkpoint(model: Any, path: str | os.PathLike[str]) -> None:
    """Load a `.params` file as timm loads a checkpoint: it must fit the network as it is, and may be any such file.

    Raises:
        ValueError: The file is not a valid `.params` file (`ParamsError`), or its arrays do not fit the network
            (`ConversionError`). The model has not changed.
    """
    from .convert import to_state_dict
    from .params import read_params

    model.load_state_dict(to_state_dict(read_params(path), model))

"""Registration with timm. It runs when `timm.models` has been imported, once for each timm that a process imports."""

import re
from importlib import import_module
from typing import Any

MIN_TIMM = '1.0.21'  # pyproject.toml has the same version; a test compares them
# modules of timm_atac.models with `default_cfgs`; timm lists models by these names
MODULES = ('atac_resnet', 'cifar_resnet', 'atac_host', 'ge_resnet', 'aa_resnet', 'fa_resnet')
# An NFNet divides by the standard deviation of an activation's output. For z standard normal:
GATED = 1.8462285453386054  # 1 / sqrt(E[sigmoid(z)^2]), the gain of x * sigmoid(BN(...))
GAUSSIAN = 1.4953487812212205  # 1 / sqrt(E[exp(-2 z^2)]) = 5^(1/4), the gain of x * exp(-BN(...)^2)


def register() -> None:
    """Register the networks and the activations of this package with timm.

    All names are checked before the first is registered. A second call registers what is missing. What this package
    has registered before it was removed from `sys.modules` and imported again is replaced.

    Raises:
        RuntimeError: timm is older than `MIN_TIMM`, or another package has registered one of the names.
        Exception: Whatever the import of this package's modules raises.
    """
    from timm.version import __version__

    if _release(__version__) < _release(MIN_TIMM):
        raise RuntimeError(f'timm {__version__} is older than {MIN_TIMM}')

    from timm.models import is_model, model_entrypoint, register_model

    from . import _timm
    from .units.names import ACTIVATIONS as activations
    from .units.names import ACTIVATIONS_ME as activations_me
    from .weights import checkpoints

    gains = {'atac': GATED, 'se_act': GATED, 'nin': 1.0, 'xunit': GAUSSIAN}  # NiN ends with a BN
    modules = [import_module(f'{__package__}.models.{name}') for name in MODULES]
    networks = {name: getattr(module, name) for module in modules for name in module.default_cfgs}

    taken = [
        f'activation {name!r}'
        for name, act in activations.items()
        if not {_path(a) for a in _timm.acts(name)} <= {_path(act), _path(activations_me.get(name))}
    ]
    registered = {name: model_entrypoint(name) for name in networks if is_model(name)}
    taken += [f'model {name!r}' for name, fn in registered.items() if _path(fn) != _path(networks[name])]
    if taken:
        raise RuntimeError(f'{", ".join(taken)} is registered by another package already')
    for name, entry_function in networks.items():
        if registered.get(name) is not entry_function:
            _timm.remove_model(name)
            register_model(entry_function)
    for name, layer in activations.items():
        gain = next(gain for unit, gain in gains.items() if name.startswith(unit))  # it may end with a norm
        _timm.add_act(name, layer, activations_me.get(name), gain)
    _timm.add_checkpoint_format(checkpoints.reads_checkpoint, checkpoints.load_checkpoint)


def _path(obj: Any) -> tuple[str, str]:
    """Where a class or function is defined. It stays the same when the module is imported again."""
    obj = getattr(obj, 'func', obj)  # of a partial
    return (getattr(obj, '__module__', ''), getattr(obj, '__qualname__', ''))


def _release(version: str) -> tuple[int, ...]:
    """The three numbers of a version: '1.0.21.dev0' -> (1, 0, 21)."""
    return tuple(int(number) for number in re.findall(r'\d+', version)[:3])

"""Registration with timm: what runs once `timm.models` has loaded."""

import re
from importlib import import_module

MIN_TIMM = '1.0.21'  # pyproject.toml says the same; a test compares
# of the networks; timm lists models by these names
MODULES = ('atac_resnet', 'cifar_resnet', 'atac_host', 'ge_resnet', 'aa_resnet', 'fa_resnet')
GAUSSIAN = 1.4953487812212205  # 1 / sqrt(E[exp(-2 z^2)]) = 5^(1/4): the gain of x * exp(-BN(...)^2)
GATED = 1.8462285453386054  # 1 / sqrt(E[sigmoid(z)^2]), z standard normal: the gain of x * sigmoid(BN(...))


def register() -> None:
    """Make the networks and activations of this package known to timm: all of them or, with an error, none.

    The modules of the networks only define their entry functions, so that importing one changes nothing in timm.

    Raises:
        RuntimeError: timm is older than `MIN_TIMM`, or a name is taken.
        Exception: Whatever importing the package's modules raises.
    """
    from timm.version import __version__

    if _release(__version__) < _release(MIN_TIMM):
        raise RuntimeError(f'timm {__version__} is older than {MIN_TIMM}')

    from timm.models import is_model, model_entrypoint, register_model

    from . import _timm
    from .units.atac import ACTIVATIONS as activations
    from .units.memory_efficient import ACTIVATIONS_ME as lean

    gains = {'atac': GATED, 'se_act': GATED, 'nin': 1.0, 'xunit': GAUSSIAN}  # NiN ends with a BN
    modules = [import_module(f'{__package__}.models.{name}') for name in MODULES]
    networks = {name: getattr(module, name) for module in modules for name in module.default_cfgs}

    taken = [f'activation {name!r}' for name, act in activations.items() if _timm.acts(name) - {act, lean.get(name)}]
    taken += [f'model {name!r}' for name, fn in networks.items() if is_model(name) and model_entrypoint(name) is not fn]
    if taken:
        raise RuntimeError(f'{", ".join(taken)} is taken by somebody else')
    try:
        for entry_function in networks.values():
            if not is_model(entry_function.__name__):
                register_model(entry_function)
        for name, layer in activations.items():
            _timm.add_act(name, layer, lean.get(name), gains[name])
    except BaseException:
        _timm.forget(
            networks=networks,
            modules=MODULES,
            activations=activations,
        )
        raise


def _release(version: str) -> tuple[int, ...]:
    """The three numbers of a version: '1.0.21.dev0' -> (1, 0, 21)."""
    return tuple(int(number) for number in re.findall(r'\d+', version)[:3])

"""timm_atac: the ATAC networks of "Attention as Activation" in timm. The public names are loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._autoload import arm as _arm

if TYPE_CHECKING:
    from .gates import pictures as viz
    from .gates.gate import gate
    from .inference.fuse import fuse
    from .kernels.switch import use_kernels
    from .models.atac_resnet import AtacResNet
    from .models.cifar_resnet import CifarResNet
    from .replace.activations import replace_activations
    from .units.atac import ATAC, LocalSE, NiN, SEActivation
    from .units.memory_efficient import ATACMe
    from .units.sine import Sine
    from .units.xunit import XUnit
    from .weights.folder import save_for_hf
    from .weights.params import ParamsError, read_params, write_params

__version__ = '0.1.0'

# public name -> the module that defines it; tests/registration/test_package.py compares it with the imports above
_HOMES = {
    'ATAC': 'units.atac',
    'ATACMe': 'units.memory_efficient',
    'AtacResNet': 'models.atac_resnet',
    'CifarResNet': 'models.cifar_resnet',
    'LocalSE': 'units.atac',
    'NiN': 'units.atac',
    'ParamsError': 'weights.params',
    'SEActivation': 'units.atac',
    'Sine': 'units.sine',
    'XUnit': 'units.xunit',
    'fuse': 'inference.fuse',
    'gate': 'gates.gate',
    'read_params': 'weights.params',
    'replace_activations': 'replace.activations',
    'save_for_hf': 'weights.folder',
    'use_kernels': 'kernels.switch',
    'write_params': 'weights.params',
}
__all__ = [*_HOMES, '__version__', 'viz']


def __getattr__(name: str) -> Any:
    if name == 'viz':
        return import_module(f'{__name__}.gates.pictures')
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    _arm()  # in case another finder than the hook has found timm
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_arm()

"""timm_atac: the ATAC networks of "Attention as Activation" in timm. The public names, loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._autoload import arm as _arm

if TYPE_CHECKING:
    from . import viz as viz
    from .atac_resnet import AtacResNet as AtacResNet
    from .cifar_resnet import CifarResNet as CifarResNet
    from .fused import fuse as fuse
    from .gates import Sine as Sine
    from .gates import gate as gate
    from .kernels.switch import use_kernels as use_kernels
    from .layers import ATAC as ATAC
    from .layers import LocalSE as LocalSE
    from .layers import NiN as NiN
    from .layers import SEActivation as SEActivation
    from .lean import ATACMe as ATACMe
    from .replace import replace_activations as replace_activations
    from .weights.params import ParamsError as ParamsError
    from .weights.params import read_params as read_params
    from .weights.params import write_params as write_params
    from .xunit import XUnit as XUnit

__version__ = '0.1.0'

_HOMES = {
    'ATAC': 'layers',
    'ATACMe': 'lean',
    'AtacResNet': 'atac_resnet',
    'CifarResNet': 'cifar_resnet',
    'LocalSE': 'layers',
    'NiN': 'layers',
    'ParamsError': 'weights.params',
    'SEActivation': 'layers',
    'Sine': 'gates',
    'XUnit': 'xunit',
    'fuse': 'fused',
    'gate': 'gates',
    'read_params': 'weights.params',
    'replace_activations': 'replace',
    'use_kernels': 'kernels.switch',
    'write_params': 'weights.params',
}
_MODULES = ('viz',)
__all__ = [*_HOMES, '__version__']


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f'{__name__}.{name}')
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    _arm()  # in case timm came by another way than the hook
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


_arm()

"""Print versions and the state of the registration, for a bug report.

The command says where timm_atac is imported from, whether programs that do not import it get its networks, and whether
the Triton kernels can run. It also works where something is broken, and says what that is. Its exit status is 0 then
too. It downloads and writes nothing, and prints no environment variables but those of timm_atac and of the autoload.

    timm-atac env > env.txt
"""

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlparse

from .. import __version__, _autoload

__all__ = ['add_arguments', 'run']

_AUTOLOAD = 'TORCH_DEVICE_BACKEND_AUTOLOAD'
_ENTRY_POINT = ('torch.backends', 'timm_atac._autoload:arm')
_REQUIRED = ('torch', 'timm', 'huggingface_hub', 'safetensors', 'numpy')
_OPTIONAL = ('torchvision', 'transformers', 'onnx', 'triton', 'matplotlib')

_Rows = Iterator[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(args: argparse.Namespace) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch, timm = _import('torch'), _import('timm')
        sections = {
            'versions': [*_collect(_versions, torch, timm)],
            'registration': [*_collect(_registration, timm)],
            'kernels': [*_collect(_kernels, torch, timm)],
            'environment': [*_collect(_environment)],
        }
    sections['warnings'] = [
        (warning.category.__name__, _line(warning.message))
        for warning in caught
        if not issubclass(warning.category, (DeprecationWarning, PendingDeprecationWarning))
    ]
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    for title, rows in sections.items():
        if rows:
            print(f'{title}:')
        for name, text in rows:
            print(f'  {name:{width}}  {text}')


def _collect(section: Callable[..., _Rows], *args: Any) -> _Rows:
    """Yield the rows of a section. An exception ends it with a row that says which."""
    try:
        yield from section(*args)
    except Exception as error:
        yield 'error', f'this section ended with {_line(error)}'


def _versions(torch: Any, timm: Any) -> _Rows:
    yield 'timm_atac', __version__
    yield 'imported from', _origin()
    yield 'Python', f'{platform.python_version()} ({platform.python_implementation()}), {sys.executable}'
    yield 'platform', platform.platform()
    for name, module in zip(_REQUIRED, (torch, timm, None, None, None), strict=True):
        if isinstance(module, Exception):
            installed = _installed_version(name)
            yield name, f'{f"{installed}, " if installed else ""}cannot be imported: {_line(module)}'
        elif module is None:
            yield name, _installed_version(name) or 'not installed'
        else:
            yield name, str(getattr(module, '__version__', 'of unknown version'))
            if name == 'torch':
                yield 'GPU', _gpus(module)
    for name in _OPTIONAL:
        if installed := _installed_version(name):
            yield name, installed


def _registration(timm: Any) -> _Rows:
    group, value = _ENTRY_POINT
    points = [(d, point) for d in distributions() for point in d.entry_points if point.group == group]
    ours = [f'{d.name} {d.version}' for d, point in points if point.value == value]
    others = sorted({f'{point.name} = {point.value}' for _, point in points if point.value != value})
    found = f'installed, by {" and ".join(dict.fromkeys(ours))}'
    missing = 'missing: timm_atac is not installed, so that programs have to import it'
    yield 'entry point', found if ours else missing
    if others:
        yield 'other entry points', ', '.join(others)
    is_off = os.environ.get(_AUTOLOAD, '1') != '1'  # as PyTorch reads it
    effect = 'off: PyTorch loads no entry points, so that programs have to import timm_atac'
    yield _AUTOLOAD, f'{_value(_AUTOLOAD)}{f" ({effect})" if is_off else ""}'
    disabled = _autoload._disabled()
    variable = 'TIMM_ATAC_DISABLE'
    yield variable, f'{_value(variable)}{" (off: timm_atac does not register)" if disabled else ""}'
    yield 'models in timm', _registered(timm, disabled)


def _registered(timm: Any, disabled: bool) -> str:
    """Say how many of our models and activations timm has, and what may be the reason if it has none."""
    if isinstance(timm, Exception):
        return 'none: timm cannot be imported'
    from .._register import MODULES

    models = timm.list_models(module=list(MODULES))
    if models:
        return f"{len(models)}, {models[0]} to {models[-1]}; act_layer='atac' is {_act_layer()}"
    return f'none: {"TIMM_ATAC_DISABLE is set" if disabled else "the registration failed; see the warnings"}'


def _act_layer() -> str:
    from timm.layers import get_act_layer

    try:
        layer = get_act_layer('atac')
    except Exception as error:  # a KeyError, or another one in other versions of timm
        return f'unknown to timm ({_line(error)})'
    return f'{layer.__module__}.{layer.__qualname__}'


def _kernels(torch: Any, timm: Any) -> _Rows:
    if isinstance(torch, Exception) or isinstance(timm, Exception):
        yield 'can run', f'no: {"torch" if isinstance(torch, Exception) else "timm"} cannot be imported'
        return
    from ..kernels import switch

    choice = switch.current_choice()
    words = {None: 'only where they were measured to be faster', True: 'yes', False: 'no'}
    if isinstance(choice, str):
        yield 'enabled', f'{switch.VARIABLE} has the unknown word {choice!r}: expected 1, 0, or nothing'
    else:
        yield 'enabled', words[choice]
    if not switch.IS_INSTALLED:
        yield 'can run', 'no: they need Triton, and PyTorch 2.7 or newer'
        return
    indices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    able = [index for index in indices if switch.can_run(torch.device('cuda', index))]
    if able:
        yield 'can run', f'yes, on {", ".join(f"cuda:{index}" for index in able)}'
    elif switch.IS_INTERPRETED:
        yield 'can run', "yes, on the CPU by Triton's interpreter (TRITON_INTERPRET)"
    else:
        yield 'can run', "no: they need one of NVIDIA's GPUs of compute capability 8.0 or newer"


def _environment() -> _Rows:
    for name in sorted(os.environ):
        if name.startswith('TIMM_ATAC_'):
            yield name, _value(name)


def _origin() -> str:
    """Return the folder of the imported package, and whether it is the one that is installed."""
    folder = Path(__file__).resolve().parents[1]
    try:
        installed = distribution('timm_atac')
    except PackageNotFoundError:
        return f'{folder} (not installed)'
    editable = _editable_root(installed)
    home = (Path(str(installed.locate_file(''))) if editable is None else editable).resolve()
    kind = 'installed' if editable is None else 'editable install'
    if folder.parent == home:
        return f'{folder} ({kind})'
    return f'{folder} (another copy than the one that is installed: {installed.version}, {kind}, {home})'


def _editable_root(installed: Distribution) -> Path | None:
    """Return the folder of an editable install, None for another one."""
    try:
        source = json.loads(installed.read_text('direct_url.json') or '{}')
        if not source.get('dir_info', {}).get('editable'):
            return None
        path = unquote(urlparse(source['url']).path)
        return Path(path[1:] if os.name == 'nt' else path)  # /C:/folder
    except Exception:
        return None


def _gpus(torch: Any) -> str:
    kind = f'CUDA {torch.version.cuda}' if torch.version.cuda else 'PyTorch without CUDA'
    kind = f'ROCm {torch.version.hip}' if torch.version.hip else kind
    try:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # a driver that does not fit, for example
        return f'{kind}; {_line(error)}'
    return f'{kind}; {", ".join(dict.fromkeys(names)) or "no GPU"}{f" ({len(names)})" if len(names) > 1 else ""}'


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _import(name: str) -> ModuleType | Exception:
    """Return a module, or what its import has raised."""
    try:
        return import_module(name)
    except Exception as error:
        return error


def _value(name: str) -> str:
    return repr(os.environ[name]) if name in os.environ else 'not set'


def _line(error: Any) -> str:
    """Return the message of an exception in one line, with its type unless it is a warning."""
    text = ' '.join(str(error).split())
    return text if isinstance(error, Warning) else f'{type(error).__name__}: {text}'

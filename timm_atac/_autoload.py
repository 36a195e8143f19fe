"""Registers our networks with timm although no program imports us: an import hook waits for `timm.models`.

PyTorch (>= 2.5) calls `arm` at the end of `import torch`, through the entry point group `torch.backends`. `arm` cannot
import timm, because timm itself may be the one that imports torch. So it puts a hook on `sys.meta_path`, which
registers as soon as `timm.models` has been imported, and then removes itself.

Nothing here may break `import torch` or `import timm`. This file imports the standard library only, and every failure
becomes one warning. `TIMM_ATAC_DISABLE=1` switches the registration off.

A module of ours can be the first to import timm. The registration must not run in the middle of it, because it imports
all of them. So each of our packages that needs timm calls `import_timm` in its `__init__.py`, before its modules begin.
"""

import contextlib
import importlib
import os
import sys
import threading
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOST = 'timm.models'
_done = False  # the registration has run, with success or with a warning
_importing: set[int] = set()  # threads in `import_timm`, the last of which registers


def arm() -> None:
    """Register with timm now if `timm.models` has been imported, else when it is imported. Never raises."""
    if _done or _disabled():
        return
    if isinstance(sys.modules.get(_HOST), ModuleType):
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def import_timm() -> None:
    """Import timm and register, unless another thread is in here too: it then registers, when it is done.

    A thread that imports timm itself leaves the registration to those in here. They hold the locks of our modules, so
    the two would wait for each other.
    """
    _importing.add(threading.get_ident())
    try:
        importlib.import_module(_HOST)
    finally:
        _importing.discard(threading.get_ident())
    if not _importing:
        _register()


class _Hook:
    """Finder for `timm.models` that asks the other finders for it and replaces the loader in their answer.

    `find_spec` imports nothing, because it runs under the interpreter's import lock.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _HOST:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, 'find_spec', None)
            spec = None if finder is self or find_spec is None else find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Loads `timm.models` with its own loader, which it puts back into the module, and then registers."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == '_loader':  # copy.copy asks an instance that has no attributes yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if not _importing:
            _register()


def _register() -> None:
    global _done
    if _done or _disabled():
        return
    _done = True
    try:
        importlib.import_module(_HOST)  # waits while another thread is importing it
        importlib.import_module('timm_atac._register').register()
    except Exception as error:
        _warn(error)
    except BaseException:
        _done = False  # Ctrl-C, for example: the next import of timm.models tries again
        raise
    # a new list: another thread may be iterating over the old one
    sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, _Hook)]


def _disabled() -> bool:
    return os.environ.get('TIMM_ATAC_DISABLE', '').lower() in ('1', 'true', 'yes', 'on')


def _warn(error: Exception) -> None:
    versions = ', '.join(
        f'{name} {getattr(sys.modules.get(name), "__version__", "of unknown version")}'
        for name in ('timm_atac', 'timm', 'torch')
    )
    message = (
        f'timm_atac could not register with timm. timm works as before, without the ATAC networks. '
        f'{type(error).__name__}: {error} ({versions}). '
        f'Try `pip install --upgrade timm_atac timm`, or set TIMM_ATAC_DISABLE=1 to do without timm_atac.'
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # warnings are errors here, or standard error is closed: `import timm` must work all the same
        with contextlib.suppress(Exception):
            print(f'RuntimeWarning: {message}', file=sys.stderr)

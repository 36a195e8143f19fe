"""Registration without an import: arms a hook that waits for `timm.models`.

PyTorch (>= 2.5) calls `arm` at the end of `import torch`, through the entry point group `torch.backends`. The hook
waits for `timm.models` rather than `timm`, because timm is half imported when it imports torch. Nothing here may break
`import torch` or `import timm`: this file needs the standard library only, and every failure becomes one warning.

`TIMM_ATAC_DISABLE=1` switches it off.
"""

import contextlib
import importlib
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOST = 'timm.models'
_done = False  # registered, or tried to


def arm() -> None:
    """Register with timm as soon as `timm.models` is there: now, or when it is imported. Never raises."""
    if _done or _disabled():
        return
    if isinstance(sys.modules.get(_HOST), ModuleType):
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


class _Hook:
    """Finder on `sys.meta_path` that lets the other finders find `timm.models`, and then stands in as its loader.

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
    """Stands in for the loader of `timm.models`, puts it back, and registers when the module is complete."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == '_loader':  # a copy that has not been initialised
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
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
        _done = False  # interrupted: the next import tries again
        raise
    # a new list, because another thread that walks the old one would skip a finder
    sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, _Hook)]


def _disabled() -> bool:
    return os.environ.get('TIMM_ATAC_DISABLE', '').lower() in ('1', 'true', 'yes', 'on')


def _warn(error: Exception) -> None:
    versions = ', '.join(
        f'{name} {getattr(sys.modules.get(name), "__version__", "of unknown version")}'
        for name in ('timm_atac', 'timm', 'torch')
    )
    message = (
        f'timm_atac could not register with timm, which works as before, without the ATAC networks. '
        f'{type(error).__name__}: {error} ({versions}). '
        f'Try `pip install --upgrade timm_atac timm`, or set TIMM_ATAC_DISABLE=1 to do without timm_atac.'
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # warnings are errors here, or cannot be shown, and an import of timm must not fail on ours
        with contextlib.suppress(Exception):
            print(f'RuntimeWarning: {message}', file=sys.stderr)

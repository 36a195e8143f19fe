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
_LIGHT = ('atomic', 'cli', 'commands', 'published', 'weights', 'weights.params')  # need neither torch nor timm
_done = False  # registered, or tried to
_waiting: set[str] = set()  # modules of ours whose import waits for timm, and registers after it


def arm() -> None:
    """Register with timm as soon as `timm.models` is there: now, or when it is imported. Never raises."""
    if _done or _disabled():
        return
    if isinstance(sys.modules.get(_HOST), ModuleType):
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


class _Hook:
    """Finder on `sys.meta_path` that lets the others find `timm.models` and our modules, and then stands in as loader.

    Nothing is imported here: find_spec runs under the interpreter's import lock.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        loader: type[_Loader]
        if name == _HOST:
            loader = _HostLoader
        elif name.startswith('timm_atac.') and name.removeprefix('timm_atac.') not in _LIGHT and not _done:
            loader = _OwnLoader
        else:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, 'find_spec', None)
            spec = None if finder is self or find_spec is None else find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Stands in for a module's loader until its code runs, then puts it back."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)


class _HostLoader(_Loader):
    """Registers at the end of `timm.models`."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if not _waiting:
            _register()


class _OwnLoader(_Loader):
    """Imports timm and registers before a module of ours begins.

    Otherwise a module of ours that is imported first would import timm, and the registration would find it half done.
    Where several threads do so at once, the last one registers, when its module is complete.
    """

    _loaded: ModuleType | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        _waiting.add(spec.name)
        try:
            importlib.import_module(_HOST)
            if _waiting == {spec.name}:
                _register()
            self._loaded = sys.modules.get(spec.name)  # the registration's
            return self._loaded or super().create_module(spec)
        except BaseException:
            _waiting.discard(spec.name)
            raise

    def exec_module(self, module: ModuleType) -> None:
        try:
            if module is not self._loaded:
                super().exec_module(module)
            elif module.__spec__ is not None:
                module.__spec__.loader = self._loader
        finally:
            _waiting.discard(module.__name__)
        if not _waiting:
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

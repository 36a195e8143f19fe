"""Registration without an import: arms a hook that waits for `timm.models`.

PyTorch (>= 2.5) calls `arm` at the end of `import torch`, through the entry point group `torch.backends`. The hook
waits for `timm.models` rather than `timm`, because timm is half imported when it imports torch. Nothing here may break
`import torch` or `import timm`: this file needs the standard library only, and every failure becomes one warning.

`TIMM_ATAC_DISABLE=1` switches it off.
"""

import importlib
import importlib.util
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
    if _done or os.environ.get('TIMM_ATAC_DISABLE', '') not in ('', '0'):
        return
    if _HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


class _Hook:
    """Finder on `sys.meta_path` that leaves it on the first import of `timm.models`, which then ends in `_register`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _HOST:
            return None
        # a new list, since another thread may be walking the old one
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Stands in for the loader of `timm.models` until its code runs, then puts it back and registers."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        try:
            self.loader.exec_module(module)
        except BaseException:
            sys.meta_path.insert(0, _Hook())  # timm did not load; the next try may
            raise
        _register()


def _register() -> None:
    global _done
    if _done:
        return
    _done = True
    try:
        importlib.import_module(_HOST)  # waits while another thread is importing it
        importlib.import_module('timm_atac._register').register()
    except Exception as error:
        _warn(error)


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
    except Warning:  # warnings are errors here, and an import of timm must not fail on ours
        print(f'RuntimeWarning: {message}', file=sys.stderr)

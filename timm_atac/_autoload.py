"""Registers our networks with timm although no program imports us: an import hook waits for `timm.models`.

PyTorch (>= 2.5) calls `arm` at the end of `import torch`, through the entry point group `torch.backends`. `arm` cannot
import timm, because timm itself may be the one that imports torch. So it puts a hook on `sys.meta_path`, which
registers as soon as `timm.models` has been imported. The hook stays there: a program can remove timm from `sys.modules`
and import it again, for example after an upgrade in a notebook, and we register with the other timm too.

Our modules hold classes of the timm that they were imported with. With another timm they are imported anew. A test
runner may put the former timm back into `sys.modules`: then we put back the modules that belong to it.

Nothing here may break `import torch` or `import timm`. This file imports the standard library only, and every failure
becomes one warning. `TIMM_ATAC_DISABLE=1` switches all of it off.

A module of ours can be the first to import timm. The registration must not run in the middle of it, because it imports
all of them. So each of our packages that needs timm calls `import_timm` in its `__init__.py`, before its modules begin.
"""

import contextlib
import importlib
import os
import sys
import threading
import warnings
import weakref
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOST = 'timm.models'
_ADAPTER = 'timm_atac._timm'  # every registration imports this module, so it stands for all that belong to one timm
# Modules that hold nothing of timm, and stay when another timm is imported. PyTorch knows the operators of the kernels.
_INDEPENDENT = ('_autoload', '_files', 'kernels', 'weights', 'weights.params')

# Every timm with which the registration has begun: a class that it defines, and our `_timm` that belongs to it. The
# value is None until the registration ends. The references are weak, so that they keep no former timm alive.
_seen: 'weakref.WeakKeyDictionary[Any, weakref.ref[ModuleType] | None]' = weakref.WeakKeyDictionary()
_importing: set[int] = set()  # threads in `import_timm`, the last of which registers


def arm() -> None:
    """Register with timm now if `timm.models` has been imported, and whenever it is imported later. Never raises."""
    if _disabled():
        return
    try:
        # that of another module than this, if ours were removed from `sys.modules` like timm
        newest = importlib.import_module(__name__).arm
    except Exception as error:
        _warn(error)
        return
    if newest is not arm:
        newest()
        return
    _put_hook()
    if isinstance(sys.modules.get(_HOST), ModuleType):
        with contextlib.suppress(Exception):  # the error of another thread, whose import of timm has failed
            import_timm()
    elif _seen and _ADAPTER in sys.modules:
        _set_aside()  # timm was removed; our packages import it again


def import_timm() -> None:
    """Import timm and register, unless another thread is in here too: it then registers, when it is done.

    A thread that imports timm itself leaves the registration to those in here. They hold the locks of our modules, so
    the two would wait for each other.
    """
    thread = threading.get_ident()
    if thread in _importing:
        return
    _importing.add(thread)
    try:
        if _HOST not in sys.modules:
            importlib.import_module('timm')  # before timm.models: other threads take the locks in this order too
        importlib.import_module(_HOST)
    finally:
        _importing.discard(thread)
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
        arm()


def _put_hook() -> None:
    """Put one hook on `sys.meta_path`. It replaces that of a module like this which was imported before this one."""
    hooks = [finder for finder in sys.meta_path if _is_hook(finder)]
    if len(hooks) != 1 or not isinstance(hooks[0], _Hook):
        # a new list: another thread may be iterating over the old one
        sys.meta_path = [_Hook(), *(finder for finder in sys.meta_path if not _is_hook(finder))]


def _is_hook(finder: Any) -> bool:
    return (type(finder).__module__, type(finder).__qualname__) == (__name__, _Hook.__qualname__)


def _register() -> None:
    """Register with the timm in `sys.modules` if that has not been done, and make our modules those of this timm."""
    if _disabled():
        return
    timm = None
    try:
        host = sys.modules[_HOST]
        # a class, as new as the registry: it stays the same if only `timm.models` itself is imported again
        timm = getattr(host, 'DefaultCfg', host)
        if timm in _seen:
            _put_back(timm)
            return
        if _seen:
            _set_aside()
        _seen[timm] = None
        importlib.import_module('timm_atac._register').register()
    except Exception as error:
        _warn(error)
    except BaseException:  # Ctrl-C, for example: the next import of timm.models tries again
        if timm in _seen:
            del _seen[timm]
        _set_aside()
        raise
    adapter = sys.modules.get(_ADAPTER)
    if timm in _seen and isinstance(adapter, ModuleType):
        _seen[timm] = weakref.ref(adapter)


def _set_aside() -> None:
    """Remove our modules from `sys.modules`, except independent ones and those that are being imported just now.

    The next import of each loads it anew. Its former objects still work. The adapter keeps them, for `_put_back`.
    """
    ours = {name: module for name, module in _ours().items() if not _is_independent(name)}
    busy = [name for name, module in ours.items() if getattr(module.__spec__, '_initializing', False)]
    for name in [name for name in ours if any(f'{inner}.'.startswith(f'{name}.') for inner in busy)]:
        del ours[name]
    for name in ours:
        sys.modules.pop(name, None)
    for name, module in ours.items():
        parent, _, child = name.rpartition('.')
        attributes = vars(sys.modules.get(parent, module))
        if attributes.get(child) is module:  # where `from timm_atac import units` would find it
            del attributes[child]
    if _ADAPTER in ours:
        vars(ours[_ADAPTER])['set_aside'] = ours


def _put_back(timm: Any) -> None:
    """Put the modules that belong to a timm back into `sys.modules`, where they are not there already."""
    reference = _seen[timm]
    adapter = None if reference is None else reference()
    if adapter is None:
        return
    former = vars(adapter).pop('set_aside', {})
    if former and sys.modules.get(_ADAPTER) is not adapter:
        _set_aside()
        sys.modules.update(former)
    if vars(importlib.import_module('timm_atac')).get('_timm') is not adapter:
        for name, module in _ours().items():
            parent, _, child = name.rpartition('.')
            if parent in sys.modules:
                setattr(sys.modules[parent], child, module)


def _ours() -> dict[str, ModuleType]:
    """Our modules below `timm_atac` in `sys.modules`, by name."""
    modules = [*sys.modules.items()]
    return {name: m for name, m in modules if name.startswith('timm_atac.') and isinstance(m, ModuleType)}


def _is_independent(name: str) -> bool:
    return name.startswith('timm_atac.kernels.') or name.removeprefix('timm_atac.') in _INDEPENDENT


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

"""Registration when timm, or this package, is imported again in one process."""

import importlib
import inspect
import pkgutil
import sys
from textwrap import dedent

import pytest

from timm_atac import _autoload, kernels

WARNINGS_ARE_ERRORS = ('-W', 'error')
# What a program can do with timm in one process. `remove` returns what it has removed from sys.modules.
AGAIN = """
import sys, torch

def remove(*starts):
    starts = starts or ('timm.',)
    return {name: sys.modules.pop(name) for name in [*sys.modules] if f'{name}.'.startswith(starts)}

def check():
    \"\"\"All of ours works with the timm in sys.modules.\"\"\"
    import timm, timm_atac
    from timm import layers  # not an attribute of timm if an interrupted import has left it in sys.modules
    from timm.models import nfnet
    assert len(timm.list_models('atac*')) == 11, timm.list_models('atac*')
    names = timm.list_models(include_tags=True)
    assert len(names) == len({*names})
    unit = timm_atac.ATAC
    assert layers.get_act_layer('atac') is timm_atac.ATACMe and issubclass(timm_atac.ATACMe, unit)
    model = timm.create_model('atac_resnet18')
    assert isinstance(model, timm_atac.AtacResNet) and isinstance(model, timm.models.ResNet)
    assert any(isinstance(m, unit) for m in model.modules())
    assert any(isinstance(m, unit) for m in timm.create_model('resnet18', act_layer='atac').modules())
    model = timm.create_model('test_resnet')
    assert any(isinstance(m, unit) for m in timm_atac.replace_activations(model).modules())
    assert timm_atac.gate(layers.SEModule(8), torch.randn(2, 8, 3, 3)).shape[1] == 8
    assert nfnet._nonlin_gamma['atac'] == nfnet._nonlin_gamma['se_act'] > 1
    for name, module in sys.modules.items():
        if name.startswith('timm_atac.'):
            parent, _, child = name.rpartition('.')
            assert getattr(sys.modules[parent], child) is module, name
            assert vars(module).get('timm', timm) is timm, name
    assert [type(finder).__qualname__ for finder in sys.meta_path].count('_Hook') == 1
    return unit
"""


@pytest.mark.slow
def test_another_timm(python) -> None:
    """timm is removed and imported again, by itself and by one of our modules. A former timm is put back."""
    code = """
        import copy, timm, timm_atac
        first, old = check(), timm.create_model('atac_resnet8_cifar')
        error, operation = timm_atac.ParamsError, sys.modules['timm_atac.kernels']
        former = remove()
        import timm
        second = check()
        assert second is not first
        assert (timm_atac.ParamsError, sys.modules['timm_atac.kernels']) == (error, operation)
        copy.deepcopy(old)(torch.randn(2, 3, 32, 32)).sum().backward()  # a former model still works

        later = remove()
        sys.modules.update(former)  # as a test runner does that isolates timm
        assert check() is first
        everything = dict(sys.modules)
        remove()
        import timm
        third = check()
        assert third not in (first, second)
        sys.modules.clear()
        sys.modules.update(everything)  # as one that isolates all modules does
        assert check() is first
        remove()
        sys.modules.update(later)
        assert timm_atac.ATAC is check() is second

        remove()
        from timm_atac import fuse, read_params  # while there is no timm
        assert fuse is timm_atac.fuse and 'timm.models' in sys.modules
        assert check() not in (first, second, third)
        print('works')
    """
    assert python(AGAIN + dedent(code), *WARNINGS_ARE_ERRORS).stdout == 'works\n'


@pytest.mark.slow
def test_ours_imported_again(python) -> None:
    """The names begin alike, so that a program may remove both packages, or ours only, for example to upgrade it."""
    code = """
        import timm, timm_atac
        from timm_atac.kernels import norm_gate
        first, x, row = check(), torch.randn(2, 8, 5, 5), torch.ones(8)
        y = norm_gate.norm_gate(x, x, row, row, row, row)
        for starts in (('timm',), ('timm_atac.',), ('timm_atac._autoload.',), ('timm',)):
            former = timm_atac
            remove(*starts)
            import timm
            assert len(timm.list_models('atac*')) == 11 or starts == ('timm_atac.',)
            import timm_atac
            second = check()
            assert second is not first or starts == ('timm_atac._autoload.',)
            assert former.ATAC is check() is second  # a name in the notebook still refers to the former package
            first = second
        from timm_atac.kernels import norm_gate as again
        assert again is not norm_gate
        for module in (norm_gate, again):
            assert torch.equal(module.norm_gate(x, x, row, row, row, row), y)
        print('works')
    """
    assert python(AGAIN + dedent(code), *WARNINGS_ARE_ERRORS).stdout == 'works\n'


@pytest.mark.slow
def test_parts_of_timm_imported_again(python) -> None:
    """timm.models alone, which leaves timm's registry as it was; all but timm.layers, which does not; and reloading."""
    code = """
        import importlib, timm, timm_atac
        first = check()
        del sys.modules['timm.models']
        import timm.models
        assert check() is first
        importlib.reload(timm.models)
        assert check() is first
        layers = remove('timm.layers.')  # with our former activations
        remove()
        sys.modules.update(layers)
        import timm
        assert check() is not first

        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == 'timm_atac.models.cifar_resnet':
                    sys.meta_path.remove(self)
                    raise KeyboardInterrupt
        remove()
        sys.meta_path.insert(0, Interrupt())
        try:
            import timm
        except KeyboardInterrupt:
            print('interrupted')
        import timm
        check()

        remove()
        class Instrument:  # answers before our hook
            def find_spec(self, name, path=None, target=None):
                from importlib.machinery import PathFinder
                return PathFinder.find_spec(name, path) if name.startswith('timm.') else None
        sys.meta_path.insert(0, Instrument())
        import timm
        assert not timm.list_models('atac*')
        timm_atac.ATAC
        check()
    """
    assert python(AGAIN + dedent(code), *WARNINGS_ARE_ERRORS).stdout == 'interrupted\n'


@pytest.mark.slow
def test_another_timm_that_fails(python) -> None:
    """One warning for each timm. It is not repeated, and the next timm works. Switched off, nothing happens."""
    code = """
        import os, types, timm, timm_atac
        check()
        former = remove()
        version = types.ModuleType('timm.version')
        version.__version__ = '1.0.3'
        sys.modules['timm.version'] = version
        import timm
        for _ in range(3):
            assert not timm.list_models('atac*') and timm_atac.ATAC(4)
            del sys.modules['timm.models']
            import timm.models
        old = timm_atac.ATAC
        remove()
        sys.modules.update(former)
        check()
        remove()
        os.environ['TIMM_ATAC_DISABLE'] = '1'
        import timm
        assert not timm.list_models('atac*') and timm_atac.ATAC(4)
        del os.environ['TIMM_ATAC_DISABLE']
        timm_atac.ATAC
        assert check() is not old
    """
    result = python(AGAIN + dedent(code))
    assert result.stderr.count('RuntimeWarning') == 1
    assert 'timm 1.0.3 is older than' in result.stderr


@pytest.mark.slow
def test_threads_import_another_timm(python) -> None:
    code = """
        import faulthandler, threading, timm, timm_atac
        faulthandler.dump_traceback_later(120, exit=True)
        def load(code):
            start.wait()
            try:
                exec(code, globals())
            except ImportError as error:
                print('half imported:', error.name)
        start = threading.Barrier(3)
        for ours in ('from timm_atac import ATAC', 'import timm_atac.units.atac', 'timm_atac.gate'):
            remove()
            threads = [threading.Thread(target=load, args=(code,)) for code in ('import timm', ours, ours)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            timm_atac.ATAC
            check()
    """
    assert 'could not register' not in python(AGAIN + dedent(code)).stderr


@pytest.mark.slow
def test_independent_modules_hold_nothing_of_timm() -> None:
    """Those that stay when another timm is imported. `_timm` shows that the test can fail."""

    def parts(name: str) -> list[str]:
        values = vars(importlib.import_module(name)).items()
        found = {
            key: value.__name__ if inspect.ismodule(value) else getattr(value, '__module__', '')
            for key, value in values
        }
        return [key for key, module in found.items() if f'{module}.'.startswith(('timm.', 'timm_atac._timm.'))]

    names = [f'timm_atac.{name}' for name in _autoload._INDEPENDENT]
    names += [m.name for m in pkgutil.iter_modules(kernels.__path__, 'timm_atac.kernels.') if 'triton' not in m.name]
    assert [name for name in names if parts(name)] == []
    assert 'nfnet' in parts('timm_atac._timm')
    assert all(_autoload._is_independent(name) for name in names)
    assert not _autoload._is_independent('timm_atac.units')


def test_hook_of_an_earlier_module_is_replaced(monkeypatch) -> None:
    others = [finder for finder in sys.meta_path if not _autoload._is_hook(finder)]
    earlier = [type('_Hook', (), {'__module__': _autoload.__name__})() for _ in range(2)]
    monkeypatch.setattr(sys, 'meta_path', [earlier[0], *others, earlier[1]])
    for _ in range(2):
        _autoload._put_hook()
        assert sys.meta_path[1:] == others
        assert isinstance(sys.meta_path[0], _autoload._Hook)

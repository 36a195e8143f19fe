"""Registration without an import, in new interpreters where the import of PyTorch matters, else in forked ones."""

import copy
import inspect
import subprocess
import sys
from textwrap import dedent

import pytest
import timm

from timm_atac import _autoload

# Ends every run: all is registered and works. `with_us` in the runs where it must not be is `without_us`.
WITH_US = """
import timm
from timm.layers import get_act_layer
assert {'atac_resnet50', 'resnet8_cifar'} <= set(timm.list_models()), 'not registered'
assert get_act_layer('atac').__name__ == 'ATACMe'
model = timm.create_model('atac_resnet8_cifar')
print('registered')
"""
WITHOUT_US = """
import timm, warnings
from timm.layers import create_act
assert not timm.list_models(['*atac*', '*_cifar']), 'registered'
assert not {'atac', 'se_act', 'nin'} & {*create_act._ACT_LAYER_DEFAULT, *create_act._ACT_LAYER_ME}
timm.create_model('test_resnet')
print('timm alone')
"""
# modules that somebody may import first: light ones, and some of those whose packages import timm
FIRST = ('_register', 'cli', 'units.deferred', 'weights.identity')
IMPORT_ORDERS = [
    'import torch',
    'import timm',
    'import torchvision',
    'import timm_atac',
    'import timm, timm_atac',
    'from timm_atac import ATAC',
    *(f'import timm_atac.{module}' for module in FIRST),
    *(
        pytest.param(imports, marks=pytest.mark.weekly)
        for imports in (
            'import timm.layers',
            'import timm.models.resnet',
            'from timm_atac import *',
            'import timm_atac.weights.pretrained',
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize('imports', IMPORT_ORDERS)
def test_import_order(new_python, imports) -> None:
    result = new_python(imports + WITH_US, '-W', 'error')
    assert result.stdout == 'registered\n'
    assert 'timm_atac' not in result.stderr


LIGHT = ('_files', 'cli', 'weights.params', 'weights.published')


def test_light_modules(new_python) -> None:
    """Modules that need neither torch nor timm import neither."""
    imports = ', '.join(f'timm_atac.{name}' for name in LIGHT)
    code = f'import sys, {imports}; print([m for m in ("torch", "timm", "timm_atac.units.atac") if m in sys.modules])'
    assert new_python(code).stdout == '[]\n'


@pytest.mark.slow
@pytest.mark.parametrize('imports', ['import timm_atac', 'import timm, timm_atac', 'import timm_atac, timm'])
def test_torch_autoload_off(python, imports) -> None:
    if imports == 'import timm_atac':
        python(WITHOUT_US, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert 'registered' in python(imports + WITH_US, TORCH_DEVICE_BACKEND_AUTOLOAD='0').stdout


@pytest.mark.slow
@pytest.mark.parametrize('imports', ['import timm', 'import timm_atac.models.atac_resnet; timm_atac.ATAC(4)'])
def test_switch(python, imports) -> None:
    assert 'timm alone' in python(imports + WITHOUT_US, TIMM_ATAC_DISABLE='1').stdout
    assert 'registered' in python(imports + WITH_US, TIMM_ATAC_DISABLE='0').stdout


IMPORTED = (
    'import sys; before = set(sys.modules); import {0}; print(*{{m.split(".")[0] for m in {{*sys.modules}} - before}})'
)


def third_party(python, module: str) -> set[str]:
    """Top-level modules outside the standard library that importing a module brings in."""
    found = set(python(IMPORTED.format(module)).stdout.split())
    return found - sys.stdlib_module_names - {module.split('.')[0]}


def test_imports_the_standard_library_only(new_python) -> None:
    assert third_party(new_python, 'timm_atac') == set()
    assert third_party(new_python, 'timm_atac._autoload') == set()


@pytest.mark.slow
def test_the_test_above_can_fail(new_python) -> None:
    assert {'torch', 'numpy'} <= third_party(new_python, 'timm_atac.units.atac')


@pytest.mark.slow
def test_torch_brings_no_timm(new_python) -> None:
    code = 'import torch, sys; print(sorted(m for m in sys.modules if m.startswith("timm")))'
    assert new_python(code).stdout == "['timm_atac', 'timm_atac._autoload']\n"


@pytest.mark.slow
def test_leaves_the_import_system_as_it_was_but_for_one_hook(python) -> None:
    code = """
        import sys
        import torch
        def hooks():
            return [type(f).__module__ for f in sys.meta_path].count('timm_atac._autoload')
        armed = hooks()
        import inspect, timm.models
        assert type(timm.models.__spec__.loader) is type(timm.models.__loader__) is type(timm.__loader__)
        assert timm.models.__spec__.loader is timm.models.__loader__
        assert inspect.getsource(timm.models)
        assert hooks() == armed
        import timm_atac
        timm_atac._arm()
        assert hooks() == armed
        sys.meta_path = [f for f in sys.meta_path if type(f).__module__ != 'timm_atac._autoload']
        print(armed, [f if isinstance(f, type) else type(f) for f in sys.meta_path])
    """
    ours, theirs = python(dedent(code)).stdout, python(dedent(code), TIMM_ATAC_DISABLE='1').stdout
    assert (ours[0], theirs[0]) == ('1', '0')
    assert ours[1:] == theirs[1:]


@pytest.mark.slow
def test_broken_timm_gets_a_second_chance(python) -> None:
    code = """
        import sys, torch
        sys.modules['timm.models.resnet'] = None  # makes `import timm` fail
        try:
            import timm
        except ImportError:
            print('timm is broken')
        for name in [m for m in sys.modules if m.split('.')[0] == 'timm']:
            del sys.modules[name]
    """
    assert python(dedent(code) + WITH_US).stdout == 'timm is broken\nregistered\n'


WARNINGS_ARE_ERRORS = ('-W', 'error')
FAILURES = {
    'a module of ours is missing': (
        "import sys; sys.modules['timm_atac.models.cifar_resnet'] = None",
        'ModuleNotFoundError',
    ),
    'the registration is missing': ("import sys; sys.modules['timm_atac._register'] = None", 'ModuleNotFoundError'),
    'timm is too old': (
        "import sys, types; old = types.ModuleType('timm.version'); old.__version__ = '1.0.3'\n"
        "sys.modules['timm.version'] = old",
        'timm 1.0.3 is older than 1.0.21',
    ),
    'timm is too new': (
        'import timm.models\ndel timm.models.generate_default_cfgs',
        "cannot import name 'generate_default_cfgs'",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    'failure, flags',
    [*((failure, ()) for failure in FAILURES), *((failure, WARNINGS_ARE_ERRORS) for failure in [*FAILURES][2:])],
)
def test_failure_is_one_warning(python, new_python, failure, flags) -> None:
    breakage, reason = FAILURES[failure]
    late = failure == 'timm is too new'  # has to break timm between its import and ours
    run = new_python if flags else python
    result = run(
        breakage + '\nimport timm_atac' + WITHOUT_US, *flags, **({'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'} if late else {})
    )
    assert 'timm alone' in result.stdout
    assert result.stderr.count('RuntimeWarning: timm_atac could not register') == 1
    assert reason in result.stderr
    assert 'TIMM_ATAC_DISABLE=1' in result.stderr
    assert 'torch 2.' in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('theirs, flags', [('model', ()), ('activation', WARNINGS_ARE_ERRORS)])
def test_a_name_that_is_taken_stays_with_its_owner(python, theirs, flags) -> None:
    code = {
        'model': """
            import timm
            from timm.models import register_model
            @register_model
            def atac_resnet50(pretrained=False, **kwargs):
                return timm.create_model('test_resnet')
        """,
        'activation': """
            import timm, torch
            from timm.layers import create_act
            create_act._ACT_LAYER_DEFAULT['se_act'] = torch.nn.Tanh
        """,
    }[theirs]
    check = """
        import timm_atac
        from timm.layers import create_act
        from timm.models import _registry
        if 'atac_resnet50' in timm.list_models():
            assert timm.create_model('atac_resnet50').default_cfg['architecture'] == 'test_resnet'
            assert timm.list_models(['*atac*', '*_cifar']) == ['atac_resnet50']
            assert 'atac_resnet' not in timm.list_modules()
        else:
            assert timm.layers.get_act_layer('se_act') is torch.nn.Tanh
            assert not timm.list_models(['*atac*', '*_cifar'])
        assert 'atac' not in create_act._ACT_LAYER_DEFAULT
    """
    result = python(dedent(code) + dedent(check), *flags, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert result.stderr.count('RuntimeWarning: timm_atac could not register') == 1
    assert 'is registered by another package already' in result.stderr


@pytest.mark.slow
def test_failed_registration_leaves_the_registry_as_it_was(python) -> None:
    """Also where the failure comes while a module of ours is being imported, and when they are imported after it."""
    code = """
        import copy, sys, timm, torch
        from timm.layers import create_act
        from timm.models import _registry
        create_act._ACT_LAYER_DEFAULT['nin'] = torch.nn.Tanh
        tables = {k: copy.deepcopy(v) for k, v in vars(_registry).items()
                  if isinstance(v, (dict, set)) and not k.startswith('__')}
        import timm_atac.models.atac_resnet
        import timm_atac.models.cifar_resnet
        assert timm_atac.ATAC(4)
        assert tables == {k: vars(_registry)[k] for k in tables}
        print(len(tables))
    """
    result = python(dedent(code), TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert int(result.stdout) >= 7
    assert result.stderr.count('RuntimeWarning: timm_atac could not register') == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    'stderr, flags',
    [
        ('None', ()),
        ('None', ('-W', 'error::RuntimeWarning')),
        ('open("/dev/full", "w", buffering=1)', ()),
        ('type("Stream", (), dict(write=None, flush=None))()', ('-W', 'error::RuntimeWarning')),
    ],
)
def test_failure_that_cannot_be_shown(python, stderr, flags) -> None:
    code = f"""
        import sys
        sys.modules['timm_atac.models.cifar_resnet'] = None
        sys.stderr, kept = {stderr}, sys.stderr
    """
    restore = '\nsys.stderr = kept\nimport os; os._exit(0 if sys.stdout.flush() is None else 1)'
    assert 'timm alone' in python(dedent(code) + WITHOUT_US + restore, *flags).stdout


@pytest.mark.slow
def test_interrupted_registration_is_made_up_for(python) -> None:
    code = """
        import sys, torch
        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == 'timm_atac.models.cifar_resnet':
                    sys.meta_path.remove(self)
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupt())
        try:
            import timm
        except KeyboardInterrupt:
            print('interrupted')
    """
    assert python(dedent(code) + WITH_US).stdout == 'interrupted\nregistered\n'


@pytest.mark.slow
def test_interrupted_between_two_networks(python) -> None:
    """Ctrl-C after three networks: the next import registers the others."""
    code = """
        import timm, torch
        from timm.models import _registry
        calls, register_model = [], timm.models.register_model
        def interrupted(entry_function):
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append(register_model(entry_function))
        timm.models.register_model = interrupted
        try:
            import timm_atac
        except KeyboardInterrupt:
            print('interrupted after', len(timm.list_models(['*atac*', '*_cifar'])))
        timm.models.register_model = register_model
        import timm_atac
    """
    result = python(dedent(code) + WITH_US, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert result.stdout == 'interrupted after 3\nregistered\n'


def test_the_loader_can_be_copied() -> None:
    """Profilers and freezers copy loaders; `copy.copy` reads attributes of an instance that has none yet."""
    loader = _autoload._Loader(timm.__loader__)
    assert copy.copy(loader)._loader is timm.__loader__
    assert copy.deepcopy(_autoload._Loader('theirs'))._loader == 'theirs'
    assert loader.get_source('timm') == inspect.getsource(timm)


@pytest.mark.slow
def test_timm_found_by_another_finder(python) -> None:
    """Finders that instrument modules may answer before the hook; any use of ours makes up for it."""
    code = """
        import sys, torch
        from importlib.machinery import PathFinder
        class Instrument:
            def find_spec(self, name, path=None, target=None):
                return PathFinder.find_spec(name, path) if name.startswith('timm.') else None
        sys.meta_path.insert(0, Instrument())
        import timm
        from timm_atac import ATAC
    """
    assert 'registered' in python(dedent(code) + WITH_US).stdout


@pytest.mark.slow
def test_spawned_worker(tmp_path) -> None:
    """A worker that unpickles one of our layers before anything else."""
    script = tmp_path / 'script.py'
    script.write_text(
        dedent("""
        from torch.utils.data import DataLoader, Dataset

        class Names(Dataset):
            def __init__(self, unit):
                self.unit = unit
            def __len__(self):
                return 2
            def __getitem__(self, index):
                import timm
                return len(timm.list_models(['atac_*', '*_cifar'])), self.unit.conv1.out_channels

        if __name__ == '__main__':
            from timm_atac import ATAC
            loader = DataLoader(Names(ATAC(6)), num_workers=1, multiprocessing_context='spawn')
            print([(int(n), int(c)) for n, c in loader])
    """)
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    names = {n for n, _ in eval(result.stdout)}
    assert names == {len(timm.list_models(['atac_*', '*_cifar']))}


@pytest.mark.slow
@pytest.mark.parametrize('ours', ['timm_atac', 'timm_atac.models.atac_resnet', 'timm_atac.units.atac'])
def test_threads(python, ours) -> None:
    """Imports of timm and of ours at once. A thread may meet a half imported module, as without us; none hangs."""
    code = f"""
        import faulthandler, threading, torch
        faulthandler.dump_traceback_later(120, exit=True)
        names = ['timm', 'timm.models', 'timm.layers', '{ours}']
        start = threading.Barrier(len(names))
        def load(name):
            start.wait()
            try:
                __import__(name)
            except ImportError as error:
                print('half imported:', error.name)
        threads = [threading.Thread(target=load, args=(name,)) for name in names]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    assert 'registered' in python(dedent(code) + WITH_US).stdout

"""`timm-atac env` says what is there and what is broken, and never ends with a traceback."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm_tests import OUR_MODULES

import timm_atac
from timm_atac.cli import env, main
from timm_atac.kernels import switch

PACKAGE = Path(timm_atac.__file__).resolve().parent
VARIABLES = ('TIMM_ATAC_DISABLE', 'TIMM_ATAC_DEBUG', 'TORCH_DEVICE_BACKEND_AUTOLOAD')


@pytest.fixture
def report(monkeypatch, capsys) -> Any:
    """Run the command in this process: `report()` gives the rows as a dict of section -> name -> text."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def report() -> dict[str, dict[str, str]]:
        assert main(['env']) == 0
        output, errors = capsys.readouterr()
        assert 'Traceback' not in output + errors
        return parse(output)

    return report


def parse(output: str) -> dict[str, dict[str, str]]:
    """Return section -> name -> text; two spaces or more are between a name and its text."""
    sections: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        if not line.startswith(' '):
            rows = sections.setdefault(line.rstrip(':'), {})
            continue
        name, text = (part.strip() for part in line.strip().split('  ', 1))
        rows[name] = text
    return sections


def test_what_is_there(report, monkeypatch) -> None:
    monkeypatch.setenv('TIMM_ATAC_HUB_ORG', 'me')
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    sections = report()
    versions, registration = sections['versions'], sections['registration']
    assert (versions['timm_atac'], versions['torch'], versions['timm']) == (
        timm_atac.__version__,
        torch.__version__,
        timm.__version__,
    )
    assert versions['imported from'].startswith(f'{PACKAGE} (')
    assert sys.executable in versions['Python']
    assert {'platform', 'GPU', 'huggingface_hub', 'safetensors', 'numpy'} <= set(versions)
    assert registration['entry point'].startswith('installed, by timm_atac ')
    assert registration['TIMM_ATAC_DISABLE'] == registration['TORCH_DEVICE_BACKEND_AUTOLOAD'] == 'not set'
    assert registration['models in timm'].startswith(f'{len(timm.list_models(module=OUR_MODULES))}, aa_resnet50 to ')
    assert registration['models in timm'].endswith('timm_atac.units.memory_efficient.ATACMe')
    assert set(sections['kernels']) == {'enabled', 'can run'}
    assert sections['environment'] == {'TIMM_ATAC_HUB_ORG': "'me'"}
    assert 'hf_secret' not in str(sections)


def test_packages_that_are_not_installed(report, monkeypatch) -> None:
    def version(name: str) -> str:
        if name in ('onnx', 'safetensors'):
            raise PackageNotFoundError(name)
        return '1'

    monkeypatch.setattr(env, 'version', version)
    versions = report()['versions']
    assert versions['safetensors'] == 'not installed'
    assert 'onnx' not in versions and versions['matplotlib'] == '1'


@pytest.mark.parametrize(
    'variable, value, text',
    [
        ('TIMM_ATAC_DISABLE', 'yes', "'yes' (off: timm_atac does not register)"),
        ('TIMM_ATAC_DISABLE', '0', "'0'"),
        ('TORCH_DEVICE_BACKEND_AUTOLOAD', '1', "'1'"),
        # PyTorch takes every other word than 1 as no
        (
            'TORCH_DEVICE_BACKEND_AUTOLOAD',
            'true',
            "'true' (off: PyTorch loads no entry points, so that programs have to import timm_atac)",
        ),
    ],
)
def test_switches(variable, value, text, report, monkeypatch) -> None:
    monkeypatch.setenv(variable, value)
    assert report()['registration'][variable] == text


@pytest.mark.parametrize('name', ['torch', 'timm'])
def test_a_package_that_cannot_be_imported(name, report, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    sections = report()
    module = timm if name == 'timm' else torch
    installed = module.__version__.partition('+')[0]
    assert sections['versions'][name].startswith(installed)
    assert 'cannot be imported: ModuleNotFoundError: import of ' in sections['versions'][name]
    assert sections['kernels'] == {'can run': f'no: {name} cannot be imported'}
    if name == 'timm':
        assert sections['registration']['models in timm'] == 'none: timm cannot be imported'


def test_entry_points(report, monkeypatch) -> None:
    other = SimpleNamespace(group='torch.backends', name='npu', value='torch_npu:load')
    monkeypatch.setattr(env, 'distributions', lambda: [SimpleNamespace(name='npu', version='1', entry_points=[other])])
    registration = report()['registration']
    missing = 'missing: timm_atac is not installed, so that programs have to import it'
    assert registration['entry point'] == missing
    assert registration['other entry points'] == 'npu = torch_npu:load'


def installed(home: Path, direct_url: Any) -> Any:
    return SimpleNamespace(
        version='0.0.1', locate_file=lambda _: home, read_text=lambda _: direct_url and json.dumps(direct_url)
    )


def test_origin(monkeypatch, tmp_path) -> None:
    def origin(distribution: Any) -> str:
        monkeypatch.setattr(env, 'distribution', lambda _: distribution)
        return env._origin()

    def editable(path: Path) -> dict[str, Any]:
        return {'url': path.as_uri(), 'dir_info': {'editable': True}}

    assert origin(installed(PACKAGE.parent, None)) == f'{PACKAGE} (installed)'
    assert origin(installed(tmp_path, editable(PACKAGE.parent))) == f'{PACKAGE} (editable install)'
    assert origin(installed(PACKAGE.parent, {'url': 'file:///x', 'dir_info': {}})) == f'{PACKAGE} (installed)'
    other = f'{PACKAGE} (another copy than the one that is installed: 0.0.1, '
    assert origin(installed(tmp_path, None)) == f'{other}installed, {tmp_path})'
    path = tmp_path / 'a folder'
    assert origin(installed(tmp_path, editable(path))) == f'{other}editable install, {path})'

    def not_found(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(env, 'distribution', not_found)
    assert env._origin() == f'{PACKAGE} (not installed)'


@pytest.mark.parametrize(
    'choice, text',
    [
        (None, 'only where they were measured to be faster'),
        (True, 'yes'),
        (False, 'no'),
        ('perhaps', "TIMM_ATAC_KERNELS has the unknown word 'perhaps': expected 1, 0, or nothing"),
    ],
)
def test_kernels(choice, text, report, monkeypatch) -> None:
    monkeypatch.setattr(switch, '_choice', choice)
    assert report()['kernels']['enabled'] == text


@pytest.mark.parametrize(
    'values, text',
    [
        (dict(IS_INSTALLED=False), 'no: they need Triton, and PyTorch 2.7 or newer'),
        (dict(IS_INSTALLED=True, IS_INTERPRETED=True), "yes, on the CPU by Triton's interpreter (TRITON_INTERPRET)"),
        (
            dict(IS_INSTALLED=True, IS_INTERPRETED=False),
            "no: they need one of NVIDIA's GPUs of compute capability 8.0 or newer",
        ),
    ],
)
def test_where_kernels_run(values, text, report, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name, value in values.items():
        monkeypatch.setattr(switch, name, value)
    assert report()['kernels']['can run'] == text


def test_gpus(report, monkeypatch) -> None:
    monkeypatch.setattr(switch, 'IS_INSTALLED', True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'GPU A' if index < 2 else 'GPU B')
    monkeypatch.setattr(switch, 'can_run', lambda device: device.index == 2)
    sections = report()
    assert sections['versions']['GPU'].endswith('; GPU A, GPU B (3)')
    assert sections['kernels']['can run'] == 'yes, on cuda:2'


def test_anything_else_ends_a_section(report, monkeypatch) -> None:
    def fail() -> None:
        raise OSError('no such\nplatform')

    monkeypatch.setattr(env.platform, 'platform', fail)
    sections = report()
    assert sections['versions']['error'] == 'this section ended with OSError: no such platform'
    assert 'models in timm' in sections['registration']


BROKEN = {
    'timm is too old': (
        "import types; old = types.ModuleType('timm.version'); old.__version__ = '1.0.3'\n"
        "sys.modules['timm.version'] = old",
        'RuntimeError: timm 1.0.3 is older than 1.0.21 (',
    ),
    'a name is taken': (
        "import timm\ntimm.layers.create_act._ACT_LAYER_DEFAULT['nin'] = object",
        "RuntimeError: activation 'nin' is registered by another package already (",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', BROKEN)
def test_registration_that_fails(case, python) -> None:
    breakage, reason = BROKEN[case]
    code = f'import sys\n{breakage}\nfrom timm_atac.cli import main\nsys.exit(main(["env"]))'
    late = {'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'} if 'import timm\n' in breakage else {}
    result = python(code, **late)
    sections = parse(result.stdout)
    assert sections['registration']['models in timm'] == 'none: the registration failed; see the warnings'
    warning = sections['warnings']['RuntimeWarning'] if 'warnings' in sections else result.stderr
    assert reason in warning


@pytest.mark.slow
def test_switched_off(python) -> None:
    code = 'from timm_atac.cli import main\nmain(["env"])'
    sections = parse(python(code, '-W', 'error', TIMM_ATAC_DISABLE='1').stdout)
    assert sections['registration']['models in timm'] == 'none: TIMM_ATAC_DISABLE is set'
    assert 'warnings' not in sections

"""What is published: the wheel built from the sdist, and what the README and docs/models.md say of it."""

import ast
import os
import pydoc
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
from index_page import addresses, long_description
from networks import gmacs
from timm_tests import OUR_MODULES

import timm_atac

ROOT = Path(__file__).parents[2]


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f'{command}\n{result.stdout}\n{result.stderr}'
    return result.stdout


# `python -m build` twice in one environment: the sdist, and the wheel from it; then the same from the unpacked sdist
BUILD = """
import os, subprocess, sys, tarfile
from build import ProjectBuilder
from build.env import DefaultIsolatedEnv

def make(source, out, env):
    sdist = ProjectBuilder.from_isolated_env(env, source).build('sdist', out)
    with tarfile.open(sdist) as archive:
        archive.extractall(out + '-sdist', filter='data')
    unpacked = os.path.join(out + '-sdist', os.path.basename(sdist).removesuffix('.tar.gz'))
    ProjectBuilder.from_isolated_env(env, unpacked).build('wheel', out)
    return unpacked

source, folder = sys.argv[1:]
try:
    with DefaultIsolatedEnv() as env:
        env.install(ProjectBuilder(source).build_system_requires)
        unpacked = make(source, os.path.join(folder, 'dist'), env)
        make(unpacked, os.path.join(folder, 'again'), env)
except subprocess.CalledProcessError as error:
    sys.exit(f'{error} {error.stdout} {error.stderr}')
"""


@pytest.fixture(scope='module')
def dist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('packages')
    try:
        run(sys.executable, '-c', BUILD, ROOT, folder)
    except AssertionError as error:
        if os.environ.get('CI') or 'ConnectionError' not in str(error):
            raise
        pytest.skip(f'the build backend comes from the package index, which cannot be reached: {error}')
    return folder / 'dist'


@pytest.mark.slow
@pytest.mark.network
def test_wheel(dist, tmp_path) -> None:
    (wheel,) = dist.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (n for n in names if n.endswith('entry_points.txt'))
        assert (
            archive.read(entry_points).decode().split()
            == (
                '[console_scripts] timm-atac = timm_atac.cli:main [torch.backends] timm_atac = timm_atac._autoload:arm'
            ).split()
        )
    info = entry_points.split('/')[0]
    assert {name.split('/')[0] for name in names} == {'timm_atac', info}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / 'timm_atac').rglob('*')
        if path.suffix in ('.py', '.typed', '.jinja', '.safetensors')
    }
    hub_configs = (ROOT / 'hub_configs').rglob('*.*')
    package |= {f'timm_atac/{path.relative_to(ROOT)}' for path in hub_configs if path.is_file()}
    assert {name for name in names if name.startswith('timm_atac/')} == package
    assert f'{info}/licenses/LICENSE' in names

    run(sys.executable, '-m', 'twine', 'check', '--strict', *dist.iterdir())
    with zipfile.ZipFile(wheel) as archive:
        _, text = archive.read(f'{info}/METADATA').decode().split('\n\n', 1)  # the headers, and the long description
    assert text.startswith('# timm_atac\n') and not relative_targets(text)

    # an environment with nothing in it: our import needs neither torch nor timm
    run(sys.executable, '-m', 'venv', tmp_path / 'venv')
    python = tmp_path / 'venv' / 'bin' / 'python'
    run(python, '-m', 'pip', 'install', '--no-deps', wheel)
    code = 'import sys, timm_atac; print(timm_atac.__version__, "torch" in sys.modules, timm_atac.__file__)'
    version, has_torch, file = run(python, '-I', '-c', code).split()
    assert (version, has_torch) == (wheel.name.split('-')[1], 'False')
    assert Path(file).is_relative_to(tmp_path)


@pytest.mark.slow
@pytest.mark.network
def test_wheel_has_what_a_wheel_should_have(dist) -> None:
    pytest.importorskip('check_wheel_contents')
    run(sys.executable, '-m', 'check_wheel_contents', dist)


@pytest.mark.slow
@pytest.mark.network
def test_built_twice_to_the_same_bytes(dist) -> None:
    """Packages that are built again, from the unpacked sdist and thus in another folder, are the same."""
    first, second = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (dist, dist.parent / 'again'))
    assert len(first) == 2
    assert first == second


REPOSITORY = 'https://forge.test/me/timm_atac'
PICTURE = '*Picture: gates (a.png in the source distribution)*'
LINKS = {
    '[page](docs/a.md#b)': (f'[page]({REPOSITORY}/blob/v1.0/docs/a.md#b)', 'page'),
    '[two\nlines](docs)': (f'[two\nlines]({REPOSITORY}/blob/v1.0/docs)', 'two\nlines'),
    '[below](#speed)': (f'[below]({REPOSITORY}/blob/v1.0/README.md#speed)', 'below'),
    '[`code[0]`](a.py)': (f'[`code[0]`]({REPOSITORY}/blob/v1.0/a.py)', '`code[0]`'),
    '![gates](a.png)': (
        f'![gates]({REPOSITORY}/raw/v1.0/a.png)',
        PICTURE,
    ),
    '<img width="9" src="a.png" alt="gates">': (
        f'<img width="9" src="{REPOSITORY}/raw/v1.0/a.png" alt="gates">',
        PICTURE,
    ),
    '[![gates](a.png)](a.md)': (
        f'[![gates]({REPOSITORY}/raw/v1.0/a.png)]({REPOSITORY}/blob/v1.0/a.md)',
        PICTURE,
    ),
    **{
        text: (text, text)
        for text in (
            '[paper](https://arxiv.org/abs/2007.07729)',
            '![badge](https://forge.test/a.png)',
            '`layers[0](x)` and `a` [b](mailto:me@forge.test)',
            '```python\nlayers[0](x)\n```',
        )
    },
}


@pytest.mark.parametrize('link', LINKS)
def test_links_of_an_index_page(link) -> None:
    """Links are absolute if the repository has an address, and text if it has none."""
    for repository, expected in zip((REPOSITORY, ''), LINKS[link], strict=True):
        assert long_description(f'A\n{link}\nb.', repository, '1.0') == f'A\n{expected}\nb.'


@pytest.mark.parametrize('repository', [REPOSITORY, ''])
def test_readme_on_an_index_page(repository) -> None:
    readme = (ROOT / 'README.md').read_text()
    text = long_description(readme, repository, '1.0')
    assert not relative_targets(text)
    absolute = re.findall(rf'\({REPOSITORY}/(blob|raw)/v1\.0/([^)#]+)', text)
    assert bool(absolute) == bool(repository)
    for _, path in absolute:
        assert (ROOT / path).exists(), path
    assert set(addresses(repository, '1.0')) == (
        {'Source', 'Documentation', 'Changelog', 'Issues'} if repository else set()
    )
    assert '\n## Install\n' in text


def relative_targets(text: str) -> list[str]:
    """Return the targets of links and pictures, outside of code, that are no addresses."""
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    targets = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'`[^`\n]+`', 'code', text))
    targets += re.findall(r'(?:src|srcset|href)="([^"]+)"', text) + re.findall(r'^\[[^\]]+\]: (\S+)', text, re.M)
    return [target for target in targets if not target.startswith(('https:', 'mailto:'))]


@pytest.mark.slow
def test_table_of_models() -> None:
    """The table of registered models names all of them, with the parameters and GMACs that they have."""
    rows = {}
    for line in (ROOT / 'docs' / 'models.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| `') and len(cells) == 4 and cells[0].strip('`') in timm.list_models(module=OUR_MODULES):
            rows[cells[0].strip('`')] = (cells[2], cells[3])
    assert set(rows) == set(timm.list_models(module=OUR_MODULES))
    for name, (params, macs) in rows.items():
        model: Any = timm.create_model(name, device='meta')
        count = sum(p.numel() for p in model.parameters())
        found = gmacs(model, model.default_cfg['input_size'][-1])
        if name.endswith('_cifar'):
            assert (params, macs) == (f'{count:,}', f'{found * 1e3:.1f} M'), name
        else:
            assert (params, macs) == (f'{count / 1e6:.2f} M', f'{found:.2f} G'), name


def test_citation_has_the_version() -> None:
    assert f'\nversion: {timm_atac.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


def test_public_names() -> None:
    """One list for type checkers and one for Python name the same modules."""
    tree = ast.parse(Path(timm_atac.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert homes.pop('pictures') == 'gates'
    assert homes == timm_atac._HOMES
    for name in timm_atac.__all__:
        assert getattr(timm_atac, name) is not None
        assert name in dir(timm_atac)
    with pytest.raises(AttributeError, match="module 'timm_atac' has no attribute 'ATAK'"):
        _ = timm_atac.ATAK  # type: ignore[attr-defined]


def test_help_begins_with_the_packages() -> None:
    text = pydoc.plain(pydoc.render_doc(timm_atac))
    contents = text[text.index('PACKAGE CONTENTS') :].split('\n\n')[0].splitlines()[1:]
    public = [line.strip() for line in contents if not line.strip().startswith('_')]
    assert 5 < len(public) <= 12
    assert all(line.endswith(' (package)') for line in public), public


def test_imports_go_down() -> None:
    """The contract in pyproject.toml, which also runs before each commit."""
    run(Path(sys.executable).with_name('lint-imports'))


def test_an_import_upwards_breaks_the_contract(tmp_path) -> None:
    """The test above can fail: also for an import inside of a function."""
    shutil.copytree(ROOT / 'timm_atac', tmp_path / 'timm_atac')
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    with open(tmp_path / 'timm_atac' / 'units' / 'sine.py', 'a') as file:
        file.write('\n\ndef up() -> None:\n    from ..hub import push  # noqa: F401\n')
    command = [Path(sys.executable).with_name('lint-imports')]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {'PYTHONPATH': '.'}, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'timm_atac.units.sine -> timm_atac.hub.push' in result.stdout


def test_ci_runs_the_readmes_command() -> None:
    readme, script = ((ROOT / name).read_text().splitlines() for name in ('README.md', '.ci/run'))
    (told,) = (line for line in readme if '-m pytest' in line)
    (run,) = (line for line in script if '-m pytest' in line)
    assert run == f'{told} || exit'  # without it the script would go on after a failed installation


RUN_PROGRAMS = """
import runpy, sys
from pathlib import Path
import timm  # once, since each of the programs would take seconds to import it
folders = [Path(folder) for folder in sys.argv[1:]]
path, roots = [*sys.path], tuple(str(folder) for folder in folders)
for program in [program for folder in folders for program in sorted(folder.glob('*.py'))]:
    if "__name__ == '__main__'" not in program.read_text():
        continue
    for name, module in [*sys.modules.items()]:  # those that another program has imported
        if (getattr(module, '__file__', None) or '').startswith(roots):
            del sys.modules[name]
    sys.path, sys.argv = [str(program.parent), *path], [str(program), '--help']
    try:
        runpy.run_path(str(program), run_name='__main__')
    except SystemExit:
        print('\\nran', program.name)
"""


@pytest.mark.slow
def test_programs_find_what_they_import(tmp_path) -> None:
    """Each program shows its help in any folder, without what pytest adds to the path."""
    folders = [str(ROOT / folder) for folder in ('benchmarks', 'tools', 'train_scripts')]
    command = [sys.executable, '-c', RUN_PROGRAMS, *folders]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr
    assert result.stdout.count('\nran ') >= 17

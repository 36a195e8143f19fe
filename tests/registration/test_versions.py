"""pyproject.toml, the files of constraints and CONTRIBUTING.md name the same versions."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a requirement of pytest before Python 3.11

ROOT = Path(__file__).parents[2]
OLDEST = 'constraints-oldest.txt'


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def floors(dependencies: list[str]) -> dict[str, Version]:
    """Return name -> lower bound; each requirement must have one and no other bound."""
    found: dict[str, Version] = {}
    for requirement in map(Requirement, dependencies):
        (bound,) = requirement.specifier
        assert bound.operator == '>=', requirement
        found[str(canonicalize_name(requirement.name))] = Version(bound.version)
    return found


def pins(file: str) -> dict[str, Version]:
    """Return name -> version of a file of constraints, each of which must be exact."""
    lines = (line.partition('#')[0].strip() for line in (ROOT / file).read_text().splitlines())
    found: dict[str, Version] = {}
    for requirement in map(Requirement, filter(None, lines)):
        (bound,) = requirement.specifier
        assert bound.operator == '==', requirement
        found[str(canonicalize_name(requirement.name))] = Version(bound.version)
    return found


def test_oldest_constraints_are_the_floors() -> None:
    assert pins(OLDEST) == floors(read_project()['dependencies'])


@pytest.mark.parametrize('dependency', ['jinja2', 'jinja2>=3.0.0,<4', 'jinja2~=3.0'])
def test_a_dependency_without_a_floor_is_found(dependency) -> None:
    with pytest.raises((AssertionError, ValueError)):
        floors([dependency])


def test_constraints_are_in_the_supported_ranges() -> None:
    oldest = floors(read_project()['dependencies'])
    for name, version in pins('constraints.txt').items():
        assert version >= oldest.get(name, version), name


def test_oldest_python() -> None:
    """The oldest Python is the same in all files, and the command for the oldest versions runs on it."""
    (bound,) = SpecifierSet(read_project()['requires-python'])
    assert bound.operator == '>='
    assert f'for Python {bound.version};' in (ROOT / OLDEST).read_text()
    for page in ('README.md', 'CONTRIBUTING.md'):
        assert set(re.findall(r'Python (3\.\d+) or newer', (ROOT / page).read_text())) == {bound.version}, page
    (command,) = (line for line in (ROOT / 'CONTRIBUTING.md').read_text().splitlines() if f'-c {OLDEST}' in line)
    assert command.startswith(f'python{bound.version} -m venv ')

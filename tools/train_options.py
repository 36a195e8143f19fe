#!/usr/bin/env python
"""The options of timm's train.py, read from its parser, as data that recipes are checked against.

`train.py --config FILE` sets defaults: it takes any key, and checks neither type nor choices. So the tests check the
recipes, without train.py at hand. Add timm's newer versions, each from a checkout of its tag:

    python tools/train_options.py ~/timm-1.0.21 ~/timm-1.0.22 ...

Only the versions given are written, oldest first. The file says what changed between them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

DATA = Path(__file__).parents[1] / 'tests' / 'data' / 'train_options.json'
SOURCE = 'train.py of https://github.com/huggingface/pytorch-image-models at v<version>; 1.0.29.dev0: commit aa4b585'

# default, and where they are not argparse's own: kind, type, nargs, choices; in the file also since and until
Option = dict[str, Any]
Options = dict[str, Option]
KINDS: dict[str, tuple[type, str]] = {'store_true': (bool, 'true or false'), 'ParseKwargs': (dict, 'a mapping')}

# Runs in a process of its own, since train.py imports what it finds, in the checkout, whose timm is then its own.
READ = """
import importlib.util, json
spec = importlib.util.spec_from_file_location('train', 'train.py')
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
facts = {}
for action in train.parser._actions:
    kind = {'_StoreAction': None, '_StoreTrueAction': 'store_true'}.get(type(action).__name__, type(action).__name__)
    facts[action.dest] = dict(
        kind=kind,
        type=action.type and action.type.__name__,
        nargs=action.nargs if kind is None else None,
        choices=action.choices and list(action.choices),
        default=action.default,
    )
facts.pop('help')
print('OPTIONS', json.dumps(facts))
"""


def read_options(checkout: Path) -> Options:
    """What the parser of `checkout`/train.py takes, by the names that a configuration file uses.

    Args:
        checkout: Folder with train.py; with timm's sources beside it these are imported, else the installed timm.
    """
    env = {**os.environ, 'TIMM_ATAC_DISABLE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    result = subprocess.run([sys.executable, '-c', READ], cwd=checkout, env=env, capture_output=True, text=True)
    printed = re.search(r'^OPTIONS (.*)$', result.stdout, re.MULTILINE)
    if printed is None:
        raise RuntimeError(f'{checkout}: expected a folder whose train.py can be imported, but:\n{result.stderr}')
    return {
        dest: {name: fact for name, fact in option.items() if name == 'default' or fact is not None}
        for dest, option in json.loads(printed[1]).items()
    }


def version_of(checkout: Path) -> str:
    """Version of the timm that lies in a checkout."""
    return re.findall(r"__version__ = '(.*)'", (checkout / 'timm' / 'version.py').read_text())[0]


def merge(by_version: Mapping[str, Options]) -> dict[str, list[Option]]:
    """The options of several versions, oldest first, by name, and what they were since and until which version."""
    versions = list(by_version)
    merged: dict[str, list[Option]] = {}
    for dest in sorted({dest for options in by_version.values() for dest in options}):
        runs: list[tuple[Option | None, list[str]]] = []
        for version in versions:
            option = by_version[version].get(dest)
            if not runs or runs[-1][0] != option:
                runs.append((option, []))
            runs[-1][1].append(version)
        merged[dest] = [{**option, **_range(run, versions)} for option, run in runs if option is not None]
    return merged


def _range(run: Sequence[str], versions: Sequence[str]) -> dict[str, str]:
    first = {} if run[0] == versions[0] else {'since': run[0]}
    return first if run[-1] == versions[-1] else {**first, 'until': run[-1]}


def dump(by_version: Mapping[str, Options]) -> str:
    """The file's text: an option a line."""
    lines = [f'  {json.dumps(dest)}: {json.dumps(variants)}' for dest, variants in merge(by_version).items()]
    return (
        f'{{\n "source": {json.dumps(SOURCE)},\n "versions": {json.dumps(list(by_version))},\n'
        f' "options": {{\n' + ',\n'.join(lines) + '\n }\n}\n'
    )


def known_versions() -> list[str]:
    """The versions in the file, oldest first."""
    return json.loads(DATA.read_text())['versions']


def nearest(version: str) -> str:
    """The known version to check `version` against: itself, or the newest if it is newer than all of them.

    Raises:
        ValueError: An older version, or one between two known ones.
    """
    known = known_versions()
    if version in known:
        return version
    if Version(version) > Version(known[-1]):
        return known[-1]
    raise ValueError(f'timm {version}: {DATA.name} has {", ".join(known)}; add its train.py by {Path(__file__).name}.')


def load_options(version: str) -> Options:
    """The options of a known version."""
    data = json.loads(DATA.read_text())
    index = data['versions'].index
    found: Options = {}
    for dest, variants in data['options'].items():
        for variant in variants:
            since, until = (variant.pop(end, version) for end in ('since', 'until'))
            if index(since) <= index(version) <= index(until):
                found[dest] = variant
    return found


def problems(recipe: Mapping[str, Any], options: Options) -> list[str]:
    """What is wrong with a recipe, a line each: keys that train.py lacks, values that its command line would refuse."""
    return [problem for key, value in recipe.items() if (problem := _problem(key, value, options.get(key)))]


def _problem(key: str, value: Any, option: Option | None) -> str | None:
    if option is None:
        return f'{key}: train.py has no such option'
    if _fits(value, option) or (value is None and option['default'] is None):
        return None
    return f'{key}: {value!r}: expected {_expected(option)}'


def _fits(value: Any, option: Option) -> bool:
    if 'kind' in option:
        return isinstance(value, KINDS[option['kind']][0])
    nargs = option.get('nargs', '?')
    if nargs == '?':
        value = [value]
    elif not isinstance(value, list) or not value or (isinstance(nargs, int) and len(value) != nargs):
        return False
    return all(_is_a(item, option.get('type', 'str')) and item in option.get('choices', [item]) for item in value)


def _is_a(value: Any, type_name: str) -> bool:
    # strings are no numbers here, although argparse converts them: `1e-4` is a string in YAML, `1.0e-4` a number
    if type_name == 'float':
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value).__name__ == type_name


def _expected(option: Option) -> str:
    if 'kind' in option:
        return KINDS[option['kind']][1]
    text = f'one of {option["choices"]}' if 'choices' in option else option.get('type', 'str')
    nargs = option.get('nargs', '?')
    return text if nargs == '?' else f'a list of {nargs if isinstance(nargs, int) else "one or more"}, each {text}'


def main(checkouts: Sequence[str]) -> None:
    if not checkouts:
        sys.exit(__doc__)
    paths = sorted((Path(checkout) for checkout in checkouts), key=lambda path: Version(version_of(path)))
    DATA.write_text(dump({version_of(path): read_options(path) for path in paths}))
    print(f'{DATA}: {", ".join(known_versions())}')


if __name__ == '__main__':
    main(sys.argv[1:])

#!/usr/bin/env python
"""Write the options of timm's train.py to tests/data/train_options.json, which the tests compare with the recipes.

`train.py --config FILE` accepts any key, and checks neither types nor choices. The tests check them instead, and do not
need train.py. The file only has the versions that are given, each as a checkout of its tag:

    python tools/train_options.py ~/timm-1.0.21 ~/timm-1.0.22 ...

An option that changed between the versions has an entry for each range of versions.

After a release of timm, also run `TIMM_SCRIPTS=CHECKOUT pytest tests/train_scripts`. It runs timm's own scripts, which
CI does not have.
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

# default; kind, type, nargs and choices if they differ from argparse's defaults; in the file also since and until
Option = dict[str, Any]
Options = dict[str, Option]
KINDS: dict[str, tuple[type, str]] = {'store_true': (bool, 'true or false'), 'ParseKwargs': (dict, 'a mapping')}

# It runs in a new process in the checkout, where train.py imports the checkout's timm.
READ = """
import importlib.util, json
spec = importlib.util.spec_from_file_location('train', 'train.py')
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
options = {}
for action in train.parser._actions:
    kind = {'_StoreAction': None, '_StoreTrueAction': 'store_true'}.get(type(action).__name__, type(action).__name__)
    options[action.dest] = dict(
        kind=kind,
        type=action.type and action.type.__name__,
        nargs=action.nargs if kind is None else None,
        choices=action.choices and list(action.choices),
        default=action.default,
    )
options.pop('help')
print('OPTIONS', json.dumps(options))
"""


def read_options(checkout: Path) -> Options:
    """Return the options of `checkout`/train.py by the names that a configuration file uses.

    Args:
        checkout: Folder with train.py. If it contains the package timm, train.py imports that, else the installed timm.

    Raises:
        RuntimeError: train.py cannot be imported.
    """
    env = {**os.environ, 'TIMM_ATAC_DISABLE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    result = subprocess.run([sys.executable, '-c', READ], cwd=checkout, env=env, capture_output=True, text=True)
    printed = re.search(r'^OPTIONS (.*)$', result.stdout, re.MULTILINE)
    if printed is None:
        raise RuntimeError(f'{checkout}: expected a folder whose train.py can be imported, but:\n{result.stderr}')
    return {
        dest: {key: value for key, value in option.items() if key == 'default' or value is not None}
        for dest, option in json.loads(printed[1]).items()
    }


def version_of(checkout: Path) -> str:
    """Return the version of the package timm in a checkout."""
    return re.findall(r"__version__ = '(.*)'", (checkout / 'timm' / 'version.py').read_text())[0]


def merge(by_version: Mapping[str, Options]) -> dict[str, list[Option]]:
    """Return the variants of each option, with the range of versions that has them.

    Args:
        by_version: The options of each version, oldest first.
    """
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
    """Return the text of the file, with one option per line."""
    lines = [f'  {json.dumps(dest)}: {json.dumps(variants)}' for dest, variants in merge(by_version).items()]
    return (
        f'{{\n "source": {json.dumps(SOURCE)},\n "versions": {json.dumps(list(by_version))},\n'
        f' "options": {{\n' + ',\n'.join(lines) + '\n }\n}\n'
    )


def known_versions() -> list[str]:
    """Return the versions in the file, oldest first."""
    return json.loads(DATA.read_text())['versions']


def nearest(version: str) -> str:
    """Return `version` if it is in the file, or the newest version of the file if `version` is newer.

    Raises:
        ValueError: `version` is not in the file, and older than its newest version.
    """
    known = known_versions()
    if version in known:
        return version
    if Version(version) > Version(known[-1]):
        return known[-1]
    raise ValueError(f'timm {version}: {DATA.name} has {", ".join(known)}; add its train.py by {Path(__file__).name}.')


def load_options(version: str) -> Options:
    """Return the options of a version in the file."""
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
    """Return one line per key that train.py does not have, and per value that its command line would refuse."""
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
    # argparse would convert a string to a number, but --config does not; in YAML, `1e-4` is a string, `1.0e-4` a number
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
    if not checkouts or '--help' in checkouts:
        sys.exit(__doc__)
    paths = sorted((Path(checkout) for checkout in checkouts), key=lambda path: Version(version_of(path)))
    DATA.write_text(dump({version_of(path): read_options(path) for path in paths}))
    print(f'{DATA}: {", ".join(known_versions())}')


if __name__ == '__main__':
    main(sys.argv[1:])

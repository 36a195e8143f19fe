"""Runs timm's own model tests with our models. The test file is in timm's sdist on the package index."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm

OUR_MODULES = ['aa_resnet', 'atac_host', 'atac_resnet', 'cifar_resnet', 'fa_resnet', 'ge_resnet']
_CACHE = Path(__file__).parents[2] / '.cache'


class OurNames(list):
    """Names of our models, which timm's tests get instead of timm's."""


def fetch() -> Path:
    """Return the path of `tests/test_models.py` of the installed timm. It is downloaded once.

    Raises:
        subprocess.CalledProcessError: pip could not download the sdist; `stderr` has the reason.
    """
    target = _CACHE / f'timm-{timm.__version__}' / 'test_models.py'
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        subprocess.run(
            [
                sys.executable,
                '-m',
                'pip',
                'download',
                '--quiet',
                '--no-deps',
                '--no-binary',
                'timm',
                '--dest',
                folder,
                f'timm=={timm.__version__}',
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        (sdist,) = Path(folder).glob('timm-*.tar.gz')
        with tarfile.open(sdist) as archive:
            file = archive.extractfile(f'{sdist.name.removesuffix(".tar.gz")}/tests/test_models.py')
            assert file is not None
            partial = Path(folder) / 'test_models.py'
            partial.write_bytes(file.read())
        os.replace(partial, target)
    return target


def load(path: Path) -> ModuleType:
    """Import timm's test file with our models in each of its lists of models.

    timm only tests the intermediate features of some model families. The family is ignored here, so that our models are
    tested too.
    """
    list_models = timm.list_models

    def list_ours(filter: Any = '', module: Any = '', **kwargs: Any) -> OurNames:
        ours = list_models(module=OUR_MODULES, **kwargs)
        allowed = set(list_models(filter, **kwargs))
        return OurNames(name for name in ours if name in allowed)

    spec = importlib.util.spec_from_file_location('timm_test_models', path)
    assert spec is not None and spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    timm.list_models = list_ours  # type: ignore[assignment]  # the signature is less precise
    try:
        spec.loader.exec_module(tests)
    finally:
        timm.list_models = list_models
    return tests


def select(tests: ModuleType) -> dict[str, Callable]:
    """Return the test functions that are parametrized over a list of models and need no download."""
    return {
        name: function
        for name, function in vars(tests).items()
        if name.startswith('test_') and 'pretrained' not in name and _parameters(function)
    }


def tested_models(function: Callable) -> set[str]:
    """The models that a test of `select` has as parameters."""
    names = [parameter if isinstance(parameter, str) else parameter.values[0] for parameter in _parameters(function)]
    return {timm.models.get_arch_name(name) if '.' in name else name for name in names}


def mark(function: Callable, marker: pytest.MarkDecorator, but: Sequence[str]) -> None:
    """Mark a test of `select` for all models but those whose names fit one of the patterns."""
    names = _parameters(function)
    names[:] = [
        name if any(fnmatch(name, pattern) for pattern in but) else pytest.param(name, marks=marker) for name in names
    ]


def _parameters(function: Callable) -> OurNames:
    for marker in getattr(function, 'pytestmark', []):
        if marker.name == 'parametrize' and marker.args[0] == 'model_name' and isinstance(marker.args[1], OurNames):
            return marker.args[1]
    return OurNames()

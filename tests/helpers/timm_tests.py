"""timm's own model tests, bound to our models: the file comes with timm's sdist from the package index."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import timm

OUR_MODULES = ['aa_resnet', 'atac_host', 'atac_resnet', 'cifar_resnet', 'fa_resnet', 'ge_resnet']
_CACHE = Path(__file__).parents[2] / '.cache'


class OurNames(list):
    """Model names of ours: what timm's tests get for a list of models."""


def fetch() -> Path:
    """Get `tests/test_models.py` of the installed timm, from the cache or the package index.

    Raises:
        subprocess.CalledProcessError: pip could not get the sdist; `stderr` says why.
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
    """Import timm's test file so that each list of models in it is a list of ours.

    timm names the module families that get its tests of intermediate features; the family is ignored here, so that
    ours get them as well.
    """
    list_models = timm.list_models

    def list_ours(filter: Any = '', module: Any = '', **kwargs: Any) -> OurNames:
        ours = list_models(module=OUR_MODULES, **kwargs)
        allowed = set(list_models(filter, **kwargs))
        return OurNames(name for name in ours if name in allowed)

    spec = importlib.util.spec_from_file_location('timm_test_models', path)
    assert spec is not None and spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    timm.list_models = list_ours  # type: ignore[assignment]  # less precise on purpose
    try:
        spec.loader.exec_module(tests)
    finally:
        timm.list_models = list_models
    return tests


def select(tests: ModuleType) -> dict[str, Callable]:
    """The test functions that run over a list of models and need no download."""
    return {
        name: function
        for name, function in vars(tests).items()
        if name.startswith('test_') and 'pretrained' not in name and _model_names(function)
    }


def _model_names(function: Callable) -> OurNames:
    for mark in getattr(function, 'pytestmark', []):
        if mark.name == 'parametrize' and mark.args[0] == 'model_name' and isinstance(mark.args[1], OurNames):
            return mark.args[1]
    return OurNames()

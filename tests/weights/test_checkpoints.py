"""timm_atac/weights/checkpoints.py: `.params` files as timm's checkpoints."""

import pickle
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import _factory, _helpers

from timm_atac import _register, _timm, write_params
from timm_atac.weights.checkpoints import is_params_file
from timm_atac.weights.convert import ConversionError, to_arrays

NAME = 'atac_resnet8_cifar'
FILE = Path(__file__).parents[1] / 'data' / 'cifar_b1_atac.params'


@pytest.fixture
def expected() -> Any:
    overlay = dict(file=str(FILE), custom_load=True)
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize('name', ['net.params', 'net.pth', 'net'])
def test_checkpoint_path(expected, tmp_path, name) -> None:
    """As in timm.create_model and `train.py --initial-checkpoint`; the file's name has no meaning."""
    path = tmp_path / name
    shutil.copy(FILE, path)
    assert same(timm.create_model(NAME, checkpoint_path=str(path)), expected)


def test_load_checkpoint(expected) -> None:
    """`validate.py --checkpoint` calls it."""
    paths: list[Any] = [str(FILE), FILE]
    for path in paths:
        model: Any = timm.create_model(NAME)
        assert timm.models.load_checkpoint(model=model, checkpoint_path=path) is None
        assert same(model, expected)


def test_the_file_fits_the_model_and_not_its_tag(tmp_path) -> None:
    """The classes are those of the model, as in every checkpoint, and a file is not compared with the published one."""
    source: Any = timm.create_model(NAME, num_classes=3, in_chans=1)
    write_params(tmp_path / 'net.params', to_arrays(source))
    path = str(tmp_path / 'net.params')
    assert same(timm.create_model(NAME, num_classes=3, in_chans=1, checkpoint_path=path), source)
    with pytest.raises(ConversionError, match=r"'output\.weight' is \(3, 64\)"):
        timm.create_model(NAME, checkpoint_path=path)


def test_all_others_are_as_before(tmp_path) -> None:
    model: Any = timm.create_model(NAME)
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    loaded = timm.models.load_checkpoint(timm.create_model(NAME), str(tmp_path / 'own.pth'), strict=False)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):  # in the format of our networks, which this is not
        timm.create_model('test_resnet', checkpoint_path=str(FILE))
    with pytest.raises(FileNotFoundError):
        timm.create_model(NAME, checkpoint_path=str(tmp_path / 'missing.params'))
    with pytest.raises(FileNotFoundError):
        timm.create_model(NAME, checkpoint_path=str(tmp_path))


def test_the_wrapper_looks_like_the_function() -> None:
    wrapper: Any = timm.models.load_checkpoint
    assert wrapper is _helpers.load_checkpoint is _factory.load_checkpoint
    assert pickle.loads(pickle.dumps(wrapper)) is wrapper
    assert signature(wrapper) == signature(wrapper.__wrapped__)
    assert not hasattr(wrapper.__wrapped__, '__wrapped__')
    _register.register()
    assert timm.models.load_checkpoint is wrapper


def test_a_timm_without_this_function(monkeypatch) -> None:
    for module in (timm.models, _helpers, _factory):
        monkeypatch.delattr(module, 'load_checkpoint')
    monkeypatch.setattr(_timm, '_CHECKPOINT_MODULES', (*_timm._CHECKPOINT_MODULES, 'timm.models._gone'))
    _register.register()


@pytest.mark.parametrize('path', [None, 3, '', '.', 'missing', 'with\0zero', FILE.parent, np.zeros(3)], ids=repr)
def test_no_params_file(path) -> None:
    assert not is_params_file(path)
    assert is_params_file(FILE) and is_params_file(str(FILE))

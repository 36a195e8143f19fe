"""Every registered model passes timm's `tests/test_models.py` of the installed version."""

import os
import subprocess

import pytest
import timm
import timm_tests

try:
    _tests = timm_tests.load(timm_tests.fetch())
except subprocess.CalledProcessError as error:
    if os.environ.get('CI'):
        raise RuntimeError(f"timm's tests cannot be downloaded: {error.stderr}") from error
    pytest.skip(f"timm's tests cannot be downloaded from the package index: {error.stderr}", allow_module_level=True)

_selected = timm_tests.select(_tests)
globals().update(_selected)
if hasattr(_tests, 'cfg_device'):
    cfg_device = _tests.cfg_device  # a fixture of timm

# tests that take long for a deep network; those of outputs, features and training are always run
LONG = ('fx', 'prune', 'torchscript')
SHALLOW = ('*_cifar', 'atac_host', 'atac_resnet18', 'atac_resnet50')
for _name, _test in _selected.items():
    if any(word in _name for word in LONG):
        timm_tests.mark(_test, pytest.mark.weekly, but=SHALLOW)

pytestmark = [pytest.mark.network, pytest.mark.filterwarnings('ignore')]  # warnings come from timm's tests


def test_all_of_ours_are_tested() -> None:
    ours = set(timm.list_models(module=timm_tests.OUR_MODULES))
    assert len(ours) >= 14
    for name in (
        'test_model_forward',
        'test_model_backward',
        'test_model_default_cfgs',
        'test_model_forward_features',
        'test_model_forward_intermediates',
        'test_model_forward_intermediates_features',
        'test_model_forward_torchscript',
        'test_model_forward_fx',
        'test_model_backward_fx',
        'test_prune_intermediate_layers_contract',
    ):
        if not hasattr(_tests, name):  # a test that this timm does not have yet
            continue
        assert timm_tests.tested_models(_selected[name]) == ours, name

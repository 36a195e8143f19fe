"""The authors' arrays into our networks and back, with the cases of `test_parity.py`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from authors_networks import CASES, Case, build, draw, error

from timm_atac import read_params, write_params
from timm_atac.weights.convert import ConversionError, to_arrays, to_state_dict
from timm_atac.weights.names import FIXED

DATA = Path(__file__).parents[1] / 'data'


def drawn(case: Case) -> dict[str, np.ndarray]:
    """Return the arrays of the authors' network in a case, in float32."""
    shapes = json.loads(str(case['param_shapes']))
    arrays = {n: draw(n, shape, case.options['seed']).numpy() for n, shape in shapes.items()}
    fixed = {n: np.full_like(arrays[n], value) for n, value in FIXED.items() if n in arrays}
    return {**arrays, **fixed}


@pytest.mark.parametrize('stem, tolerance', [('cifar_b1_atac', 5e-5), ('cifar_b1_atac_fp16', 2e-3)])
def test_files_of_mxnet(stem, tolerance) -> None:
    """The logits are those that MXNet computed with the file's parameters."""
    case = CASES[0]
    model: Any = timm.create_model('atac_resnet8_cifar')
    model.load_state_dict(to_state_dict(read_params(DATA / f'{stem}.params'), model))
    x = torch.from_numpy(np.random.RandomState(case.options['seed']).standard_normal((4, 3, 32, 32)).astype('f4'))
    with torch.inference_mode():
        found = error(model.eval()(x), case['eval_logits'])
    print(f'{stem}: {found:.1e}')
    assert found <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=str)
def test_there_and_back(case, tmp_path) -> None:
    """Every array of all nine networks goes through a float16 file into the model and back without a change."""
    arrays = {
        name: array.astype(np.float16 if name.endswith(('.weight', '.bias')) else np.float32)
        for name, array in drawn(case).items()
    }
    write_params(tmp_path / 'net.params', arrays)
    model = build(case)
    state_dict = to_state_dict(read_params(tmp_path / 'net.params'), model)
    model.load_state_dict(state_dict)
    assert {t.dtype for t in state_dict.values()} == {torch.float32}
    back = to_arrays(model)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == np.float32
        assert np.array_equal(back[name], array.astype(np.float32)), name


def small() -> tuple[Any, dict[str, np.ndarray]]:
    return timm.create_model('atac_resnet8_cifar'), dict(read_params(DATA / 'cifar_b1_atac.params'))


def test_all_faults_in_one_error() -> None:
    model, arrays = small()
    del arrays['features.1.weight'], arrays['output.bias']
    arrays['layer9\x1b[2J'] = np.ones(3, np.float32)
    arrays['output.weight'] = arrays['output.weight'][:, :60]
    arrays['features.5.beta'] = arrays['features.5.beta'].astype(np.float64)
    arrays['features.0.gamma'] = np.full(3, 2, np.float32)
    arrays['features.0.beta'] = np.array([0, 0, np.nan], np.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConversionError) as caught:
        to_state_dict(arrays, model)
    heading, *problems = str(caught.value).splitlines()
    assert 'A file of 112 arrays does not fit this CifarResNet of 113;' in heading
    assert sorted(line.strip() for line in problems) == sorted(
        [
            "missing: 'features.1.weight' (16, 3, 3, 3)",
            "missing: 'output.bias' (10,)",
            "surplus: 'layer9\\x1b[2J' (3,)",
            "misfit: 'output.weight' is (10, 60) of float32, expected (10, 64) of float16 or float32",
            "misfit: 'features.5.beta' is (64,) of float64, expected (64,) of float16 or float32",
            "misfit: 'features.0.gamma' is not 1 everywhere; our data norm has no affine",
            "misfit: 'features.0.beta' is not 0 everywhere; our data norm has no affine",
        ]
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('kwargs', [dict(atac_stages=(1, 3)), dict(act_layer='relu'), dict(rd_ratio=0.25)], ids=str)
def test_another_variant(kwargs) -> None:
    _, arrays = small()
    with pytest.raises(ConversionError, match='trained with the same arguments'):
        to_state_dict(arrays, timm.create_model('atac_resnet8_cifar', **kwargs))


def test_other_classes_and_channels() -> None:
    """A model with other inputs and outputs takes all arrays in the shapes of the file."""
    _, arrays = small()
    model = timm.create_model('atac_resnet8_cifar', in_chans=1, num_classes=0)
    found = to_state_dict(arrays, model, in_chans=3, num_classes=10)
    assert found['conv1.weight'].shape == (16, 3, 3, 3)
    assert found['data_bn.running_mean'].shape == (3,)
    assert found['fc.weight'].shape == (10, 64)
    with pytest.raises(ConversionError, match=r"'output.weight' is \(10, 64\) of float32, expected \(0, 64\)"):
        to_state_dict(arrays, model, in_chans=3)
    with pytest.raises(ConversionError, match='no classifier'):
        to_arrays(model)


def test_arrays_are_copies() -> None:
    """The tensors are copies: a change to them does not change the arrays of the file."""
    model, arrays = small()
    state_dict = to_state_dict(arrays, model)
    state_dict['conv1.weight'].zero_()
    assert arrays['features.1.weight'].any()

"""timm_atac/gates/pictures.py: pictures of one model, and of several side by side."""

import builtins
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from networks import wild_units
from PIL import Image
from timm.layers import SEModule

import timm_atac
from timm_atac import ATAC, gate
from timm_atac.gates.pictures import (
    check_comparable,
    compare_picture,
    gate_maps,
    gates_picture,
    plot_comparison,
    plot_gates,
)


def photo(*size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    'kwargs, img_size, mode, seen', [({'in_chans': 1}, 8, 'RGB', (1, 8, 8)), ({}, None, 'L', (3, 32, 32))]
)
def test_picture_of_a_model(tmp_path, kwargs, img_size, mode, seen) -> None:
    model = wild_units(timm.create_model('atac_resnet8_cifar', **kwargs))
    inputs: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    image = photo(40, 60, 3).convert(mode)
    gates = gates_picture(model, image, tmp_path / 'gates.png', 'a title', img_size)
    assert [tuple(x.shape) for x in inputs] == [(1, *seen)]
    assert gates.keys() == gate_maps(model, inputs[0]).keys()
    mean = 0.4914 if seen[0] == 3 else (0.4914 + 0.4822 + 0.4465) / 3
    std = 0.2023 if seen[0] == 3 else (0.2023 + 0.1994 + 0.2010) / 3
    values = inputs[0][0, 0] * std + mean
    assert values.min() > -1e-6 and values.max() < 1 + 1e-6
    grey = np.asarray(image.convert('L')).mean() / 255
    assert abs(values.mean() - grey) < 0.05
    with Image.open(tmp_path / 'gates.png') as picture:
        assert np.asarray(picture).std() > 20


def test_picture_of_a_model_of_five_channels(tmp_path) -> None:
    model = timm.create_model('atac_resnet8_cifar', in_chans=5)
    with pytest.raises(ValueError, match=r'takes images of 5 channels: expected 1 \(grey\) or 3 \(RGB\)'):
        gates_picture(model, photo(8, 8), tmp_path / 'gates.png')


CIFAR: dict[str, dict[str, Any]] = {
    'ReLU': {'model_name': 'resnet8_cifar'},
    'SE': {'model_name': 'resnet8_cifar', 'attn_layer': 'se'},
    'LocalSENet': {'model_name': 'resnet8_cifar', 'attn_layer': 'local_se'},
    'SEActivation': {'model_name': 'resnet8_cifar', 'act_layer': 'se_act'},
    'ATAC': {'model_name': 'atac_resnet8_cifar'},
}
RESNET: dict[str, dict[str, Any]] = {  # its third stage has a Bottleneck, the others have BasicBlocks
    'ReLU': {'model_name': 'test_resnet'},
    'SE': {'model_name': 'test_resnet', 'block_args': {'attn_layer': 'se'}},
    'ATAC': {'model_name': 'test_resnet', 'act_layer': 'atac'},
}


def compare(path: Any, table: Mapping[str, Any], *labels: str, **kwargs: Any) -> dict[str, dict[str, torch.Tensor]]:
    models = {label: timm.create_model(**table[label]) for label in labels}
    return compare_picture(models, photo(40, 60, 3), path / 'gates.png', **kwargs)


STAGES = [f'stages.{stage}.0' for stage in range(3)]
LAYERS = [f'layer{layer}.0' for layer in range(1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize(
    'table, own',
    [
        # ReLU has an activation of the name of ATAC's; SE has another name
        (CIFAR, {'ReLU': ['act2'] * 3, 'SE': ['attn'] * 3, 'ATAC': ['act2'] * 3}),
        # LocalSE does not replace an activation, so it does not determine the name
        (CIFAR, {'LocalSENet': ['attn'] * 3, 'ReLU': ['act2'] * 3}),
        (CIFAR, {'LocalSENet': ['attn'] * 3, 'ATAC': ['act2'] * 3, 'SEActivation': ['act2'] * 3}),
        # without units, the last activation before the addition
        (RESNET, {'ReLU': ['act1', 'act1', 'act2', 'act1'], 'SE': ['se'] * 4}),
        # with units after the addition, the activation after the addition
        (
            RESNET,
            {'SE': ['se'] * 4, 'ATAC': ['act2', 'act2', 'act3', 'act2'], 'ReLU': ['act2', 'act2', 'act3', 'act2']},
        ),
    ],
)
def test_which_gates_are_side_by_side(tmp_path, table, own) -> None:
    gates = compare(tmp_path, table, *own, img_size=32)
    places = STAGES if table is CIFAR else LAYERS
    assert {label: list(column) for label, column in gates.items()} == {
        label: [f'{place}.{name}' for place, name in zip(places, names, strict=True)] for label, names in own.items()
    }


@pytest.mark.slow
def test_places_outside_of_blocks(tmp_path) -> None:
    gates = compare(tmp_path, CIFAR, 'ReLU', 'ATAC')
    assert [list(column) for column in gates.values()] == [[f'{place}.act2' for place in STAGES] + ['act']] * 2


@pytest.mark.slow
def test_a_comparison(tmp_path) -> None:
    """Every model gets the same image with its own normalisation, and `compare_picture` returns and draws its gates."""
    models = {label: wild_units(timm.create_model(**CIFAR[label])) for label in ('ReLU', 'SE', 'ATAC')}
    models['SE'].pretrained_cfg = {**models['SE'].pretrained_cfg, 'mean': (0, 0, 0), 'std': (1, 1, 1), 'crop_pct': 0.5}
    inputs: dict[str, torch.Tensor] = {}
    for label, model in models.items():
        model.register_forward_pre_hook(lambda model, args, label=label: inputs.update({label: args[0]}))
    gates = compare_picture(models, photo(40, 60, 3), tmp_path / 'gates.png', 'a title')
    torch.testing.assert_close(inputs['ReLU'], inputs['ATAC'])
    mean, std = (torch.tensor(models['ReLU'].pretrained_cfg[key])[:, None, None] for key in ('mean', 'std'))
    torch.testing.assert_close(inputs['SE'], inputs['ReLU'] * std + mean)
    for label, cls in {'ReLU': nn.ReLU, 'SE': SEModule, 'ATAC': ATAC}.items():
        of_its_own = gate_maps(models[label], inputs[label], cls)
        assert all(torch.equal(values, of_its_own[name]) for name, values in gates[label].items())
    assert gates['SE']['stages.2.0.attn'].shape == (1, 64, 1, 1)
    with Image.open(tmp_path / 'gates.png') as picture:
        assert picture.width <= 3 * 500 and np.asarray(picture).std() > 20


def test_comparison_errors(tmp_path) -> None:
    def fails(models: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_comparable(models)
        with pytest.raises(ValueError, match=message):
            compare_picture(models, photo(8, 8), tmp_path / 'gates.png')

    relu, grey = (timm.create_model('resnet8_cifar', in_chans=chans) for chans in (3, 1))
    fails({}, '0 models: expected at least two')
    fails({'ReLU': relu}, '1 model: expected at least two to compare; gates_picture draws one')
    fails({'ReLU': relu, 'grey': grey}, 'different images: ReLU 3x32x32, grey 1x32x32')
    resnet: Any = timm.create_model('test_resnet')
    fails({'ReLU': relu, 'R': resnet}, 'different images: ReLU 3x32x32, R 3x160x160. .*compare_picture.*img_size=')
    resnet.pretrained_cfg = {**resnet.pretrained_cfg, 'input_size': (3, 32, 32)}
    fails({'A': relu, 'B': resnet}, r'no block .* in common: A: stages.0.0, .*, act; B: conv1, .*, layer4.0')
    plain = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match='B: none'):
        check_comparable({'A': relu, 'B': plain}, img_size=32)
    with pytest.raises(ValueError, match='as many layers of each model'):
        plot_comparison({'A': {'act': torch.rand(1, 2, 2, 2)}, 'B': {}}, np.zeros((8, 8)), tmp_path / 'gates.png')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_registered_activation_is_compared(tmp_path) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    gate.register(Half, lambda module, x: torch.full_like(x, 0.5))
    models = {label: timm.create_model('resnet8_cifar', act_layer=act) for label, act in (('a', Half), ('b', 'silu'))}
    assert len(compare_picture(models, photo(32, 32), tmp_path / 'gates.png')['a']) == 4


def test_arguments_of_a_wrong_kind(tmp_path) -> None:
    model, image, path = timm.create_model('atac_resnet8_cifar'), photo(8, 8), tmp_path / 'gates.png'
    calls: list[tuple[Any, str]] = [
        (lambda: compare_picture([model, model], image, path), 'models is a list: expected a mapping label -> model'),  # type: ignore[arg-type]
        (lambda: compare_picture({'a': model, 'b': 3}, image, path), r"models\['b'\] is a int: expected a network"),  # type: ignore[dict-item]
        (lambda: gates_picture('atac_resnet50', image, path), 'model is a str: expected a network'),  # type: ignore[arg-type]
        (lambda: gates_picture(model, 'red.png', path), 'image is a str: expected a PIL image'),  # type: ignore[arg-type]
        (lambda: gate_maps(model, [1]), 'x is a list: expected a tensor'),  # type: ignore[arg-type]
        (lambda: plot_gates([1], image, path), 'gates is a list: expected a mapping name -> gates'),  # type: ignore[arg-type]
        (lambda: plot_comparison({'a': [1]}, image, path), 'expected a mapping label -> gates'),  # type: ignore[dict-item]
        (lambda: plot_gates({'a': torch.rand(1, 2, 2, 2)}, 'red.png', path), 'image is a str'),  # type: ignore[arg-type]
    ]
    for call, message in calls:
        with pytest.raises(TypeError, match=message):
            call()
    assert not path.exists()


def test_public_names() -> None:
    assert timm_atac.viz.gate_maps is gate_maps
    assert 'viz' in dir(timm_atac)
    assert dir(timm_atac.viz) == sorted(timm_atac.viz.__all__)
    assert {'check_comparable', 'compare_picture', 'gate_maps', 'gated_units', 'gates_picture'} <= {*dir(timm_atac.viz)}
    assert all(callable(getattr(timm_atac.viz, name)) for name in dir(timm_atac.viz))


def test_without_matplotlib(tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match='pip install matplotlib'):
        plot_gates({'act': torch.rand(1, 8, 2, 2)}, np.zeros((8, 8)), tmp_path / 'gates.png')


@pytest.mark.slow
def test_pyplot_and_the_users_settings_are_left_alone(python, tmp_path) -> None:
    code = (
        'import sys, numpy, torch\n'
        'from timm_atac import viz\n'
        "assert 'matplotlib' not in sys.modules\n"
        'import matplotlib\n'
        "matplotlib.rcParams['lines.linewidth'] = 7\n"
        'before = matplotlib.rcParams.copy()\n'
        f"viz.plot_gates({{'act': torch.rand(1, 8, 2, 2)}}, numpy.zeros((8, 8)), {str(tmp_path / 'gates.png')!r})\n"
        'assert matplotlib.rcParams.copy() == before\n'
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    python(code)

import builtins
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.layers import SEModule
from timm.layers.activations import GELUTanh

import timm_atac
from timm_atac import ATAC, LocalSE, NiN, SEActivation, gate, replace_activations
from timm_atac.plot import _layer
from timm_atac.viz import check_comparable, compare_picture, gate_maps, gates_picture, plot_comparison, plot_gates


class Case(NamedTuple):
    model: str
    kwargs: dict[str, Any]
    image: tuple[int, ...]
    units: int
    shapes: dict[str, tuple[int, ...]]  # of the first and the last, and of special ones


B = 2
CASES = [
    Case(
        'resnet18',
        {'act_layer': 'atac'},
        (3, 64, 96),
        17,
        {'act1': (64, 32, 48), 'layer1.0.act1': (64, 16, 24), 'layer4.1.act2': (512, 2, 3)},
    ),
    Case('atac_resnet18', {}, (3, 64, 64), 4, {'layer3.0.act1': (256, 4, 4), 'layer4.1.act1': (512, 2, 2)}),
    Case(
        'resnet8_cifar',
        {'act_layer': 'se_act'},
        (3, 32, 32),
        7,
        {'stages.0.0.act1': (16, 1, 1), 'act': (64, 1, 1)},
    ),
    Case(
        'resnet8_cifar',
        {'attn_layer': 'local_se', 'in_chans': 1},
        (1, 8, 8),
        3,
        {'stages.0.0.attn': (16, 8, 8), 'stages.2.0.attn': (64, 2, 2)},
    ),
    # a Linear tells NLC, and the maps are (B, H, W, C)
    Case(
        'test_convnext',
        {'act_layer': 'atac'},
        (3, 64, 96),
        9,
        {'stages.0.blocks.0.mlp.act': (96, 16, 24), 'stages.3.blocks.1.mlp.act': (256, 2, 3)},
    ),
    Case(
        'test_vit',
        {'act_layer': 'atac', 'img_size': 64},
        (3, 64, 64),
        6,
        {'blocks.0.mlp.act': (192, 17), 'blocks.5.mlp.act': (192, 17)},
    ),
    Case(
        'test_vit',
        {'act_layer': 'se_act', 'img_size': 64},
        (3, 64, 64),
        6,
        {'blocks.0.mlp.act': (192, 1, 1), 'blocks.5.mlp.act': (192, 1, 1)},
    ),
    Case(
        'atac_resnet18',
        {'features_only': True},
        (3, 64, 64),
        4,
        {'layer3.0.act1': (256, 4, 4), 'layer4.1.act1': (512, 2, 2)},
    ),
    Case(
        'atac_host',
        {'host': 'test_resnet'},
        (3, 64, 64),
        12,
        {'conv1.2': (16, 32, 32), 'layer4.0.act2': (96, 2, 2)},
    ),
]


@pytest.fixture(scope='module')
def small() -> Any:
    return wild(timm.create_model('atac_resnet8_cifar', in_chans=1)).eval()


def wild(model: nn.Module) -> Any:
    """The last norm of a new unit leaves its gates around 0.5: give them all values."""
    units: list[Any] = [unit for unit in model.modules() if isinstance(unit, ATAC)]
    for unit in units:
        nn.init.normal_(unit.bn2.weight, 2, 1)
        nn.init.normal_(unit.bn2.bias)
    return model


def photo(*size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))


@pytest.mark.parametrize('case', CASES, ids=lambda case: f'{case.model}-{"-".join(map(str, case.kwargs.values()))}')
def test_shapes_and_values(case) -> None:
    model = wild(timm.create_model(case.model, **case.kwargs)).eval()
    inputs: dict[str, torch.Tensor] = {}  # in the order of the forward pass
    for name, unit in model.named_modules():
        if isinstance(unit, ATAC):
            unit.register_forward_pre_hook(lambda unit, args, name=name: inputs.update({name: args[0].clone()}))
    gates = gate_maps(model, torch.randn(B, *case.image))

    names = list(gates)
    assert names == list(inputs) and len(names) == case.units
    assert (names[0], names[-1]) == (next(iter(case.shapes)), next(reversed(case.shapes)))
    assert {name: tuple(gates[name].shape) for name in case.shapes} == {k: (B, *s) for k, s in case.shapes.items()}
    for name, x in inputs.items():
        torch.testing.assert_close(gates[name], expected(model.get_submodule(name), x), rtol=1e-5, atol=1e-6)
        assert gates[name].std() > 0.05


@torch.no_grad()
def expected(unit: Any, x: torch.Tensor) -> torch.Tensor:
    """Gates of each position by itself, as of an image of one pixel."""
    x = x if unit.input_fmt in ('NHWC', 'NLC') else x.movedim(1, -1)
    if isinstance(unit, SEActivation):
        x = x.flatten(1, -2).mean(1)[:, None, None]
    pixels = x.reshape(-1, x.shape[-1])[..., None, None]
    return torch.sigmoid(unit.bottleneck(pixels)).reshape(x.shape).movedim(-1, 1)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_any_dtype(dtype) -> None:
    model = replace_activations(timm.create_model('test_resnet', dtype=dtype))
    gates = gate_maps(model, torch.randn(1, 3, 32, 32))
    assert len(gates) == 12 and all(g.dtype == torch.float32 for g in gates.values())
    assert all(not g.is_inference() and not g.requires_grad for g in gates.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_any_device() -> None:
    gates = gate_maps(timm.create_model('atac_resnet8_cifar').cuda(), torch.randn(1, 3, 32, 32))
    assert {g.device.type for g in gates.values()} == {'cpu'}


class Twice(nn.Module):
    """Calls one unit twice, on different shapes, another one never, and raises where it should."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.unused = nn.Conv2d(3, 8, 1), ATAC(8), ATAC(8)
        self.calls: torch.Tensor
        self.register_buffer('calls', torch.zeros(()))
        self.fails = False

    def forward(self, x):
        self.calls += 1
        x = self.act(self.conv(x))
        if self.fails:
            raise RuntimeError('as it should')
        return self.act(x[..., ::2])


def test_a_unit_that_is_called_twice_and_one_that_is_not() -> None:
    gates = gate_maps(Twice(), torch.randn(1, 3, 4, 6))
    assert {name: tuple(g.shape) for name, g in gates.items()} == {'act': (1, 8, 4, 6), 'act#2': (1, 8, 4, 3)}


def test_hooks_of_others_may_change_the_output() -> None:
    model = nn.Sequential(ATAC(3))
    model[0].register_forward_hook(lambda module, args, output: output.flatten(2))
    assert gate_maps(model, torch.randn(1, 3, 4, 6))['0'].shape == (1, 3, 4, 6)


@pytest.mark.parametrize('fails', [False, True])
def test_the_model_is_as_before(fails) -> None:
    model = Twice()
    model.fails = fails
    model.act.bn1.eval()  # each module has a mode of its own
    heard: list[int] = []
    model.act.register_forward_hook(lambda *_: heard.append(1))
    before = [(dict(m._forward_hooks), m.training) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grad = torch.is_grad_enabled()
    if fails:
        with pytest.raises(RuntimeError, match='as it should'):
            gate_maps(model, torch.randn(1, 3, 4, 6))
    else:
        gate_maps(model, torch.randn(1, 3, 4, 6))
    assert heard == [1] * (1 if fails else 2)
    assert [(dict(m._forward_hooks), m.training) for m in model.modules()] == before
    assert model.state_dict().keys() == state.keys() and model.training and torch.is_grad_enabled() == grad
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_output_is_as_before_and_it_trains(small) -> None:
    x = torch.randn(2, 1, 8, 8)
    y = small(x)
    loss = y.sum()
    gate_maps(small, x)
    loss.backward()  # through what was computed before
    assert torch.equal(small(x), y)


def test_a_cache_of_the_host_is_not_left_behind() -> None:
    model = timm.create_model('levit_128s', act_layer='atac', num_classes=0)
    gate_maps(model, torch.randn(1, 3, 224, 224))
    assert not any(m.attention_bias_cache for m in model.modules() if hasattr(m, 'attention_bias_cache'))


@pytest.mark.skipif(not hasattr(torch.compiler, 'set_stance'), reason='PyTorch before 2.6')
def test_a_compiled_model(small) -> None:
    x = torch.randn(1, 1, 8, 8)
    model: Any = torch.compile(small, backend='eager')
    with torch.no_grad():
        y = model(x)
    assert [name.removeprefix('_orig_mod.') for name in gate_maps(model, x)] == list(gate_maps(small, x))
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    'model, shape, message',
    [
        (lambda: nn.Conv2d(3, 3, 1), (1, 3, 8, 8), 'Conv2d has no unit with a gate .* timm_atac.replace_activations'),
        (lambda: NiN(3), (1, 3, 8, 8), 'NiN has no unit with a gate'),
        (lambda: ATAC(3, gate_layer=None), (1, 3, 8, 8), 'ATAC has no unit with a gate'),
        (lambda: LocalSE(3), (3, 8, 8), r'x of shape \(3, 8, 8\): expected images \(B, C, H, W\)'),
        (lambda: LocalSE(3), (0, 3, 8, 8), r'x of shape \(0, 3, 8, 8\): expected .* at least one'),
        (ATAC, (1, 3, 8, 8), 'created without `channels`'),
    ],
)
def test_errors(model, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        gate_maps(model(), torch.zeros(shape))


def test_error_if_none_is_called() -> None:
    model = nn.Conv2d(3, 3, 1)
    model.unit = ATAC(3)  # type: ignore[assignment]
    with pytest.raises(ValueError, match='calls none of its 1 units'):
        gate_maps(model, torch.zeros(1, 3, 8, 8))


def test_gates_of_activations_that_write_over_their_input() -> None:
    model = timm.create_model('resnet8_cifar').eval()
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            assert module.inplace
            module.register_forward_pre_hook(lambda act, args, name=name: inputs.update({name: args[0].clone()}))
    gates = gate_maps(model, torch.randn(B, 3, 32, 32), nn.ReLU)
    assert list(gates) == list(inputs) and len(gates) == 7
    assert all(torch.equal(gates[name], (inputs[name] > 0).float()) for name in gates)


def test_gates_of_several_types(small) -> None:
    """The units' gates are those that they have when they run, and a unit that runs for its gate is not counted."""
    x = torch.randn(1, 1, 8, 8)
    model = wild(timm.create_model('resnet8_cifar', in_chans=1, act_layer='atac', attn_layer='se'))
    gates = gate_maps(model, x, (ATAC, SEModule, nn.ReLU))
    units = gate_maps(model, x)
    assert [name for name in gates if name in units] == list(units)
    assert all(torch.equal(gates[name], units[name]) for name in units)
    kinds = [type(model.get_submodule(name)) for name in gates]
    assert [kinds.count(cls) for cls in (type(model.act), SEModule, nn.ReLU)] == [7, 3, 10]
    assert gates['stages.1.0.attn'].shape == (1, 32, 1, 1) and gates['act.act'].shape == (1, 32, 2, 2)


@pytest.mark.parametrize(
    'model, kwargs, name, shape',
    [
        ('test_convnext', {}, 'stages.0.blocks.0.mlp.act', (96, 16, 16)),
        ('test_vit', {'img_size': 64}, 'blocks.0.mlp.act', (192, 17)),
    ],
)
def test_the_layout_of_activations(model, kwargs, name, shape) -> None:
    gates = gate_maps(timm.create_model(model, **kwargs), torch.randn(1, 3, 64, 64), (nn.GELU, GELUTanh))
    assert gates[name].shape == (1, *shape)


@pytest.mark.parametrize('fails', [False, True])
def test_the_model_is_as_before_the_gates_of_types(fails) -> None:
    model = Twice()
    model.fails = fails
    before = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError, match='as it should'):
            gate_maps(model, torch.randn(1, 3, 4, 6), ATAC)
    else:
        assert list(gate_maps(model, torch.randn(1, 3, 4, 6), ATAC)) == ['act', 'act#2']
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training) for m in model.modules()] == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_errors_of_types(small) -> None:
    x = torch.zeros(1, 1, 8, 8)
    for types in ([nn.ReLU], 'relu', (nn.ReLU, 'relu')):
        with pytest.raises(TypeError, match=r'^types=.*: expected a type or a tuple of types'):
            gate_maps(small, x, types)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match='Conv2d: its gate is not known'):
        gate_maps(small, x, nn.Conv2d)
    with pytest.raises(TypeError, match='NiN has no gate'):
        gate_maps(small, x, (nn.ReLU, NiN))
    with pytest.raises(ValueError, match=r'CifarResNet has no module of types=\(GELU, SEModule\)'):
        gate_maps(small, x, (nn.GELU, SEModule))
    with pytest.raises(ValueError, match='calls none of its 1 modules of these types'):
        model = nn.Conv2d(1, 1, 1)
        model.unused = nn.ReLU()  # type: ignore[assignment]
        gate_maps(model, x, nn.ReLU)


def draw(gates: dict[str, torch.Tensor], image: Any, path: Any, title: str | None = None) -> np.ndarray:
    plot_gates(gates, image, path, title)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing left beside it
    with Image.open(path) as picture:
        assert picture.format == 'PNG' and picture.width <= 1600
        return np.asarray(picture.convert('RGB')).astype(int)


def test_the_map_follows_the_gates(tmp_path) -> None:
    """A layer with a bright corner, and the same turned by half: only those two corners of its map differ."""
    gates = torch.full((1, 4, 8, 8), 0.4)
    gates[:, :, :3, :3] = 0.9
    image = np.full((32, 32), 128, dtype=np.uint8)
    corner, turned = (draw({'act': g}, image, tmp_path / 'gates.png') for g in (gates, gates.flip(2, 3)))
    differs = np.abs(corner - turned).sum(2) > 30
    rows, columns = np.nonzero(differs)
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    corner, turned, differs = corner[box], turned[box], differs[box]
    h, w = differs.shape
    assert min(h, w) > 150 and differs[: h // 4, : w // 4].all() and differs[-h // 4 :, -w // 4 :].all()
    assert not differs[: h // 3, -w // 3 :].any() and not differs[-h // 3 :, : w // 3].any()
    assert np.abs(corner - turned[::-1, ::-1])[4:-4, 4:-4].mean() < 2  # inside the frame
    red, _, blue = corner[: h // 4, : w // 4].mean((0, 1)) - corner[-h // 4 :, -w // 4 :].mean((0, 1))
    assert red > 30 > -30 > blue  # high gates are red, low ones blue


@pytest.mark.parametrize(
    'shapes, image',
    [
        ([(8, 7, 7)], (64, 64)),
        ([(8, 4, 8), (4, 32), (4, 33), (4, 35)], (32, 64, 3)),
        ([(8, 5, 1)] * 7, (50, 10)),
        ([(4, 3, 3)] * 18, (9, 9, 1)),
        ([(16, 1, 1)] * 3, (9, 9)),  # no map at all
        ([(8, 2, 3, 4), (8, 1, 100)], (9, 9)),
    ],
)
def test_any_number_and_shape(tmp_path, shapes, image) -> None:
    gates = {f'a.very.long.name.of.a.layer.in.a.deep.model.{i}': torch.rand(2, *s) for i, s in enumerate(shapes)}
    picture = draw(gates, np.zeros(image), tmp_path / 'gates.png', 'odd $ title')
    assert picture.std() > 20
    assert (picture[:, :8] == 255).all() and (picture[:, -3:] == 255).all()  # nothing is cut off


def grids(*shapes: tuple[int, ...], image: tuple[int, int]) -> list[Any]:
    heats = [_layer('', torch.rand(1, *s), image[1] / image[0]).heat for s in shapes]
    return [None if heat is None else heat.shape for heat in heats]


def test_which_positions_are_a_map() -> None:
    assert grids((8, 7, 7), (8, 196), (8, 197), (8, 201), image=(224, 224)) == [(7, 7), (14, 14), (14, 14), None]
    assert grids((8, 1, 1), (8, 1), (8, 16, 196), (8, 3, 4, 4), image=(224, 224)) == [None] * 4
    assert grids((8, 2, 4), (8, 32), (8, 33), (8, 36), image=(64, 128)) == [(2, 4), (4, 8), (4, 8), None]
    assert grids((8, 4, 2), (8, 32), (8, 16, 11), image=(128, 64)) == [(4, 2), (8, 4), (16, 11)]


def test_tokens_are_in_reading_order_after_the_class_token() -> None:
    gates = torch.arange(5.0).reshape(1, 1, 5)
    heat = _layer('', gates, 1.0).heat
    assert heat is not None and heat.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    'gates, image, message',
    [
        ({}, np.zeros((8, 8)), 'expected those of at least one layer'),
        ({'act': torch.rand(2, 8)}, np.zeros((8, 8)), r"'act', of shape \(2, 8\): expected finite"),
        ({'act': torch.rand(0, 8, 2, 2)}, np.zeros((8, 8)), 'expected finite'),
        ({'act': torch.full((1, 8, 2, 2), torch.nan)}, np.zeros((8, 8)), 'expected finite'),
        ({'act': torch.rand(1, 8, 2, 2)}, np.zeros((3, 8, 8)), r'image of shape \(3, 8, 8\)'),
        ({'act': torch.rand(1, 8, 2, 2)}, np.zeros((0, 8)), r'image of shape \(0, 8\)'),
    ],
)
def test_drawing_errors(tmp_path, gates, image, message) -> None:
    with pytest.raises(ValueError, match=message):
        plot_gates(gates, image, tmp_path / 'gates.png')
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / 'gates.png'
    path.write_bytes(b'old')

    def fail(*args: Any) -> None:
        raise OSError('no space')

    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError, match='no space'):
        plot_gates({'act': torch.rand(1, 8, 2, 2)}, np.zeros((8, 8)), path)
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    'kwargs, img_size, mode, seen', [({'in_chans': 1}, 8, 'RGB', (1, 8, 8)), ({}, None, 'L', (3, 32, 32))]
)
def test_picture_of_a_model(tmp_path, kwargs, img_size, mode, seen) -> None:
    model = wild(timm.create_model('atac_resnet8_cifar', **kwargs))
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


@pytest.mark.parametrize(
    'table, own',
    [
        # the activation of ATAC's name; SE has another; no place but the blocks
        (CIFAR, {'ReLU': ['act2'] * 3, 'SE': ['attn'] * 3, 'ATAC': ['act2'] * 3}),
        # a unit at the end of the branch is in no activation's place
        (CIFAR, {'LocalSENet': ['attn'] * 3, 'ReLU': ['act2'] * 3}),
        (CIFAR, {'LocalSENet': ['attn'] * 3, 'ATAC': ['act2'] * 3, 'SEActivation': ['act2'] * 3}),
        # without units: the last before the addition
        (RESNET, {'ReLU': ['act1', 'act1', 'act2', 'act1'], 'SE': ['se'] * 4}),
        # with units: also that after the addition, if they are there
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


def test_places_outside_of_blocks(tmp_path) -> None:
    gates = compare(tmp_path, CIFAR, 'ReLU', 'ATAC')
    assert [list(column) for column in gates.values()] == [[f'{place}.act2' for place in STAGES] + ['act']] * 2


def test_a_comparison(tmp_path) -> None:
    """Each model gets the image of the first, normalised for itself; the gates are its own, the picture is there."""
    models = {label: wild(timm.create_model(**CIFAR[label])) for label in ('ReLU', 'SE', 'ATAC')}
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


def test_one_gate_a_channel_is_a_map_of_one_colour(tmp_path) -> None:
    """Columns of local and of global gates: where the local ones are as the global ones, so is the colour."""
    local = torch.full((1, 4, 8, 8), 0.2)
    local[..., 4:] = 0.8
    gates = {'local': {'act': local}, 'global': {'se': torch.full((1, 4, 1, 1), 0.8)}}
    plot_comparison(gates, np.full((32, 32), 128, dtype=np.uint8), tmp_path / 'gates.png')
    with Image.open(tmp_path / 'gates.png') as picture:
        pixels = np.asarray(picture.convert('RGB')).astype(int)
    top = pixels.shape[0] - 120  # inside the maps of the only row
    left, right = pixels[top, 40], pixels[top, 170]
    column = pixels.shape[1] // 2
    assert np.abs(left - right).sum() > 60
    assert np.abs(pixels[top, column + 40] - right).max() < 5 and np.abs(pixels[top, column + 170] - right).max() < 5


@pytest.mark.parametrize('count, image', [(2, (9, 30)), (3, (30, 9)), (5, (9, 9))])
def test_any_number_of_columns(tmp_path, count, image) -> None:
    layers = {
        f'a.very.long.name.of.a.layer.{i}': torch.rand(1, *s) for i, s in enumerate([(8, 3, 3), (8, 1, 1), (8, 5)])
    }
    gates = {f'{"a very long name of a model " * 3}{i}': layers for i in range(count)}
    plot_comparison(gates, np.zeros(image), tmp_path / 'gates.png', 'odd $ title')
    with Image.open(tmp_path / 'gates.png') as picture:
        pixels = np.asarray(picture.convert('RGB'))
        assert picture.width <= 500 * count
    assert (pixels[:, :8] == 255).all() and (pixels[:, -3:] == 255).all()  # nothing is cut off


def test_comparison_errors(tmp_path) -> None:
    def fails(models: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_comparable(models)
        with pytest.raises(ValueError, match=message):
            compare_picture(models, photo(8, 8), tmp_path / 'gates.png')

    relu, grey = (timm.create_model('resnet8_cifar', in_chans=chans) for chans in (3, 1))
    fails({}, '0 models: expected at least two')
    fails({'ReLU': relu}, '1 models: expected at least two to compare; gates_picture draws one')
    fails({'ReLU': relu, 'grey': grey}, 'different images: ReLU 3x32x32, grey 1x32x32')
    resnet: Any = timm.create_model('test_resnet')
    fails({'ReLU': relu, 'R': resnet}, 'different images: ReLU 3x32x32, R 3x160x160. .*compare_picture.*img_size=')
    resnet.pretrained_cfg = {**resnet.pretrained_cfg, 'input_size': (3, 32, 32)}
    fails({'A': relu, 'B': resnet}, r'no place .* in common: A: stages.0.0, .*, act; B: conv1, .*, layer4.0')
    plain = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match='B: none'):
        check_comparable({'A': relu, 'B': plain}, img_size=32)
    with pytest.raises(ValueError, match='as many layers of each model'):
        plot_comparison({'A': {'act': torch.rand(1, 2, 2, 2)}, 'B': {}}, np.zeros((8, 8)), tmp_path / 'gates.png')
    assert not list(tmp_path.iterdir())


def test_a_registered_activation_is_compared(tmp_path) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    gate.register(Half, lambda module, x: torch.full_like(x, 0.5))
    models = {label: timm.create_model('resnet8_cifar', act_layer=act) for label, act in (('a', Half), ('b', 'silu'))}
    assert len(compare_picture(models, photo(32, 32), tmp_path / 'gates.png')['a']) == 4


def test_by_attribute() -> None:
    assert timm_atac.viz.gate_maps is gate_maps
    assert 'viz' in dir(timm_atac)


def test_without_matplotlib(tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match=r"pip install 'timm_atac\[viz\]'"):
        plot_gates({'act': torch.rand(1, 8, 2, 2)}, np.zeros((8, 8)), tmp_path / 'gates.png')


def test_pyplot_and_the_users_settings_are_left_alone(python, tmp_path) -> None:
    code = (
        'import sys, numpy, torch, timm_atac.viz as viz\n'
        "assert 'matplotlib' not in sys.modules\n"
        'import matplotlib\n'
        "matplotlib.rcParams['lines.linewidth'] = 7\n"
        'before = matplotlib.rcParams.copy()\n'
        f"viz.plot_gates({{'act': torch.rand(1, 8, 2, 2)}}, numpy.zeros((8, 8)), {str(tmp_path / 'gates.png')!r})\n"
        'assert matplotlib.rcParams.copy() == before\n'
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    python(code)

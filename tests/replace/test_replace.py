"""`replace_activations` on finished models."""

import copy
import io
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torchvision

from timm_atac import ATAC, ATACMe, NiN, fuse, replace_activations
from timm_atac.replace.edits import UnitPerWidth


@pytest.mark.slow
def test_one_unit_for_each_place() -> None:
    model: Any = torchvision.models.resnet50(weights=None)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    done: Any = replace_activations(model)
    assert id(done) == id(model)
    report: Any = model.replaced_activations
    assert len(report.replaced) == 49
    assert not report.left
    block: Any = model.layer4[0]
    assert isinstance(block, torchvision.models.resnet.Bottleneck)
    assert [block.relu.channels, block.relu_2.channels] == [512, 2048]
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items())

    model.eval()
    x = torch.randn(2, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(again(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    'where, units',
    [('layer4.*', 4), (nn.ReLU, 17), (4, 4), ((-2, -1), 8), (lambda name, _: name.endswith('act1'), 9), (None, 17)],
)
def test_where(where, units) -> None:
    model = replace_activations(timm.create_model('resnet18'), where=where)
    assert sum(isinstance(m, ATAC) for m in model.modules()) == units


@pytest.mark.slow
def test_the_forward_pass_leaves_nothing_behind() -> None:
    """CoaT keeps a mask from its first forward pass. The mask must not be on the meta device."""
    model = replace_activations(timm.create_model('coat_tiny', img_size=64))
    tensors = {f'{name}.{k}': v for name, m in model.named_modules() for k, v in vars(m).items()}
    assert not [name for name, v in tensors.items() if isinstance(v, torch.Tensor) and v.is_meta]
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'dla46_c'])
def test_hooks_move_to_what_takes_their_place(name) -> None:
    """timm takes features from some models, NASNet among them, by hooks on activations."""
    model: Any = timm.create_model(name)
    activation = model.layer4[0].act1 if name == 'resnet18' else model.level5.tree1.relu
    seen: list[torch.Size] = []
    handle = activation.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = torch.randn(2, 3, 64, 64)
    model(x)
    expected, seen = list(seen), []
    handle.remove()
    activation.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    replace_activations(model)
    seen = []
    model(x)
    assert seen == expected != []


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, kwargs, shape',
    [('resnet18', {'in_chans': 5}, (2, 5, 64, 64)), ('test_vit', {'img_size': 96}, (2, 3, 96, 96))],
)
def test_size_for_which_timm_has_made_the_model(name, kwargs, shape) -> None:
    model = replace_activations(timm.create_model(name, **kwargs))
    assert model(torch.randn(shape)).shape == (2, 1000)


@pytest.mark.slow
def test_report_says_what_is_not_as_expected(caplog) -> None:
    model: Any = replace_activations(timm.create_model('coat_tiny', img_size=64, device='meta'))
    assert 'one unit each for several places: parallel_blocks.0.mlp2.act,' in model.replaced_activations.caveats()
    assert 'parallel_blocks.0.mlp2.act' in caplog.text
    model = replace_activations(timm.create_model('resnet18', device='meta'))
    assert model.replaced_activations.caveats() == ''
    assert '17 units (atac)' in str(model.replaced_activations)


@pytest.mark.slow
def test_at_the_papers_places_it_is_the_papers_network() -> None:
    ours: Any = timm.create_model('atac_resnet50').eval()
    where = ['layer3.*.act[12]', 'layer4.*.act[12]']
    model = replace_activations(timm.create_model('resnet50'), where=where).eval()
    model.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), ours(x), rtol=0, atol=0)


class _Loop(nn.Module):
    """Calls one activation with two widths, once or twice depending on the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 7, 1), nn.ReLU()

    def forward(self, x):
        x = self.act(self.conv1(x))
        return self.act(self.conv2(x)) if x.shape[0] > 1 else x


def test_one_unit_for_each_width_where_there_is_no_graph() -> None:
    model: Any = replace_activations(_Loop(), 'nin')
    assert isinstance(model.act, UnitPerWidth)
    assert {unit.channels for unit in model.act.units.values() if isinstance(unit, NiN)} == {5, 7}
    assert model(torch.randn(2, 3, 11, 13)).shape == (2, 7, 11, 13)


class _Model(nn.Module):
    """A convolution of 3 to 8 channels, and a forward pass that a test gives: `_Model(forward, **children)`."""

    def __init__(self, forward, **children) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        for name, child in children.items():
            setattr(self, name, child)
        cls = type('Given', (_Model,), {'forward': forward})
        self.__class__ = cls


X = torch.randn(2, 3, 5, 7)


def test_an_effect_on_the_input_stays() -> None:
    def forward(self, x):
        x = self.conv(x)
        self.relu(x)
        return x

    model = _Model(forward, relu=nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match='called for its effect on the input'):
        replace_activations(model, example_input=X)


def test_names_are_those_of_the_place() -> None:
    shared = nn.ReLU()
    model: Any = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), shared), nn.Sequential(nn.Conv2d(8, 8, 1), shared))
    replace_activations(model, where='1.*', example_input=X)
    assert [type(block[1]) for block in model] == [nn.ReLU, ATACMe]


def test_hooks_of_one_place_are_not_called_for_another() -> None:
    model: Any = replace_activations(torchvision.models.resnet18(weights=None), where='layer1.0.*')
    seen: list[int] = []
    model.layer1[0].relu_1.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 3, 32, 32))
    assert len(seen) == 1


@pytest.mark.slow
def test_training_or_not_as_the_activation() -> None:
    model: Any = torchvision.models.resnet18(weights=None)
    model.layer1.eval()
    replace_activations(model)
    assert not model.layer1[0].relu.training and not model.layer1[0].relu.bn1.training
    assert model.layer2[0].relu.training


def test_transformer_fast_path_does_not_bypass_the_unit() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True)
    model = replace_activations(layer, example_input=torch.randn(2, 5, 8)).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x))


def test_values_among_the_outputs() -> None:
    def forward(self, x):
        y = self.relu(self.conv(x))
        return y, float(y.detach().mean()), {'y': y}

    model = replace_activations(_Model(forward, relu=nn.ReLU()), example_input=X)
    assert model(X)[0].shape == (2, 8, 5, 7)


def test_what_does_not_run_afterwards_is_undone() -> None:
    model = timm.create_model('test_resnet')
    before = repr(model)
    with pytest.raises(ValueError, match=r'does not run with .* of its activations replaced.*Nothing is changed'):
        replace_activations(model, where=nn.Conv2d)
    assert repr(model) == before


def test_a_unit_of_the_users() -> None:
    class Scale(nn.Module):
        def __init__(self, channels, input_fmt='NCHW') -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(channels, 1, 1))

        def forward(self, x):
            return x * self.weight

    model: Any = replace_activations(timm.create_model('test_resnet'), Scale)
    channels = {r.name: r.channels for r in model.replaced_activations.replaced}
    assert channels['act1'] == model.act1.weight.numel()
    loop: Any = replace_activations(_Loop(), Scale)
    assert set(loop.act.units) == {'5', '7'}


def test_buffers_stay_where_the_model_cannot_run_on_meta() -> None:
    def forward(self, x):
        self.count += 1
        return self.relu(self.conv(x)) * self.count.item()

    model: Any = _Model(forward, relu=nn.ReLU())
    model.register_buffer('count', torch.zeros(1))
    replace_activations(model, example_input=X)
    assert model.count == 0


def test_a_list_is_one_argument() -> None:
    model = _Model(lambda self, images: self.relu(self.conv(torch.stack(images))), relu=nn.ReLU())
    assert replace_activations(model, example_input=[X[0], X[1]])([X[0]]).shape == (1, 8, 5, 7)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'where': 'layer9.*'}, "fits no activation of ResNet; did you mean 'layer4"),
        ({'where': 9}, 'expected a stage from 1 to 4'),
        ({'where': []}, 'expected a pattern of names'),
        ({'where': nn.ReLU()}, 'expected a pattern of names'),
        ({'where': lambda name: True}, 'expected a pattern of names'),
        ({'act': 'relu'}, "act='relu': expected 'atac', 'se_act', 'nin'"),
        ({'example_input': torch.zeros(2, 5, 64, 64)}, 'Give an example_input'),
    ],
)
def test_errors_change_nothing(kwargs, message) -> None:
    model = timm.create_model('resnet18')
    before = repr(model)
    with pytest.raises(ValueError, match=message):
        replace_activations(model, **kwargs)
    assert repr(model) == before


def test_report_in_a_notebook() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    replace_activations(model, example_input=torch.zeros(1, 3, 8, 8))
    report: Any = model.replaced_activations
    assert str(report).startswith('1 unit (atac)\n')
    assert repr(report).startswith("Report(act='atac'")
    html = report._repr_html_()
    assert '<tr><td>1</td><td>ReLU</td><td>8</td><td>NCHW</td><td>1</td><td>88</td><td>0.0000</td></tr>' in html


def test_messages_of_wrong_arguments() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r'There is 1 activation: 1\.$'):
        replace_activations(model, where='x*')
    with pytest.raises(ValueError, match="act='atca': did you mean 'atac'"):
        replace_activations(model, 'atca')
    with pytest.raises(ValueError, match=r'[^. ]\. Give an example_input') as caught:
        replace_activations(model, example_input=3)
    assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_compiled_model() -> None:
    """The model inside is changed, also if it has run before. What is returned is compiled as before."""
    torch._dynamo.reset()
    model: Any = timm.create_model('test_resnet').eval()
    compiled: Any = torch.compile(model, backend='eager')
    x = torch.randn(2, 3, 64, 64)
    before = compiled(x)
    assert replace_activations(compiled, where='layer4.*') is compiled
    compiled.eval()
    units = [name for name, module in model.named_modules() if isinstance(module, ATAC)]
    assert units == [replaced.name for replaced in model.replaced_activations.replaced]
    assert all(name.startswith('layer4.') for name in units)
    assert model.pretrained_cfg['architecture'] == 'atac_host'
    assert not torch.allclose(compiled(x), before)
    torch.testing.assert_close(compiled(x), model(x))


def _imitation(model: Any) -> None:
    """What accelerate does: a module with weights has none of their values, and a hook that loads them."""
    for module in (model.conv1, model.layer4[0].conv2):
        module._hf_hook = object()
        module.to('meta')


def _offload_to_cpu(model: nn.Module) -> None:
    pytest.importorskip('accelerate').cpu_offload(model, execution_device='cpu')


def _offload_a_part_to_disk(tmp_path, model: nn.Module) -> None:
    devices = {name: 'disk' if name == 'layer4' else 'cpu' for name, _ in model.named_children()}
    pytest.importorskip('accelerate').dispatch_model(model, devices, 'cpu', offload_dir=tmp_path)


@pytest.mark.parametrize('offload', [_imitation, _offload_to_cpu, _offload_a_part_to_disk])
def test_offloaded_weights(offload, tmp_path) -> None:
    """No example_input would help, and units on the device of the weights would have no values."""
    model: Any = timm.create_model('test_resnet')
    if offload is _offload_a_part_to_disk:
        offload(tmp_path, model)
    else:
        offload(model)
    for function in (replace_activations, fuse):
        with pytest.raises(ValueError, match=r"'.*weight' is only loaded while .*remove_hook_from_module") as error:
            function(model)
        assert 'example_input' not in str(error.value)
    assert not any(isinstance(module, ATAC) for module in model.modules())
    if offload is not _imitation:
        pytest.importorskip('accelerate').hooks.remove_hook_from_module(model, recurse=True)
        replace_activations(model, where='layer4.*')
        assert model.layer4[0].act1.conv1.weight.device.type == 'cpu'
        assert model(torch.randn(2, 3, 64, 64)).isfinite().all()

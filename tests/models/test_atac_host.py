"""timm_atac/models/atac_host.py: models with ATAC are saved and loaded by timm alone."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf
from timm_versions import KEEPS_ARGS, SAFE_FOLDERS

from timm_atac import ATAC, replace_activations
from timm_atac.units.deferred import ChannelModule


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 64, 64))


def randomise(model: nn.Module) -> Any:
    """Set every parameter and running statistic to random values, and the model to evaluation mode."""
    with torch.no_grad():
        for t in model.state_dict().values():
            if t.is_floating_point():
                t.add_(torch.rand_like(t), alpha=0.1)
    return model.eval()


def save(model: nn.Module, folder: Path, **model_args) -> str:
    """Save a model as timm's users do, and return a name that loads it. Older timm versions need its arguments."""
    save_for_hf(model, str(folder), safe_serialization=SAFE_FOLDERS, model_args={} if KEEPS_ARGS else model_args)
    return f'local-dir:{folder}'


def units(model: nn.Module) -> dict[str, tuple[str, int | None, str]]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, ChannelModule)}
    # ATAC and ATACMe have the same name
    return {name: (type(m).__name__.removesuffix('Me'), m.channels, m.input_fmt) for name, m in found.items()}


HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    'stages': ('resnet18', {'where': (3, 4), 'rd_ratio': 0.25}),
    'a type': ('resnet18', {'where': nn.ReLU, 'act': 'se_act'}),
    'a function': ('test_efficientnet', {'where': lambda name, _: name.startswith('blocks.1'), 'act': 'nin'}),
    'patterns': ('test_vit', {'where': ['blocks.0.*', '*.5.mlp.act'], 'act': ATAC}),
    'one unit a place': ('dla46_c', {}),
    'functions': ('test_byobnet', {}),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', HOSTS)
def test_saved_and_loaded(case, tmp_path) -> None:
    host, options = HOSTS[case]
    model = randomise(replace_activations(timm.create_model(host, num_classes=7), **options))
    assert units(model)
    name = save(model, tmp_path, **model.replaced_activations.model_args)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'atac_host'
    assert config['model_args']['host'] == host
    again: Any = timm.create_model(name, pretrained=True).eval()
    assert units(again) == units(model)
    x = images(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():  # with gradients, ATAC and ATACMe differ in the last bit
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert tuple(again.pretrained_cfg['mean']) == model.pretrained_cfg['mean']


def test_saved_by_act_layer(tmp_path) -> None:
    model = randomise(timm.create_model('test_vit', act_layer='atac', num_classes=7))
    name = save(model, tmp_path, act_layer='atac', num_classes=7)
    again: Any = timm.create_model(name, pretrained=True).eval()
    assert units(again) == units(model)
    x = images(2, *model.pretrained_cfg['input_size'])
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['act_layer', 'replaced'])
def test_from_the_hub_with_no_import_of_ours(how, python, tmp_path) -> None:
    """Save a model like a download in the cache of `hf-hub:`."""
    model: Any
    if how == 'act_layer':
        model = timm.create_model('resnet18', act_layer='atac', num_classes=7)
        args: dict[str, Any] = {'act_layer': 'atac'}
    else:
        model = replace_activations(timm.create_model('resnet18', num_classes=7), where=(3, 4))
        args = model.replaced_activations.model_args
    randomise(model)
    repository = tmp_path / 'hub' / 'models--somebody--net'
    commit = '0' * 40
    (repository / 'refs').mkdir(parents=True)
    (repository / 'refs' / 'main').write_text(commit)
    save(model, repository / 'snapshots' / commit, **args)
    x = images()
    torch.save([x, model(x)], tmp_path / 'expected.pt')
    python(
        f"""
import timm, torch
x, y = torch.load({str(tmp_path / 'expected.pt')!r}, weights_only=True)
model = timm.create_model('hf-hub:somebody/net', pretrained=True).eval()
torch.testing.assert_close(model(x), y)
""",
        HF_HUB_CACHE=str(tmp_path / 'hub'),
        HF_HUB_OFFLINE='1',
    )


@pytest.mark.slow
def test_replaced_twice(tmp_path) -> None:
    model: Any = replace_activations(timm.create_model('resnet18'), where=4)
    model = randomise(replace_activations(model, 'nin', where='layer1.*'))
    assert {kind for kind, *_ in units(model).values()} == {'ATAC', 'NiN'}
    again = timm.create_model(save(model, tmp_path, **model.replaced_activations.model_args), pretrained=True).eval()
    x = images()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('host', ['resnet18', 'test_vit'])
def test_weights_are_adapted_as_timm_does(host, tmp_path) -> None:
    model: Any = replace_activations(timm.create_model(host), where=[r'*1*'])
    name = save(randomise(model), tmp_path, **model.replaced_activations.model_args)
    size = model.pretrained_cfg['input_size'][1:]
    adapted: Any = timm.create_model(name, pretrained=True, num_classes=5, in_chans=1).eval()
    x = images(2, 1, *size)
    assert adapted(x).shape == (2, 5)
    gray: Any = model  # timm sums the first convolution's weights over the colours
    expected = gray.forward_features(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(adapted.forward_features(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_features_only(tmp_path) -> None:
    model = randomise(replace_activations(timm.create_model('resnet18'), where=(3, 4)))
    name = save(model, tmp_path, **model.replaced_activations.model_args)
    features: Any = timm.create_model(name, pretrained=True, features_only=True, out_indices=(2, 4)).eval()
    assert features.feature_info.channels() == [128, 512]
    x = images()
    expected = model.forward_intermediates(x, indices=(2, 4), intermediates_only=True)
    for found, wanted in zip(features(x), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_features_only_of_a_host_that_cannot(monkeypatch) -> None:
    monkeypatch.delattr(timm.models.dla.DLA, 'forward_intermediates', raising=False)
    with pytest.raises(ValueError, match="features_only of host='dla46_c': DLA has no forward_intermediates"):
        timm.create_model('atac_host', host='dla46_c', features_only=True)


@pytest.mark.slow
def test_weights_of_the_host(tmp_path) -> None:
    """With the name alone, `pretrained=True` loads the host's weights before the activations are replaced."""
    host = randomise(timm.create_model('resnet18'))
    save(host, tmp_path)
    model: Any = timm.create_model('atac_host', pretrained=True, host=f'local-dir:{tmp_path}', where=4, num_classes=7)
    assert len(units(model)) == 4
    state = model.state_dict()
    for key, value in host.state_dict().items():
        if not key.startswith('fc.'):
            assert torch.equal(state[key], value), key
    assert model.pretrained_cfg['architecture'] == 'atac_host'
    assert model.num_classes == 7


@pytest.mark.slow
def test_weights_from_a_file(tmp_path) -> None:
    model = randomise(timm.create_model('atac_host', host='test_resnet', num_classes=7))
    save(model, tmp_path)
    file = tmp_path / ('model.safetensors' if SAFE_FOLDERS else 'pytorch_model.bin')
    overlay = {'file': str(file), 'num_classes': 7}
    args: dict[str, Any] = dict(host='test_resnet', num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay)
    again = timm.create_model('atac_host', **args).eval()
    x = images()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.skipif(not KEEPS_ARGS, reason='this timm keeps no arguments in a model')
def test_what_config_json_cannot_hold_is_an_error_of_timm(tmp_path) -> None:
    model: Any = replace_activations(timm.create_model('test_resnet'), partial(ATAC, gate_layer=nn.Hardsigmoid))
    with pytest.raises(ValueError, match="'act' is not serializable"):
        save(model, tmp_path)


def test_size_and_channels_of_the_host() -> None:
    """The forward pass that finds the widths uses the input size that the model was created for."""
    model: Any = timm.create_model('atac_host', host='test_vit', img_size=96, in_chans=5)
    assert model(images(2, 5, 96, 96)).shape == (2, 1000)


@pytest.mark.slow
def test_another_image_size_than_was_saved(tmp_path) -> None:
    model: Any = randomise(replace_activations(timm.create_model('test_vit', img_size=96)))
    name = save(model, tmp_path, **{**model.replaced_activations.model_args, 'img_size': 96})
    again = timm.create_model(name, pretrained=True, img_size=128).eval()  # timm resamples the position embedding
    assert again(images(2, 3, 128, 128)).shape == (2, 1000)


@pytest.mark.slow
@pytest.mark.parametrize('overlay', [{'num_classes': 7}, {'input_size': (1, 160, 160)}, {'input_size': (3, 96, 96)}])
def test_overlay_is_the_hosts(overlay) -> None:
    host: Any = timm.create_model('test_vit', pretrained_cfg_overlay=overlay)
    model: Any = timm.create_model('atac_host', host='test_vit', pretrained_cfg_overlay=overlay)
    x = images(2, *overlay.get('input_size', (3, 160, 160)))
    assert model(x).shape == host(x).shape
    for key in ('num_classes', 'input_size'):
        assert model.pretrained_cfg[key] == host.pretrained_cfg[key]


@pytest.mark.slow
def test_a_host_from_a_folder_is_saved_by_its_name(tmp_path) -> None:
    save(timm.create_model('test_resnet'), tmp_path / 'host')
    model: Any = timm.create_model('atac_host', host=f'local-dir:{tmp_path / "host"}', pretrained=True, act=ATAC)
    args = model.replaced_activations.model_args
    assert args['host'] == 'test_resnet'
    assert args['act'] == 'atac'
    save_for_hf(randomise(model), str(tmp_path / 'whole'), safe_serialization=SAFE_FOLDERS, model_args=args)
    again = timm.create_model(f'local-dir:{tmp_path / "whole"}', pretrained=True).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


SAVED = Path(__file__).parents[1] / 'data' / 'saved_hosts'  # folders that version 0.1 has written


@pytest.mark.slow
@pytest.mark.parametrize('folder', ['absent_where', 'patterns', 'shared', 'stage_number'])
def test_folders_of_version_0_1(folder, tmp_path) -> None:
    """A stage includes SE, a name of a shared activation is all its places, and a pattern may fit nothing."""
    expected = json.loads((SAVED / folder / 'expected.json').read_text())
    config = json.loads((SAVED / folder / 'config.json').read_text())
    if folder == 'absent_where' and SAFE_FOLDERS:
        model: Any = timm.create_model(f'local-dir:{SAVED / folder}', pretrained=True).eval()
        x = torch.linspace(-1, 1, 3 * 96 * 96).reshape(1, 3, 96, 96)
        with torch.no_grad():
            torch.testing.assert_close(model(x)[0], torch.tensor(expected['logits']), rtol=1e-3, atol=1e-4)
    else:
        model = timm.create_model('atac_host', **config['model_args'])
    assert list(units(model)) == expected['units']
    args = model.replaced_activations.model_args
    assert args.get('where') == config['model_args'].get('where', 'all')
    again = timm.create_model('atac_host', **args)
    assert units(again) == units(model)


@pytest.mark.slow
@pytest.mark.parametrize('where', ['paper', 'all', {'places': [-1]}, {'places': ['layer4.*.act1', 3]}])
def test_where_in_config_json(where, tmp_path) -> None:
    chosen = where['places'] if isinstance(where, dict) else where
    model: Any = replace_activations(timm.create_model('resnet18', num_classes=7), where=chosen)
    name = save(randomise(model), tmp_path, **model.replaced_activations.model_args)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['where'] == where
    again: Any = timm.create_model(name, pretrained=True).eval()
    assert units(again) == units(model) == units(timm.create_model('atac_host', where=where))


@pytest.mark.parametrize(
    'args, message',
    [
        ({'rd_ratio': 'auto', 'where': 'paper'}, r"rd_ratio='auto': atac_host takes a ratio.*give rd_ratio=0\.5"),
        ({'where': {'place': ['*']}}, r"where={'place': \['\*'\]}: expected a pattern of names"),
        ({'where': {'places': ['nowhere']}}, "where='nowhere' fits no activation"),
    ],
)
def test_wrong_arguments(args, message) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model('atac_host', host='test_resnet', **args)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ('ran', 'x')


@pytest.mark.slow
@pytest.mark.parametrize('pretrained', [False, True])
@pytest.mark.parametrize('depth', [1, 2])
def test_a_folder_names_no_other_file(depth, pretrained, tmp_path, monkeypatch) -> None:
    """A hostile config.json gives the host a checkpoint, whose code timm 1.0.21 would run."""
    monkeypatch.chdir(tmp_path)
    name = save(replace_activations(timm.create_model('test_resnet')), Path('net'), host='test_resnet')
    torch.save({'state_dict': {}, 'x': RunsCode()}, 'x.pth')
    host: dict[str, Any] = {'model_name': 'test_resnet', 'checkpoint_path': 'x.pth'}
    if depth == 2:
        host = {'model_name': 'atac_host', 'host': host}
    config = json.loads(Path('net/config.json').read_text())
    config['model_args'] = {'host': host}
    Path('net/config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='atac_host takes no checkpoint_path'):
        timm.create_model(name, pretrained=pretrained)
    assert not Path('ran').exists()


@pytest.mark.parametrize('host', [5, '', {}, {'num_classes': 7}])
def test_a_host_that_is_none(host) -> None:
    with pytest.raises(ValueError, match='expected the name of a model'):
        timm.create_model('atac_host', host=host)

"""`timm-atac` by its command lines."""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_atac import read_params, write_params
from timm_atac.cli import main
from timm_atac.gates.pictures import compare_picture, gates_picture
from timm_atac.hub.facts import CardFacts
from timm_atac.weights.convert import to_arrays, to_state_dict
from timm_atac.weights.pretrained import git_blob_id
from timm_atac.weights.published import PUBLISHED, Published

NAME = 'atac_resnet50.open_atac_in1k'
PARAMS = str(Path(__file__).parents[1] / 'data' / 'cifar_b1_atac.params')


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Any:
    """Run a command line in an empty folder: `run(*arguments)` gives status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_nothing_is_pushed')

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def fails(result: tuple[int, str, str], message: str) -> None:
    status, _, errors = result
    assert status == 1
    assert message in errors
    assert errors.splitlines()[-1].startswith('timm-atac ') or message.startswith(('missing', 'The'))


@pytest.mark.slow
def test_convert_and_back(run, tmp_path) -> None:
    status, output, progress = run('convert', PARAMS, 'a folder/net', '--model', 'atac_resnet8_cifar')
    assert (status, output) == (
        0,
        'Wrote a folder/net: README.md, card.yaml, config.json, gates.png, model.safetensors\n',
    )
    assert progress.splitlines() == [
        f'Read {PARAMS}: 113 arrays, 0.4 MB',
        'Writing a folder/net: weights, config, picture and card',
    ]
    assert 'converted from the MXNet file cifar_b1_atac.params' in (tmp_path / 'a folder/net/README.md').read_text()
    model: Any = timm.create_model(f'local-dir:{tmp_path}/a folder/net', pretrained=True)
    assert np.array_equal(model.conv1.weight.detach(), read_params(PARAMS)['features.1.weight'])

    assert run('convert', 'a folder/net', 'back.params')[:2] == (0, 'Wrote back.params\n')
    back, arrays = read_params('back.params'), read_params(PARAMS)
    assert set(back) == set(arrays)
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())
    fails(run('convert', 'a folder/net', 'back'), 'back: expected FILE.params')
    fails(run('convert', 'a folder/net', 'back.params'), 'back.params exists already; give another name')
    fails(run('convert', PARAMS, 'a folder/net', '--model', 'atac_resnet8_cifar'), 'exists already')
    assert sorted(os.listdir('.')) == ['a folder', 'back.params']


@pytest.mark.slow
def test_convert_a_variant(run, tmp_path) -> None:
    """A network with other arguments than the default, under a registered tag."""
    kwargs: dict[str, Any] = dict(act_layer='se_act', atac_stages=(3, 4), num_classes=100)
    torch.manual_seed(0)
    source: Any = timm.create_model('resnet14_cifar', **kwargs).eval()
    write_params(tmp_path / 'net.params', to_arrays(source))
    pairs = ('act_layer=se_act', 'atac_stages=(3, 4)', 'num_classes=100')
    arguments = ('net.params', 'net', '--model', 'resnet14_cifar', '--model-kwargs', *pairs)
    assert run('convert', *arguments, '--tag', 'cifar100')[0] == 0
    model = timm.create_model('local-dir:net', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(x), source(x))
    assert '# Model card for resnet14_cifar.cifar100' in Path('net/README.md').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('in_chans', [1, 4])
def test_convert_for_other_inputs(in_chans, run, tmp_path) -> None:
    """A registered tag sets the classes; for a network of four channels a warning says why there is no picture."""
    source: Any = timm.create_model('atac_resnet8_cifar', in_chans=in_chans, num_classes=100).eval()
    write_params(tmp_path / 'net.params', to_arrays(source))
    arguments = ('net.params', 'net', '--model', 'atac_resnet8_cifar.cifar100')
    status, _, log = run('convert', *arguments, '--model-kwargs', f'in_chans={in_chans}')
    assert status == 0
    assert ('takes images of 4 channels' in log) == (in_chans == 4) == (not Path('net/gates.png').exists())
    card = Path('net/README.md').read_text()
    assert ("convert('L')" in card) == (in_chans == 1)
    assert ('torch.randn(1, 4, 32, 32)' in card) == (in_chans == 4)
    x = torch.randn(1, in_chans, 32, 32)
    with torch.inference_mode():
        assert torch.equal(timm.create_model('local-dir:net', pretrained=True).eval()(x), source(x))


@pytest.mark.slow
def test_a_network_that_diverged(run, tmp_path) -> None:
    arrays = {name: array.copy() for name, array in read_params(PARAMS).items()}
    arrays['features.1.weight'][:] = np.nan
    write_params(tmp_path / 'net.params', arrays)
    status, _, log = run('convert', 'net.params', 'net', '--model', 'atac_resnet8_cifar')
    assert status == 0
    assert 'No picture of the gates: ' in log and 'expected finite numbers' in log


@pytest.mark.slow
def test_convert_refuses(run) -> None:
    for arguments, message in (
        ((PARAMS, 'x'), '--model is needed for a .params file'),
        ((PARAMS, 'x', '--model', 'atac_resnet5'), "is not one of the authors' networks; expected atac_resnet50 or"),
        ((PARAMS, 'x', '--model', 'resnet18'), "'resnet18' is not one of the authors' networks"),
        (
            (PARAMS, 'x', '--model', 'atac_resnet8_cifar', '--tag', 'open_atac_in1k'),
            'belongs to atac_resnet50.open_atac',
        ),
        ((PARAMS, 'x', '--model', 'atac_resnet8_cifar', '--tag', 'a/b'), "the tag 'a/b' is not valid"),
        (('absent', 'x', '--model', 'atac_resnet50'), 'SOURCE absent: the file does not exist'),
        (('absent', 'x'), 'SOURCE absent: the file does not exist; expected a .params file, or a folder'),
        ((__file__, 'x', '--model', 'atac_resnet50'), 'is not a .params file. It is text'),
        (
            (PARAMS, 'x', '--model', 'atac_resnet50.open_atac_in1k'),
            'its git blob id is 1918d0f25b94b81e6fdf7396022faf82',
        ),
        (
            (PARAMS, 'x', '--model', 'atac_resnet50', '--tag', 'open_atac_in1k'),
            'expected 68dc6dabee84f1f42746d06553aba6',
        ),
        ((PARAMS, 'x', '--model', 'atac_resnet8_cifar.cifar10', '--tag', 'mine'), 'give two tags; give one'),
        (
            (PARAMS, 'x', '--model', 'atac_resnet8_cifar', '--model-kwargs', 'rd_ratio'),
            "'rd_ratio': expected KEY=VALUE",
        ),
        ((PARAMS, 'x', '--model', 'atac_resnet8_cifar', '--model-kwargs', 'colour=3'), 'colour'),
        ((PARAMS, 'x', '--model', 'atac_resnet8_cifar', '--image', __file__), 'as an image'),
    ):
        fails(run('convert', *arguments), message)
    status, _, errors = run('convert', PARAMS, 'x', '--model', 'atac_resnet14_cifar')
    assert status == 1
    expected = len(to_arrays(timm.create_model('atac_resnet14_cifar')))
    assert f'A file of 113 arrays does not fit this CifarResNet of {expected};' in errors
    assert "missing: 'features.2.1.bn1.gamma' (16,)" in errors
    lines = errors.splitlines()
    assert lines[-2:] == [
        f'  ... {expected - 113 - 5} more',
        '  The arrays fit another network: give --model atac_resnet8_cifar.',
    ]
    assert len(lines) == 9
    assert not os.listdir('.')


@pytest.mark.slow
def test_push_of_published_weights(run, monkeypatch, tmp_path) -> None:
    """The weights are downloaded to timm's cache, checked and converted; without a licence the push needs consent."""
    cache = tmp_path / 'torch' / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    path = cache / PUBLISHED[NAME].url.rpartition('/')[2]
    write_params(path, to_arrays(timm.create_model('atac_resnet50')))
    fails(run('push', '--model', NAME, '--repo', 'me/net', '--dry-run'), 'delete it and try again')

    monkeypatch.setitem(PUBLISHED, NAME, Published(PUBLISHED[NAME].url, git_blob_id(path)))
    status, output, _ = run('push', '--model', NAME, '--repo', 'me/net', '--dry-run')
    assert status == 0
    assert f'{NAME} -> me/net\n' in output
    assert re.search(r'  model.safetensors +112,\d{3}\.\d kB\n', output)
    assert '\n  The weights come from https://github.com/YimianDai/open-atac, which states no licence.\n' in output
    assert output.endswith('Nothing was pushed (--dry-run).\n')

    fails(run('push', '--model', NAME), 'No repository given')  # before the download
    monkeypatch.setattr('sys.stdin', io.StringIO())
    fails(run('push', '--model', NAME, '--repo', 'me/net'), 'me/net: the weights have no licence; give --yes')


@pytest.mark.slow
def test_push_asks(run, monkeypatch) -> None:
    run('convert', PARAMS, 'net', '--model', 'atac_resnet8_cifar')
    questions: list[str] = []

    def answer(question: str) -> str:
        questions.append(question)
        return 'no'

    monkeypatch.setattr('sys.stdin.isatty', lambda: True, raising=False)
    monkeypatch.setattr('builtins.input', answer)
    fails(run('push', 'net', '--repo', 'me/net'), 'Nothing was pushed.')
    assert questions == ['Push weights that have no licence to me/net anyway? [y/N] ']
    fails(run('push', '--model', 'atac_resnet18.untrained'), "'atac_resnet18.untrained' has no published weights")


@pytest.mark.slow
def test_card(run) -> None:
    status, output, _ = run('card', NAME)
    assert status == 0
    assert output.startswith('---\n') and f'# Model card for {NAME}\n' in output

    run('convert', PARAMS, 'net', '--model', 'atac_resnet8_cifar')
    Path('facts.yaml').write_text('description: Of mine.\nlicense: mit\n')
    Image.new('RGB', (40, 60), 'red').save('red.png')
    before = Path('net/gates.png').read_bytes()
    assert run('card', 'net', '--facts', 'facts.yaml', '--image', 'red.png')[0] == 0
    card = Path('net/README.md').read_text()
    assert 'Of mine.' in card and 'license: mit' in card and 'Grace Hopper' not in card
    assert Path('net/gates.png').read_bytes() != before

    # facts and picture of the folder stay; after an error nothing has changed
    picture = Path('net/gates.png').read_bytes()
    assert run('card', 'net')[0] == 0
    assert (Path('net/README.md').read_text(), Path('net/gates.png').read_bytes()) == (card, picture)
    Path('facts.yaml').write_text('colour: red')
    fails(run('card', 'net', '--facts', 'facts.yaml', '--image', 'red.png'), 'unknown colour in facts')
    assert (Path('net/README.md').read_text(), Path('net/gates.png').read_bytes()) == (card, picture)
    Path('net/gates.png').unlink()
    assert run('card', 'net')[0] == 0
    assert 'Grace Hopper' in Path('net/README.md').read_text()
    fails(run('card', 'nothing'), "'nothing' is neither a folder nor a tag")


@pytest.mark.slow
def test_gates(run) -> None:
    Image.new('RGB', (40, 60), 'red').save('red.png')
    run('convert', PARAMS, 'net', '--model', 'atac_resnet8_cifar')
    status, output, _ = run('gates', 'red.png', '--model', 'local-dir:net', '-o', 'out.png')
    assert status == 0
    lines = output.splitlines()
    assert lines[0].split() == ['unit', 'gates', 'mean', 'std']
    assert [line.split()[0] for line in lines[1:-1]] == [
        *(f'stages.{stage}.0.act{act}' for stage in range(3) for act in (1, 2)),
        'act',
    ]
    assert lines[1].split()[1] == '16x32x32'
    assert lines[-1] == 'Wrote out.png'
    with Image.open('out.png') as picture:
        assert picture.width > 500

    before = Path('out.png').read_bytes()
    assert run('gates', 'red.png', '--model', 'atac_resnet8_cifar', '--checkpoint', PARAMS, '-o', 'out.png')[0] == 0
    assert abs(len(Path('out.png').read_bytes()) - len(before)) < 2_000  # but for the title
    kwargs = ('--model-kwargs', 'act_layer=atac', 'num_classes=3')
    state_dict = timm.create_model('resnet8_cifar', act_layer='atac', num_classes=3).state_dict()
    torch.save({'state_dict': state_dict, 'args': argparse.Namespace(lr=0.1), 'epoch': 3}, 'c.pth')  # as of train.py
    assert run('gates', 'red.png', '--model', 'resnet8_cifar', *kwargs, '--checkpoint', 'c.pth')[0] == 0
    assert Path('gates.png').exists()

    def gates(*arguments: str) -> tuple[int, str, str]:
        return run('gates', 'red.png', '--model', *arguments)

    torch.save({'state_dict': state_dict, 'args': Path}, 'code.pth')  # a pickle that needs more than tensors
    fails(
        gates('resnet8_cifar', *kwargs, '--checkpoint', 'code.pth'), 'code.pth is not a checkpoint that can be read: '
    )
    fails(
        gates('atac_resnet8_cifar', '--checkpoint', 'c.pth'),
        "c.pth does not fit atac_resnet8_cifar: 'fc.weight' is (3, 64) in the file and (10, 64) in the network, "
        "'fc.bias' is (3,) in the file and (10,) in the network. Give --model-kwargs num_classes=3.",
    )
    fails(gates('atac_resnet18', '--checkpoint', 'absent.pth'), '--checkpoint absent.pth: the file does not exist')
    fails(gates('net'), 'net is a folder: give --model local-dir:net')
    fails(gates('atac_resnet18', '-o', 'x.jpg'), '-o x.jpg: expected the name of a PNG file')
    fails(gates('atac_resnet18', '--model-kwargs', 'checkpoint_path=x'), 'is not an argument of the network itself')
    fails(
        run('gates', 'red.png', '--model', 'atac_resnet18'),
        'Give other weights with --checkpoint FILE, or random ones with --untrained',
    )
    fails(gates('resnet8_cifar', '--untrained'), 'has no unit with a gate')
    fails(gates('atac_resnet9'), "timm has no model 'atac_resnet9'")
    image_is_missing = run('gates', 'absent.png', '--model', 'atac_resnet18', '--untrained')
    fails(image_is_missing, 'IMAGE absent.png: the file does not exist; expected an image')
    fails(run('gates', __file__, '--model', 'atac_resnet18', '--untrained'), 'as an image')


@pytest.mark.slow
def test_gates_of_one_model_are_those_of_gates_picture(run) -> None:
    """The picture is that of `gates_picture`, and the table has its gates."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image.save('image.png')
    status, output, _ = run('gates', 'image.png', '--model', 'atac_resnet8_cifar', '--checkpoint', PARAMS)
    assert status == 0
    model = timm.create_model('atac_resnet8_cifar')
    model.load_state_dict(to_state_dict(read_params(PARAMS), model))
    gates = gates_picture(model, image, 'expected.png', title='atac_resnet8_cifar')
    assert Path('gates.png').read_bytes() == Path('expected.png').read_bytes()
    rows = [f'unit{"gates":>27}  mean   std']
    for name, gate in gates.items():
        shape = 'x'.join(str(size) for size in gate.shape[1:])
        rows.append(f'{name:15}  {shape:>14}  {gate.mean():.3f}  {gate.std():.3f}')
    assert output.splitlines() == [*rows, 'Wrote gates.png']


@pytest.mark.slow
def test_gates_of_several_models(run) -> None:
    Image.new('RGB', (40, 60), 'red').save('red.png')
    run('convert', PARAMS, 'net', '--model', 'atac_resnet8_cifar')
    relu = timm.create_model('resnet8_cifar')
    torch.save(relu.state_dict(), 'relu.pth')
    torch.save(timm.create_model('resnet8_cifar').state_dict(), 'other.pth')

    def gates(*arguments: str) -> tuple[int, str, str]:
        return run('gates', 'red.png', '--model', *arguments)

    pair = ('resnet8_cifar', 'atac_resnet8_cifar')
    status, output, errors = gates(*pair, '--untrained', '-o', 'out.png')
    assert status == 0, errors
    rows = [line.split() for line in output.splitlines()]
    assert rows[0] == ['place', 'model', 'gate', 'gates', 'mean', 'std']
    assert [row[:4] for row in rows[1:3]] == [['stages.0.0', name, 'act2', '16x32x32'] for name in pair]
    assert [row[:3] for row in rows[-3:-1]] == [['act', name, 'act'] for name in pair]
    assert len(rows) == 10 and output.splitlines()[-1] == 'Wrote out.png'
    with Image.open('out.png') as picture:
        assert picture.width > 500

    repeated = gates(pair[0], '--model', pair[1], '--checkpoint', 'relu.pth', '--checkpoint', PARAMS)
    status, output, errors = gates(*pair, '--checkpoint', 'relu.pth', PARAMS)  # in that order
    assert repeated == (status, output, errors)
    assert status == 0, errors
    expected = compare_picture(
        {pair[0]: relu, pair[1]: timm.create_model('local-dir:net', pretrained=True)}, Image.open('red.png'), 'e.png'
    )
    means = [f'{gate.mean():.3f}' for row in zip(*(c.values() for c in expected.values()), strict=True) for gate in row]
    assert [line.split()[4] for line in output.splitlines()[1:-1]] == means
    assert Path('gates.png').read_bytes() == Path('e.png').read_bytes()
    status, output, _ = gates('local-dir:net', 'resnet8_cifar', '--untrained')
    assert status == 0 and [line.split()[1] for line in output.splitlines()[1:3]] == ['net', 'resnet8_cifar']
    shutil.copytree('net', 'other/net')
    status, output, _ = gates('local-dir:net', 'local-dir:other/net')
    assert status == 0 and [line.split()[1] for line in output.splitlines()[1:3]] == [
        'local-dir:net',
        'local-dir:other/net',
    ]
    status, output, _ = gates('resnet8_cifar', 'resnet8_cifar', '--checkpoint', 'relu.pth', 'other.pth')
    assert status == 0 and 'resnet8_cifar relu.pth' in output and 'resnet8_cifar other.pth' in output

    fails(gates(*pair, '--checkpoint', 'relu.pth'), '--checkpoint has 1 file for 2 models: expected one for each')
    fails(gates(*pair, '--checkpoint', 'relu.pth', 'absent.pth'), '--checkpoint absent.pth: the file does not exist')
    fails(gates('resnet8_cifar', 'resnet8_cifar', '--untrained'), '--model has resnet8_cifar twice')
    fails(gates('resnet8_cifar', 'resnet9', '--untrained'), "timm has no model 'resnet9'")
    fails(gates('resnet8_cifar', 'net'), 'net is a folder: give --model local-dir:net')
    # these errors come before any download
    fails(gates('resnet8_cifar', 'resnet18'), 'different images: resnet8_cifar 3x32x32, resnet18 3x224x224')
    fails(gates('vgg11', 'resnet18'), 'no block with a gate in common: vgg11: features')
    without = ('resnet8_cifar.cifar100', 'atac_resnet8_cifar.cifar100')
    fails(gates(*without), 'Give other weights with --checkpoint FILE, or random ones with --untrained')
    with pytest.raises(SystemExit):
        run('gates', '--model', *pair, 'red.png')  # the image is taken for a model: the usage puts it first


@pytest.mark.slow
def test_list(run) -> None:
    status, output, _ = run('list', 'atac_resnet*')
    assert status == 0
    rows = [line.split() for line in output.splitlines()]
    assert rows[0] == ['model', 'params', 'MACs', 'tags', 'weights']
    (row,) = (row for row in rows if row[0] == 'atac_resnet50')
    assert row == ['atac_resnet50', '27.93', 'M', '4.397', 'G', 'open_atac_in1k', PUBLISHED[NAME].url]
    assert ['cifar100', 'none'] in rows
    assert not any(row[0].startswith('resnet') for row in rows)
    assert run('list', NAME)[1].splitlines()[1].startswith('atac_resnet50 ')
    fails(run('list', 'convnext*'), "no model of timm_atac matches 'convnext*'; `timm-atac list` shows all")


@pytest.mark.slow
def test_replace(run) -> None:
    status, output, _ = run('replace', 'resnet18')
    assert status == 0
    lines = output.splitlines()
    assert lines[0] == '4 units (atac)'
    assert lines[2].split() == ['layer3.0.act1', 'ReLU', '256', 'NCHW', '1', '66,304', '0.0128']
    assert '  parameters: 11,689,512 before, 12,349,480 after (+5.6%)' in lines
    assert '  stages: 1 (layer1); 2 (layer2); 3 (layer3); 4 (layer4)' in lines
    output = run('replace', 'resnet18', '--where', '-1', 'layer1.*', '--rd-ratio', '100_000', '--act', 'nin')[1]
    assert output.startswith('8 units (nin)\n')
    assert 'the units may add at most 100,000 parameters' in output


@pytest.mark.slow
@pytest.mark.parametrize(
    'line, message',
    [
        ('resnet18 --where layr4.*', "where='layr4.*' fits no activation of ResNet; did you mean 'layer4.*'"),
        (
            'resnet18 --where 9',
            'expected a stage from 1 to 4, or from -1 for the last; ResNet has 4 stages: 1 (layer1)',
        ),
        ('resnet18 --act relu', "act='relu': expected 'atac', 'se_act', 'nin', 'xunit'"),
        (
            'resnet18 --rd-ratio much',
            "--rd-ratio much: expected a ratio such as 0.25, a number of parameters, or 'auto'.",
        ),
        ('resnet18 --rd-ratio 10', 'rd_ratio=10.0: at most 10 parameters may be added, and 4 units add'),
        ('resnet81', "did you mean 'resnet18'"),
        ('local-dir:here', 'expected the name of a model of timm, without a folder or repository'),
        ('resnet18 --model-kwargs num_clases=3', "ResNet has no argument 'num_clases'; did you mean 'num_classes'"),
    ],
)
def test_replace_refuses(run, line, message) -> None:
    fails(run('replace', *line.split()), message)


@pytest.mark.slow
def test_help() -> None:
    """Each command explains itself with an example, and without loading torch."""
    code = 'import sys; from timm_atac.cli import main\n'
    code += 'try: main(sys.argv[1:])\nfinally: print("torch" in sys.modules)'
    for command in ('convert', 'push', 'card', 'gates', 'list', 'replace', 'env'):
        result = subprocess.run([sys.executable, '-c', code, command, '--help'], capture_output=True, text=True)
        assert result.returncode == 0
        assert result.stdout.endswith('False\n')
        assert command == 'list' or f'    timm-atac {command} ' in result.stdout
        assert command != 'card' or all(
            f' {fact.name}' in result.stdout.replace('\n', ' ') for fact in fields(CardFacts)
        )
    result = subprocess.run([sys.executable, '-m', 'timm_atac.cli'], capture_output=True, text=True)
    assert result.returncode == 2 and 'required: COMMAND' in result.stderr


def test_switched_off(run, monkeypatch) -> None:
    monkeypatch.setenv('TIMM_ATAC_DISABLE', '1')
    fails(run('list'), 'TIMM_ATAC_DISABLE is set')


def test_interrupted(run, monkeypatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_atac.hub.export.render', interrupt)
    status, _, errors = run('convert', PARAMS, 'net', '--model', 'atac_resnet8_cifar')
    assert status == 130
    assert 'no file is incomplete' in errors
    assert not os.listdir('.')

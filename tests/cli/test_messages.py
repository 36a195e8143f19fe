"""What `timm-atac` says after a mistake: one line, with the remedy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_atac import write_params
from timm_atac.cli import list_models, main
from timm_atac.hub.convert_files import ModelError, create_model
from timm_atac.hub.licenses import LICENSES, license_problem
from timm_atac.hub.push import HubError, _message, check_token
from timm_atac.utils.words import close_names, counted, did_you_mean, shortened
from timm_atac.weights.convert import to_arrays

PARAMS = str(Path(__file__).parents[1] / 'data' / 'cifar_b1_atac.params')


@pytest.fixture
def error(tmp_path, monkeypatch, capsys) -> Any:
    """Run a command line in a folder with an image and an empty folder: `error(status, *arguments)` gives its error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', '')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('TIMM_ATAC_DEBUG', raising=False)
    Image.new('RGB', (8, 8)).save('red.png')
    Path('empty').mkdir()

    def error(status: int, line: str) -> str:
        try:
            found: Any = main(line.replace('PARAMS', PARAMS).split())
        except SystemExit as end:
            found = end.code
        errors = capsys.readouterr().err.splitlines()
        assert found == status, errors
        return errors[-1].partition(': error: ')[2]

    return error


@pytest.mark.parametrize(
    'status, line, message',
    [
        (1, 'convert nofile out', 'SOURCE nofile: the file does not exist; expected a .params file, or a folder.'),
        (
            1,
            'card empty --facts nofile',
            '--facts nofile: the file does not exist; expected a YAML file with the facts',
        ),
        (1, 'card empty --facts empty', '--facts empty: it is a folder; expected a YAML file'),
        (1, 'card empty --image nofile', '--image nofile: the file does not exist; expected an image'),
        (1, 'convert PARAMS o --model atac_resnet8_cifar --image nofile', '--image nofile: the file does not exist'),
        (1, 'gates nofile --model atac_resnet18', 'IMAGE nofile: the file does not exist; expected an image'),
        (1, 'gates red.png --model local-dir:nofile', '--model local-dir:nofile: the folder does not exist'),
        (1, 'gates red.png --model local-dir:empty', 'empty has no config.json'),
        (1, 'gates red.png --model atac_resnet8_cifr', "did you mean 'atac_resnet8_cifar'?"),
        (
            1,
            'gates red.png --model atac_resnet50.open_atac_in2k',
            "no tag 'open_atac_in2k'; did you mean 'open_atac_in1k'?",
        ),
        *(
            (
                1,
                f'gates red.png --model {name} --untrained --model-kwargs act_layer=atca',
                f"{name} cannot be created: act_layer='atca' is not an activation of timm; did you mean 'atac'?",
            )
            for name in ('resnet8_cifar', 'test_resnet')
        ),
        (
            1,
            'convert PARAMS o --model atac_resnet8_cifar --model-kwargs rd_rato=1',
            "CifarResNet has no argument 'rd_rato'; did you mean 'rd_ratio'?",
        ),
        (1, 'card atac_resnet50.open_atac_in2k', "did you mean 'atac_resnet50.open_atac_in1k'?"),
        (1, 'push --model atac_resnet50.open_atac --repo me/x', "did you mean 'atac_resnet50.open_atac_in1k'?"),
        (1, 'push nofile --repo me/x', 'OUT_DIR nofile: the folder does not exist'),
        (1, 'push empty --repo me/x', 'empty has no config.json'),
        (1, 'push --model atac_resnet50.open_atac_in1k --repo me/x', 'No token for the Hub'),
        (1, 'list atac', "no model of timm_atac matches 'atac'; '*atac*' (in quotes) matches "),
        (1, 'list atac_resnet80', "no model of timm_atac matches 'atac_resnet80'; did you mean 'atac_resnet"),
        (2, 'lst', "did you mean 'list' instead of 'lst'?"),
        (2, 'convert a b --modle x', "unrecognized arguments: --modle x; did you mean '--model' instead of '--modle'?"),
        (2, 'gates red.png --modle x', "are required: --model; did you mean '--model' instead of '--modle'?"),
    ],
)
def test_one_line_with_the_remedy(status, line, message, error) -> None:
    assert message in error(status, line)


@pytest.mark.slow
def test_the_network_that_fits(tmp_path, monkeypatch, capsys) -> None:
    """After `convert` of another network's file, the last line names the network and the arguments that fit."""
    monkeypatch.chdir(tmp_path)
    source: Any = timm.create_model('atac_resnet14_cifar', num_classes=7, in_chans=1)
    write_params('net.params', to_arrays(source))
    assert main(['convert', 'net.params', 'out', '--model', 'atac_resnet8_cifar']) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 20
    assert lines[-1].endswith(
        'The arrays fit another network: give --model atac_resnet14_cifar --model-kwargs in_chans=1 num_classes=7.'
    )
    write_params('net.params', {'conv1.weight': np.ones((2, 3), np.float32)})
    assert main(['convert', 'net.params', 'out', '--model', 'atac_resnet8_cifar']) == 1
    assert 'A file of 1 array does not fit' in (errors := capsys.readouterr().err)
    assert 'another network' not in errors
    assert not Path('out').exists()


@pytest.mark.slow
def test_checkpoint_of_another_network(error) -> None:
    torch.save(timm.create_model('atac_resnet8_cifar', num_classes=7).state_dict(), 'seven.pth')
    gates = 'gates red.png --checkpoint seven.pth --model'
    assert error(1, f'{gates} atac_resnet8_cifar').endswith(
        "'fc.bias' is (7,) in the file and (10,) in the network. Give --model-kwargs num_classes=7."
    )
    assert error(1, f'{gates} atac_resnet14_cifar').endswith(
        'more. Give the network and the --model-kwargs that it was trained with.'
    )
    Path('seven.pth').write_bytes(b'')
    assert error(1, f'{gates} atac_resnet8_cifar') == 'seven.pth is not a checkpoint that can be read: EOFError'
    message = error(1, f'gates red.png --checkpoint {PARAMS} --model atac_resnet8_cifar --model-kwargs num_classes=7')
    assert message.endswith('Give --model-kwargs num_classes=10.')


@pytest.mark.parametrize('setting', ['afile', 'afile/inside'])
def test_a_cache_that_cannot_be_written(setting, error, monkeypatch) -> None:
    Path('afile').touch()
    monkeypatch.setenv('TORCH_HOME', str(Path(setting).absolute()))
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    message = error(1, 'push --model atac_resnet50.open_atac_in1k --repo me/x')
    assert 'cannot be used (' in message and 'set TORCH_HOME to a folder that can be written' in message


def test_a_fault_of_ours(error, monkeypatch, capsys) -> None:
    """An error of another type than those that the package raises is a fault; the traceback is on request."""

    def run(args: object) -> None:
        raise AttributeError('no\nsuch thing')

    monkeypatch.setattr(list_models, 'run', run)
    message = error(70, 'list')
    assert message.startswith('this is a fault of timm_atac (AttributeError: no such thing).')
    assert 'TIMM_ATAC_DEBUG=1' in message
    monkeypatch.setenv('TIMM_ATAC_DEBUG', '1')
    assert main(['list']) == 70
    assert 'Traceback' in capsys.readouterr().err
    assert main(['convert', 'nofile', 'out']) == 1
    assert 'Traceback' in (errors := capsys.readouterr().err) and 'SOURCE nofile' in errors


def test_a_fault_in_the_creation_of_a_model(monkeypatch) -> None:
    """Without arguments of the user, a TypeError in there is not the user's."""

    def fail(*args: object, **kwargs: object) -> None:
        raise TypeError('wrong')

    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(TypeError, match='wrong'):
        create_model('atac_resnet18')
    with pytest.raises(ModelError, match='atac_resnet18 cannot be created: wrong'):
        create_model('atac_resnet18', rd_ratio='a')


@pytest.mark.parametrize('token', ['hf_\xe4', 'hf_a b'])
def test_a_token_with_a_letter_that_no_token_has(token, monkeypatch) -> None:
    monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(HubError, match='HF_TOKEN has a letter that no token has') as caught:
        check_token()
    assert token not in str(caught.value)


def test_licences() -> None:
    assert license_problem('apache-2.0') is license_problem(None) is license_problem(['mit', 'gpl-3.0']) is None
    assert license_problem('other', 'none-stated') is None
    assert "did you mean 'mit'?" in (license_problem('MIT') or '')
    assert "did you mean 'gpl-3.0'?" in (license_problem('GPLv3.0') or '')
    assert len(license_problem('my own licence') or '') < 200
    refusal = ValueError(f'Invalid metadata in README.md.\n- Error: "license" must be one of [{", ".join(LICENSES)}]')
    message = _message(refusal, 'me/x') or ''
    assert len(message) < 200 and 'more]' in message


def test_words() -> None:
    assert [counted(n, 'unit') for n in (0, 1, 2)] == ['0 units', '1 unit', '2 units']
    assert shortened('abcdefg') == ['a', 'b', 'c', 'd', 'e', '... 2 more']
    assert shortened('abcde') == ['a', 'b', 'c', 'd', 'e']
    assert did_you_mean('RELU', ['relu', 'gelu']) == "did you mean 'relu'?"
    assert did_you_mean('xyz', ['relu']) == ''
    assert close_names('layr4.*', ['stem.*', 'layer3.*', 'layer4.*'], count=2) == ['layer4.*', 'layer3.*']

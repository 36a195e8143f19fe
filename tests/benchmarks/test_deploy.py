"""benchmarks/deploy.py and benchmarks/measuring/serving.py"""

import re
import sys
from typing import Any

import deploy
import pytest
import timm
import torch
from measuring import serving
from measuring.serving import FORMS, Form, Setting, with_trained_norms

ARGUMENTS = '--models resnet8_cifar atac_resnet8_cifar --batch-size 2 --img-size 32 --rounds 1'.split()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program and return its lines, with 0 for each number."""
    monkeypatch.setattr('torch.set_num_threads', lambda count: None)

    def run_program(*options: str) -> list[str]:
        monkeypatch.setattr('sys.argv', ['deploy.py', *ARGUMENTS, *options])
        deploy.main()
        return [re.sub(r'\d+\.\d+(e-\d+)?', '0', line) for line in capsys.readouterr().out.splitlines()]

    return run_program


@pytest.mark.slow
def test_table(run, tmp_path) -> None:
    file = tmp_path / 'deploy.md'
    lines = run('--forms', 'eager', 'fuse', '--output', str(file))
    columns = 'form | memory layout | `resnet8_cifar` (ms) | `atac_resnet8_cifar` (ms)'
    assert lines[2].startswith(f'| {columns} | `atac_resnet8_cifar` over `resnet8_cifar` | largest difference')
    assert lines[4:] == [f'| {label} | channels_last | 0 | 0 | 0 (0..0) | 0 | 0 |' for label in ('eager', '`fuse`')]
    assert f'{torch.get_num_threads()} threads, batch 2 at 32 px, medians of 1 rounds; torch ' in lines[0]
    assert file.read_text().count('\n') == len(lines)


def test_missing_library_is_named(run, monkeypatch) -> None:
    for library in ('onnxruntime', 'openvino'):
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(serving, '_export_onnx', lambda model, setting: 'model.onnx')
    lines = run('--forms', 'eager', 'onnxruntime', 'openvino')
    assert [line[:28] for line in lines[4:]] == [
        '| eager | channels_last | 0 ',
        '',
        '- Skipped: ONNX Runtime (imp',
        '- Skipped: OpenVINO, float32',
    ]
    assert 'onnxruntime' in lines[-2] and 'openvino' in lines[-1]


def test_failure_is_listed_and_others_are_measured(run, monkeypatch, capsys) -> None:
    def fail(model, setting):
        raise RuntimeError('no compiler\nof all')

    monkeypatch.setitem(FORMS, 'openvino', Form('OpenVINO', 'contiguous', fail))
    with pytest.raises(SystemExit, match='1 of 2 forms failed'):
        run('--forms', 'openvino', 'eager')
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith('| eager |')
    assert lines[-1] == '- Failed: OpenVINO (RuntimeError: no compiler)'


@pytest.mark.slow
def test_difference_sees_each_branch(tmp_path) -> None:
    """In a new network of timm, the residual branches are multiplied by zero: no form's error would show there."""
    images = torch.randn(4, 3, 64, 64)
    model: Any = with_trained_norms(timm.create_model('atac_resnet18', num_classes=10), images)
    setting = Setting(images, tmp_path, 1)
    with torch.no_grad():
        exact = model(images).double()
    assert serving.largest_difference(FORMS['eager'].build(model, setting), exact) < 1e-5
    with torch.no_grad():
        model.layer4[0].conv1.weight[0] *= 1.01
    assert serving.largest_difference(FORMS['eager'].build(model, setting), exact) > 1e-4


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
# three slow forms are left out: docs/deploy.md has their code, which a test runs
@pytest.mark.parametrize(
    'form', sorted(FORMS.keys() - {'eager', 'fuse', 'aot_inductor', 'compile', 'compile_bfloat16'})
)
def test_form(form, tmp_path) -> None:
    images = torch.randn(2, 3, 32, 32)
    model = with_trained_norms(timm.create_model('atac_resnet8_cifar'), images)
    with torch.no_grad():
        exact = model.double()(images.double())
    try:
        run = FORMS[form].build(model.float(), Setting(images, tmp_path, 1))
    except ImportError as error:
        pytest.skip(str(error))
    limit = 0.3 if 'int8' in form else 0.05 if 'bf' in form else 1e-5
    assert serving.largest_difference(run, exact) < limit

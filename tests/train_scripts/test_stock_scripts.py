"""timm's own scripts train and use our models: train_scripts/stock.py, digits.py and the registration."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import stock
import stock_scripts
import timm
import torch
from packaging.version import Version
from PIL import Image
from stock_scripts import CPU_DDP, DIGITS, GREY, MODEL, PIXELS, RGB, SCHEDULE, Run, results, run, train, validate
from timm_versions import TIMM

pytest.importorskip('sklearn', reason="the digits need the packages of the extra 'ablation'")
digits = pytest.importorskip('digits')
RECIPE = Path(stock.__file__).with_name('digits.yaml')


def needs_scripts(test):
    reason = stock_scripts.reason_to_skip()
    return pytest.mark.slow(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'digits'
    digits.main([str(folder)])
    return folder


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Callable[[tuple[str, ...]], Run]:
    """Return two epochs of training on images of a size. Each size is trained only once."""
    runs: dict[tuple[str, ...], Run] = {}

    def of(size: tuple[str, ...]) -> Run:
        if size not in runs:
            folder = tmp_path_factory.mktemp('trained') / 'run'
            runs[size] = train(data, folder, '--model', MODEL, *size, *PIXELS, *DIGITS, *SCHEDULE)
        return runs[size]

    return of


def logits(checkpoint: Path) -> torch.Tensor:
    """Return the logits of the network for RGB with a checkpoint's weights, always for the same input."""
    model = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(checkpoint)).eval()
    with torch.inference_mode():
        return model(torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


@pytest.mark.slow
def test_image_folder(data) -> None:
    for split, (images, labels) in zip(('train', 'val'), digits.load_digits(8), strict=True):
        files = sorted((data / split).glob('*/*.png'), key=lambda path: path.name)
        assert [int(path.stem) for path in files] == list(range(1, len(images) + 1))
        assert [path.parent.name for path in files] == [str(label) for label in labels.tolist()]
        written = [Image.open(path) for path in files]
        assert {image.mode for image in written} == {'L'}
        assert np.array_equal(np.stack([np.asarray(image) for image in written]), images[:, 0].numpy())
        assert len(np.unique(images)) == 17  # 0..16 of scikit-learn
    assert [path.name for path in data.parent.iterdir()] == ['digits']
    assert all(path.stat().st_mode & 0o100 for path in data.rglob('*') if path.is_dir())


def test_output_folder_is_not_empty(tmp_path) -> None:
    (tmp_path / 'mine').write_text('')
    with pytest.raises(SystemExit, match=f'error: {tmp_path} exists already'):
        digits.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ['mine']


def test_full_disk_leaves_nothing(tmp_path, monkeypatch) -> None:
    save = Image.Image.save

    def fails(image, path) -> None:
        if path.name == '0500.png':
            raise OSError('No space left on device')
        save(image, path)

    monkeypatch.setattr(Image.Image, 'save', fails)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit, match='error: No space left on device'):
        digits.main([str(tmp_path / 'empty')])
    assert list(tmp_path.rglob('*')) == [tmp_path / 'empty']


@needs_scripts
@pytest.mark.parametrize('size', [GREY, RGB], ids=['grey', 'RGB'])
def test_train_and_validate(size, trained, data) -> None:
    found = trained(size)
    assert [row['epoch'] for row in found.rows] == [0, 1]
    assert found.top1 > 90
    assert validate(data, found.last, '--model', MODEL, *size) == pytest.approx(found.top1, abs=1e-3)


@needs_scripts
def test_resume(trained, data, tmp_path) -> None:
    before = trained(GREY)
    more = ('--epochs', '3', '--resume', before.last)
    after = train(data, tmp_path / 'run', '--model', MODEL, *GREY, *PIXELS, *DIGITS, *SCHEDULE, *more)
    assert [row['epoch'] for row in after.rows] == [2]
    assert after.rows[0]['train_loss'] < before.rows[1]['train_loss']
    assert after.top1 > 90


class Case(NamedTuple):
    arguments: tuple[str, ...]
    model: str = MODEL
    size: tuple[str, ...] = GREY
    top1: float = 80  # at least
    says: str = ''


@needs_scripts
@pytest.mark.parametrize(
    'case',
    [
        pytest.param(Case(('--model-kwargs', 'act_layer=atac'), 'resnet18'), id='act_layer'),
        pytest.param(Case((), 'atac_resnet18', RGB), id='atac_resnet18'),
        pytest.param(
            Case(('--amp', '--amp-dtype', 'bfloat16'), 'atac_resnet8_cifar', says='Training in mixed precision'),
            id='amp',
        ),
        pytest.param(Case(('--channels-last',)), id='channels_last'),
        # one validation batch, since each batch size is compiled separately
        pytest.param(Case(('--torchcompile', '-vb', '797'), 'atac_resnet8_cifar'), id='torchcompile'),
    ],
)
def test_train(case, data, tmp_path) -> None:
    arguments = ('--model', case.model, *case.size, *PIXELS, *DIGITS, *SCHEDULE, *case.arguments)
    found = train(data, tmp_path / 'run', *arguments)
    assert [row['epoch'] for row in found.rows] == [0, 1]
    assert found.top1 > case.top1
    assert case.says in found.output


@needs_scripts
def test_recipe_for_digits(data, tmp_path) -> None:
    found = train(data, tmp_path / 'run', '--config', RECIPE)
    assert [row['epoch'] for row in found.rows] == list(range(8))
    assert found.top1 > 96
    as_trained = ('--model', MODEL, *GREY, '--mean', '0', '--std', '1', '--crop-pct', '1')
    assert validate(data, found.last, *as_trained) == pytest.approx(found.top1, abs=1e-3)


@needs_scripts
def test_model_ema(data, tmp_path) -> None:
    arguments = ('--model', MODEL, *GREY, *PIXELS, *DIGITS, *SCHEDULE, '--model-ema', '--model-ema-decay', '0.8')
    found = train(data, tmp_path / 'run', *arguments)
    checkpoint = torch.load(found.last, weights_only=False)
    assert checkpoint['state_dict_ema'].keys() == checkpoint['state_dict'].keys()
    assert found.top1 > 80
    top1 = pytest.approx(found.top1, abs=1e-3)
    assert validate(data, found.last, '--model', MODEL, *GREY, '--use-ema') == top1
    assert validate(data, found.last, '--model', MODEL, *GREY) != top1


@needs_scripts
def test_two_processes(data, tmp_path) -> None:
    (tmp_path / 'cpu_ddp.py').write_text(CPU_DDP)
    found = train(
        data,
        tmp_path / 'run',
        *('--model', MODEL, *GREY, *PIXELS, *DIGITS, *SCHEDULE, '--device-modules', 'cpu_ddp'),
        launcher=('torchrun', '--standalone', '--nproc-per-node', '2'),
        PYTHONPATH=os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), str(tmp_path)])),
    )
    assert 'Process 1, total 2' in found.output
    assert [row['epoch'] for row in found.rows] == [0, 1]
    assert found.top1 > 80
    # each process has 399 images, one of them twice; train.py averages their accuracies without weights
    assert validate(data, found.last, '--model', MODEL, *GREY) == pytest.approx(found.top1, abs=0.3)


@needs_scripts
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='--sync-bn needs two CUDA devices')
def test_sync_bn(data, tmp_path) -> None:
    found = train(
        data,
        tmp_path / 'run',
        *('--model', MODEL, *GREY, *PIXELS, *SCHEDULE, '--num-classes', '10', '--sync-bn'),
        launcher=('torchrun', '--standalone', '--nproc-per-node', '2'),
    )
    assert 'Converted model to use Synchronized BatchNorm' in found.output
    assert found.top1 > 80


@needs_scripts
def test_benchmark(tmp_path) -> None:
    model = ('--model', 'atac_resnet50', '--img-size', '64', '-b', '2', *DIGITS)
    short = ('--bench', 'both', '--num-warm-iter', '1', '--num-bench-iter', '5', '--no-retry')
    found = results(run('benchmark.py', *model, *short, cwd=tmp_path))
    print(found)
    assert found['infer_samples_per_sec'] > 0 and found['train_samples_per_sec'] > 0
    assert found['param_count'] == 25.91  # in millions, with 10 classes


@needs_scripts
def test_bulk_runner(tmp_path) -> None:
    benchmark = stock.scripts_folder() / 'benchmark.py'
    short = ('--img-size', '32', '-b', '2', '--num-warm-iter', '1', '--num-bench-iter', '5', '--no-retry')
    run(
        *('bulk_runner.py', '--model-list', '*resnet8_cifar', '--results-file', 'bulk.csv', benchmark, *short, *DIGITS),
        cwd=tmp_path,
    )
    with open(tmp_path / 'bulk.csv', newline='') as file:
        found = {row['model']: float(row['param_count']) for row in csv.DictReader(file)}
    assert found == {'resnet8_cifar': 0.08, 'atac_resnet8_cifar': 0.09}


@needs_scripts
def test_inference(trained, data, tmp_path) -> None:
    command = ('inference.py', '--data-dir', data, '--model', MODEL, '--checkpoint', trained(RGB).last, *RGB, *PIXELS)
    output = ('--results-dir', tmp_path, '--results-file', 'found', '--include-index', '--fullname')
    run(*command, *DIGITS, *output, '--label-type', 'none', '--no-console-results', cwd=tmp_path)
    with open(tmp_path / 'found.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    right = sum(Path(row['filename']).parent.name == row['index'] for row in rows)
    assert len(rows) == 797
    assert 100 * right / len(rows) == pytest.approx(trained(RGB).top1)


@needs_scripts
@pytest.mark.parametrize(
    'exporter',
    [
        pytest.param((), id='default'),
        pytest.param(
            ('--dynamo',),
            id='dynamo',
            marks=pytest.mark.skipif(
                TIMM < Version('1.0.31'),
                reason='--dynamo of timm before 1.0.31 needs torch.onnx.dynamo_export, which PyTorch 2.9 removed',
            ),
        ),
    ],
)
def test_onnx(exporter, trained, data, tmp_path) -> None:
    onnxruntime = pytest.importorskip('onnxruntime')
    checkpoint = trained(RGB).last
    model = ('--model', MODEL, '--checkpoint', checkpoint, '--num-classes', '10', '--img-size', '16')
    run('onnx_export.py', 'model.onnx', *model, *exporter, cwd=tmp_path)

    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    difference = (torch.from_numpy(y) - logits(checkpoint)).abs().max()
    print(f'logits differ by {difference:.1e}')
    assert difference < 1e-4

    as_trained = ('--img-size', '16', '--crop-pct', '1.0', '--interpolation', 'bilinear', *PIXELS)
    printed = run('onnx_validate.py', data, '--onnx-input', 'model.onnx', *as_trained, cwd=tmp_path)
    print(printed.splitlines()[-1])
    assert f' * Prec@1 {trained(RGB).top1:.3f} ' in printed


@needs_scripts
@pytest.mark.parametrize('ending, option', [('.pth', ()), ('.safetensors', ('--safetensors',))])
def test_clean_checkpoint(ending, option, trained, tmp_path) -> None:
    checkpoint = trained(RGB).last
    run('clean_checkpoint.py', '--checkpoint', checkpoint, '--output', f'clean{ending}', *option, cwd=tmp_path)
    (clean,) = tmp_path.iterdir()
    assert clean.suffix == ending
    assert torch.equal(logits(clean), logits(checkpoint))


@needs_scripts
def test_avg_checkpoints(trained, tmp_path) -> None:
    folder = trained(RGB).folder
    both = ('--input', folder, '--filter', 'checkpoint-?.pth.tar', '--output', 'mean.pth')
    # to sort them, timm before 1.0.23 reads their metric in a way that PyTorch 2.6 refuses
    run('avg_checkpoints.py', *both, *(['--no-sort'] if TIMM < Version('1.0.23') else []), cwd=tmp_path)
    assert logits(tmp_path / 'mean.pth').isfinite().all()
    mean = torch.load(tmp_path / 'mean.pth')
    first, second = (torch.load(folder / f'checkpoint-{i}.pth.tar', weights_only=False)['state_dict'] for i in (0, 1))
    assert mean.keys() == first.keys()
    for name, value in mean.items():
        torch.testing.assert_close(value, ((first[name].double() + second[name].double()) / 2).float(), msg=name)

"""What docs/deploy.md says of each route and each kind of network.

A few networks run by default. `TIMM_ATAC_ALL_ROUTES=1` runs all of them, for about six minutes more.
"""

import os
from typing import Any

import pytest
import timm
import torch
from deployed_networks import NETWORKS, difference, network
from packaging.version import Version

from timm_atac import fuse

LIMIT = 5e-5
ALL_ROUTES = bool(os.environ.get('TIMM_ATAC_ALL_ROUTES'))
SOME = tuple(NETWORKS) if ALL_ROUTES else ('atac_resnet8_cifar', 'se_act', 'xunit', 'fa_resnet50', 'by name')
FEW = tuple(NETWORKS) if ALL_ROUTES else ('atac_resnet8_cifar', 'xunit')  # for slow exporters
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # warnings of the exporters


@pytest.mark.parametrize(
    'name, dynamo',
    [*((name, True) for name in FEW), *((name, False) for name in SOME)],
    ids=lambda value: value if isinstance(value, str) else 'new exporter' if value else 'old exporter',
)
def test_onnx(name, dynamo, tmp_path) -> None:
    """A file that was exported with a batch of four runs another batch."""
    onnxruntime = pytest.importorskip('onnxruntime')
    if dynamo and Version(torch.__version__) < Version('2.6'):
        pytest.skip("PyTorch 2.5's new exporter fails with BatchNorm")
    model, images = network(name)
    path = str(tmp_path / 'model.onnx')
    options: dict[str, Any] = (
        {'dynamic_shapes': ({0: torch.export.Dim('batch')},), 'verbose': False}
        if dynamo
        else {'dynamic_axes': {'images': {0: 'batch'}}}
    )
    torch.onnx.export(model, (images,), path, input_names=['images'], dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(path)
    for x in (images, images[:3]):
        (y,) = session.run(None, {'images': x.numpy()})
        assert difference(y, model(x)) < LIMIT


@pytest.mark.parametrize('name', SOME)
def test_openvino(name) -> None:
    openvino = pytest.importorskip('openvino')
    model, images = network(name)
    converted = openvino.convert_model(model, example_input=images)
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    assert difference(compiled(images.numpy())[0], model(images)) < LIMIT


@pytest.mark.parametrize('name', SOME)
def test_frozen_torchscript(name, tmp_path) -> None:
    model, images = network(name)
    torch.jit.freeze(torch.jit.trace(model, images)).save(str(tmp_path / 'model.pt'))
    with torch.no_grad():
        assert difference(torch.jit.load(str(tmp_path / 'model.pt'))(images), model(images)) < LIMIT


LOAD = """
import os, torch
from pathlib import Path
for path in Path(os.environ['FOLDER']).glob('*.model'):
    model = torch.load(path, weights_only=False)
    with torch.no_grad():
        torch.save(model(torch.load(path.with_suffix('.images'))), path.with_suffix('.y'))
"""


def test_whole_models_in_another_process(tmp_path, python) -> None:
    """Models that `torch.save` wrote load in a process that has not imported timm."""
    expected = {}
    for name in SOME:
        model, images = network(name)
        for kind, saved in (('plain', model), ('fused', fuse(model, example_input=images))):
            torch.save(saved, tmp_path / f'{name} {kind}.model')
            torch.save(images, tmp_path / f'{name} {kind}.images')
            expected[f'{name} {kind}'] = model(images)
    python(LOAD, FOLDER=str(tmp_path))
    assert len(expected) == 2 * len(SOME)
    for name, y in expected.items():
        assert difference(torch.load(tmp_path / f'{name}.y'), y) < LIMIT, name


@pytest.mark.skipif(not ALL_ROUTES, reason='slow; TIMM_ATAC_ALL_ROUTES=1 runs it')
@pytest.mark.parametrize('name', ['atac_resnet8_cifar', 'resnet18'])
def test_aot_inductor_does_not_check_the_memory_layout(name, tmp_path) -> None:
    """If this fails because the outputs agree, PyTorch was mended: remove the warning from docs/deploy.md."""
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    path = os.fspath(tmp_path / 'model.pt2')
    with torch.no_grad():
        expected = model(images)
        torch._inductor.aoti_compile_and_package(torch.export.export(model, (images,)), package_path=path)
        program = torch._inductor.aoti_load_package(path)
        assert difference(program(images), expected) < LIMIT
        assert difference(program(images.contiguous(memory_format=torch.channels_last)), expected) > 0.01

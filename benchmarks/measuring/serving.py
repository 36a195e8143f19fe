"""The forms of a network on a CPU that `deploy.py` compares: fused, compiled, exported, in other data types."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from timm_atac import fuse

__all__ = ['FORMS', 'Form', 'Run', 'Setting', 'largest_difference', 'with_trained_norms']

Run = Callable[[], torch.Tensor]


class Setting(NamedTuple):
    """What a form is built for.

    Args:
        images: Images (B, C, H, W) in float32, contiguous. Each form gets them in its own layout and data type.
        folder: An empty folder for exported files.
        threads: Threads of the form.
    """

    images: torch.Tensor
    folder: Path
    threads: int


class Form(NamedTuple):
    """A way to run a network.

    Args:
        label: Its name in the table.
        layout: Memory layout of its images.
        build: Function of a model in `eval()` mode and a `Setting`. It returns a function that runs the model on the
            images, and raises an `ImportError` if a library is missing.
    """

    label: str
    layout: str
    build: Callable[[nn.Module, Setting], Run]


def with_trained_norms(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give each BatchNorm random scales and shifts, and the statistics of the images. Return the model in eval mode.

    A new network of timm multiplies the residual branch of each block by zero, which would hide the branch's errors.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the running statistics are then those of all batches so far, here of one
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model(images)
    return model.eval()


def largest_difference(run: Run, exact: torch.Tensor) -> float:
    """Return the largest difference from the exact outputs, divided by the largest of these."""
    return ((run().double() - exact).abs().max() / exact.abs().max()).item()


def _eager(model: nn.Module, setting: Setting, dtype: torch.dtype = torch.float32) -> Run:
    model = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    return _on_images(model, setting.images.to(dtype=dtype, memory_format=torch.channels_last))


def _fused(model: nn.Module, setting: Setting, dtype: torch.dtype = torch.float32) -> Run:
    return _eager(fuse(model, example_input=setting.images), setting, dtype)


def _compiled(
    model: nn.Module, setting: Setting, dtype: torch.dtype = torch.float32, options: dict[str, Any] | None = None
) -> Run:
    fused = fuse(model, example_input=setting.images).to(dtype).to(memory_format=torch.channels_last)
    images = setting.images.to(dtype).to(memory_format=torch.channels_last)
    return _on_images(torch.compile(fused, options=options), images)


def _aot_inductor(model: nn.Module, setting: Setting) -> Run:
    fused = fuse(model, example_input=setting.images).to(memory_format=torch.channels_last)
    images = setting.images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        program = torch.export.export(fused, (images,))
        path = str(setting.folder / 'model.pt2')
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    return _on_images(torch._inductor.aoti_load_package(path), images)


def _onnx_runtime(model: nn.Module, setting: Setting) -> Run:
    return _run_onnx(_export_onnx(model, setting), setting)


def _onnx_runtime_int8(model: nn.Module, setting: Setting) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{'images': setting.images.numpy()}])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    path = setting.folder / 'int8.onnx'
    quantize_static(_export_onnx(model, setting), path, Images(), per_channel=True)
    return _run_onnx(path, setting)


def _export_onnx(model: nn.Module, setting: Setting) -> Path:
    import onnxscript  # noqa: F401  # the exporter needs it

    path = setting.folder / 'model.onnx'
    torch.onnx.export(model, (setting.images,), path, input_names=['images'], dynamo=True, verbose=False)
    return path


def _run_onnx(path: Path, setting: Setting) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    # without this, its threads wait busily after a call, and slow down the form that is measured next
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    images = {'images': setting.images.numpy()}
    return lambda: torch.from_numpy(session.run(None, images)[0])


def _openvino(model: nn.Module, setting: Setting, precision: str = 'f32') -> Run:
    import openvino

    converted = openvino.convert_model(model, example_input=setting.images)
    options = {'INFERENCE_PRECISION_HINT': precision, 'INFERENCE_NUM_THREADS': setting.threads}
    compiled = openvino.compile_model(converted, 'CPU', options | {'PERFORMANCE_HINT': 'LATENCY'})
    used = compiled.get_property('INFERENCE_PRECISION_HINT').to_string()
    if used != precision:
        raise ValueError(f'OpenVINO computes in {used}, not in {precision}')
    images = setting.images.numpy()
    return lambda: torch.from_numpy(compiled(images)[0])


def _on_images(model: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Run:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(images)

    return run


def _bfloat16(build: Callable[..., Run]) -> Callable[[nn.Module, Setting], Run]:
    return lambda model, setting: build(model, setting, dtype=torch.bfloat16)


FORMS: dict[str, Form] = {
    'eager': Form('eager', 'channels_last', _eager),
    'fuse': Form('`fuse`', 'channels_last', _fused),
    'compile': Form('`fuse`, torch.compile', 'channels_last', _compiled),
    'compile_freezing': Form(
        '`fuse`, torch.compile with freezing',
        'channels_last',
        lambda model, setting: _compiled(model, setting, options={'freezing': True}),
    ),
    'aot_inductor': Form('`fuse`, AOTInductor', 'channels_last', _aot_inductor),
    'onnxruntime': Form('ONNX Runtime', 'contiguous', _onnx_runtime),
    'openvino': Form('OpenVINO, float32', 'contiguous', _openvino),
    'bfloat16': Form('`fuse(model).bfloat16()`', 'channels_last', _bfloat16(_fused)),
    'compile_bfloat16': Form('`fuse(model).bfloat16()`, torch.compile', 'channels_last', _bfloat16(_compiled)),
    'openvino_bf16': Form(
        'OpenVINO, bfloat16', 'contiguous', lambda model, setting: _openvino(model, setting, precision='bf16')
    ),
    'onnxruntime_int8': Form('ONNX Runtime, int8, static', 'contiguous', _onnx_runtime_int8),
}

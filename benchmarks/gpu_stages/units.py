"""Stage for single units: inference in every form, a copy and a ReLU; then training with and without the kernels."""

from functools import partial
from typing import Any

import kernels
import torch
import torch.nn as nn
from kernels import DTYPES, Setting, Shape
from measuring.timing import Spread, can_run_kernels, ratio

from gpu_stages.stage import Stage, main

SHAPES: list[Shape] = [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
SMALL: list[Shape] = [(16, 3, 2)]


def setting(stage: Stage, dtype: str, rounds: int = 15) -> Setting:
    """Return a setting with feature maps in channels_last and a batch of 256."""
    batch, rounds, shapes = (2, 1, SMALL) if stage.small else (256, rounds, SHAPES)
    return Setting(torch.device(stage.device), DTYPES[dtype], torch.channels_last, batch, rounds, shapes)


def _inference(stage: Stage, dtype: str, shape: Shape, names: tuple[str, ...]) -> None:
    unit_setting = setting(stage, dtype)
    torch.compiler.reset()
    unit = kernels.unit_for(shape[0])
    runs: dict[str, Any] = {
        'copy': kernels.clone,
        'ReLU': partial(kernels.infer, nn.ReLU()),
        **kernels.forms(unit, names, unit_setting),
    }
    times = unit_setting.measure(runs, unit_setting.feature_map(shape))
    for form in runs:
        stage.emit(
            'inference',
            shape='x'.join(map(str, shape)),
            dtype=dtype,
            form=form,
            us=Spread.of(times[form]).median * 1e6,
            share_of_copy=1 / ratio(times, form, 'copy').median,
            over_relu=ratio(times, form, 'ReLU').median,
        )


def _training(stage: Stage, shape: Shape, names: tuple[str, ...], graphs: bool) -> None:
    times = kernels.training(setting(stage, 'bfloat16', rounds=9), shape, names, graphs)
    for form in names:
        stage.emit(
            'training',
            shape='x'.join(map(str, shape)),
            form=form,
            timed='CUDA graph' if graphs else 'calls',
            us=Spread.of(times[form]).median * 1e6,
            over_copy=ratio(times, form, 'copy').median,
            over_atac=ratio(times, form, 'ATAC').median,
        )


def run(stage: Stage) -> None:
    device = torch.device(stage.device)
    has_kernels = can_run_kernels(device)
    if not has_kernels:
        stage.skip('kernels of units', f'no kernel runs on {device}')
    dtypes = ('bfloat16',) if stage.small else ('bfloat16', 'float16')
    shapes = SMALL if stage.small else SHAPES
    forms = ('eager', 'folded', *['kernel'] * has_kernels)
    trained = ('ATAC', 'ATACMe', *['ATACMe, kernels'] * has_kernels)
    parts = [
        (f'{shape} {dtype}', partial(_inference, stage, dtype, shape, forms)) for dtype in dtypes for shape in shapes
    ]
    for graphs in (False,) if device.type == 'cpu' else (True, False):
        way = 'graphs' if graphs else 'calls'
        parts += [(f'training {shape}, {way}', partial(_training, stage, shape, trained, graphs)) for shape in shapes]
    # last, since compiling may take long
    compiled = ('compiled', *['kernel'] * has_kernels)
    parts += [
        (f'{shape} {d}, compiled', partial(_inference, stage, d, shape, compiled)) for d in dtypes for shape in shapes
    ]
    for what, part in parts:
        stage.attempt(what, part)


if __name__ == '__main__':
    main('units', run)

"""Stage for the other networks of Table 4: forms of the local attention of fa_resnet50, and training steps."""

from functools import partial

import local_attention
import torch
from measuring.timing import Spread, interleaved, peak_memory, ratio

from gpu_stages.networks import measure
from gpu_stages.stage import Stage, main

SHAPES = ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))
SMALL = ((32, 8, 8),)
NETWORKS = ('fa_resnet50', 'aa_resnet50', 'ge_plus_resnet50')


def _measure_forms(stage: Stage, names: tuple[str, ...], shape: tuple[int, int, int]) -> None:
    device = torch.device(stage.device)
    dtype = torch.float32 if device.type == 'cpu' else torch.bfloat16
    batch, rounds = (2, 1) if stage.small else (32, 15)
    torch.compiler.reset()
    half = shape[0] // local_attention.HEADS // 2
    sizes = [(batch, *shape)] * 3 + [(half, local_attention.WINDOW)] * 2
    tensors = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]
    made = local_attention.forms(list(names), shape, device, dtype)
    runs = {name: partial(local_attention.step, form, tensors) for name, form in made.items()}
    times = interleaved(runs, rounds, device, at_least=0.02)
    for name in names:
        stage.emit(
            'local attention',
            shape='x'.join(map(str, shape)),
            form=name,
            ms=1e3 * Spread.of(times[name]).median,
            over_tiles=ratio(times, name, 'tiles').median,
            peak_MB=peak_memory(runs[name], device) / 1e6,
        )


def run(stage: Stage) -> None:
    shapes = SMALL if stage.small else SHAPES
    for part in stage.args:
        if part == 'networks' and stage.small:
            stage.skip(
                'training steps of the other networks',
                '224 pixels take too long in a small run',
            )
        elif part == 'networks':
            for name in NETWORKS:
                step = partial(measure, stage, 'training', 'bf16', name, 'training of Table 4', batch=64, rounds=5)
                stage.attempt(name, step)
        elif part == 'flex' and stage.device == 'cpu':
            stage.skip('flex_attention', 'it has no backward pass on a CPU')
        else:  # 'flex' is a part of its own, since compiling may fail or take long
            names = ('tiles', 'flex') if part == 'flex' else ('3x3 convolution', 'tiles')
            for shape in shapes:
                stage.attempt(f'{", ".join(names)}, {shape}', partial(_measure_forms, stage, names, shape))


if __name__ == '__main__':
    main('attention', run)

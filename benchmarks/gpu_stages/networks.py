"""Stage for networks relative to timm's resnet50: time and peak memory of inference and of a training step."""

from functools import partial

import speed
import timm
import torch
from measuring.timing import can_run_kernels
from speed import MODES, Mode

from gpu_stages.stage import Stage, main

SMALL = {'resnet50': 'resnet8_cifar', 'atac_resnet50': 'atac_resnet8_cifar'}  # small networks in place of large ones
INFERENCE = ('atac_resnet50', 'atac_resnet50_full', 'seresnet50', 'resnet50, silu')
TRAINING = (
    'atac_resnet50',
    'atac_resnet50, checkpoint',
    'atac_resnet50, plain',
    'seresnet50',
    'atac_resnet50_full',
    'atac_resnet50_full, checkpoint',
    'atac_resnet50_full, plain',
    'resnet50, silu',
)


def mode_of(stage: Stage, name: str) -> Mode:
    # 'max-autotune' would take the whole time of the stage for one network
    return Mode(*MODES[name], device=torch.device(stage.device), compile_mode='default')


def measure(stage: Stage, what: str, mode: str, name: str, table: str = '', batch: int = 256, rounds: int = 10) -> None:
    """Measure one network and resnet50, which take turns."""
    size = 224
    if stage.small:
        batch, size, rounds = 2, 8, 1
    torch.compiler.reset()
    run = speed.inference if what == 'inference' else speed.training
    names = list(dict.fromkeys(['resnet50', name]))
    run_mode = mode_of(stage, mode)
    has_kernels = can_run_kernels(run_mode.device) and not run_mode.compiled
    rows = run(run_mode, names, batch, size, rounds, kernels=has_kernels)
    fused = next((row.seconds.median for row in rows if row.name == 'resnet50, fused'), None)
    for row in rows:
        stage.emit(
            table or what,
            mode=mode,
            model=row.name,
            images_per_s=batch / row.seconds.median,
            over_resnet50=row.over.median,
            low=row.over.low,
            high=row.over.high,
            over_fused=None if fused is None else row.seconds.median / fused,
            peak_MB=row.peak / 1e6,
            saved_MB=None if row.saved is None else row.saved / 1e6,
        )


CASES = {
    'inference': [('inference', 'half', name) for name in INFERENCE],
    'training': [('training', 'bf16', name) for name in TRAINING],
    'compiled': [
        ('inference', 'compile_half', 'atac_resnet50'),
        ('inference', 'compile_half', 'atac_resnet50_full'),
        ('training', 'compile_bf16', 'atac_resnet50'),
        ('training', 'compile_bf16', 'atac_resnet50_full'),
    ],
}


def run(stage: Stage) -> None:
    stage.disable_compiler_if_small()
    torch._dynamo.config.recompile_limit = 64  # all models run the code of one class
    if stage.small:
        stage.skip('networks', f'small networks are measured in their place: {SMALL}')
        speed.MODELS = {name: partial(timm.create_model, small) for name, small in SMALL.items()}
    for part in stage.args:
        cases = [case for case in CASES[part] if case[2] in SMALL][:1] if stage.small else CASES[part]
        for what, mode, name in cases:
            stage.attempt(f'{name}, {what}, {mode}', partial(measure, stage, what, mode, name))


if __name__ == '__main__':
    main('networks', run)

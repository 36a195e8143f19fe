"""Stage for the CIFAR networks: the time of an epoch in every form."""

from functools import partial
from typing import Any, NamedTuple

import torch
from ablations.grid import RECIPES, Run
from ablations.trainer import Machine, Trainer
from measuring.random_images import random_images
from measuring.timing import Spread, interleaved

from gpu_stages.stage import Stage, main

IMAGES = 50_000


class Form(NamedTuple):
    """How a network is trained."""

    name: str
    precision: str = 'float32'
    channels_last: bool = False
    compile_mode: str | None = None
    cuda_graph: bool = False  # as in ablation.py: of the gradients


EAGER = (
    Form('eager'),
    Form('channels_last', channels_last=True),
    Form('bfloat16', 'bfloat16'),
    Form('bfloat16, channels_last', 'bfloat16', True),
)
GRAPHS = (
    Form('CUDA graphs', compile_mode='reduce-overhead'),
    Form('CUDA graphs, bfloat16, channels_last', 'bfloat16', True, 'reduce-overhead'),
)
GRAPH = (Form('gradients in a CUDA graph', cuda_graph=True),)
COMPILED = (Form('compiled', compile_mode='default'),)
# the most important first; compiling takes long
ORDER = (
    (EAGER[:1], 1),
    (GRAPH, 1),
    (GRAPHS, 1),
    (EAGER[1:], 1),
    (EAGER[:1], 3),
    (GRAPH, 3),
    (GRAPHS[:1], 3),
    (EAGER[1:], 3),
    (COMPILED, 1),
)


def _measure_epoch(stage: Stage, name: str, blocks: int, form: Form) -> None:
    device = torch.device(stage.device)
    recipe = RECIPES['authors']
    if stage.small:
        recipe = recipe._replace(batch_size=2)
    steps, rounds = (1, 1) if stage.small else (40, 3)
    torch.compiler.reset()
    run = Run('cifar10', name, blocks, 4, 0, **recipe._asdict(), precision=form.precision)
    machine = Machine(device, channels_last=form.channels_last, cuda_graph=form.cuda_graph)
    trainer = Trainer(run, random_images(steps * recipe.batch_size, device), machine)
    network: Any = trainer.wrap_model()
    if form.compile_mode is not None:
        network = torch.compile(network, mode=form.compile_mode)
    times = interleaved({'': partial(trainer.train_epoch, network)}, rounds, device)['']
    epoch = Spread.of(times).median / steps * (IMAGES // recipe.batch_size)
    stage.emit(
        'epochs',
        activation=name,
        b=blocks,
        form=form.name,
        ms_a_step=1e3 * Spread.of(times).median / steps,
        seconds_an_epoch=epoch,
    )


def run(stage: Stage) -> None:
    stage.disable_compiler_if_small()
    torch.backends.cudnn.benchmark = True  # as in ablation.py
    cases = [(form, blocks, name) for forms, blocks in ORDER for form in forms for name in ('relu', 'atac')]
    if stage.small:
        cases = [(form, 1, 'atac') for form in (EAGER[1], *GRAPH, GRAPHS[0])]
    for form, blocks, name in cases:
        stage.attempt(f'{name}, b = {blocks}, {form.name}', partial(_measure_epoch, stage, name, blocks, form))


if __name__ == '__main__':
    main('cifar', run)

#!/usr/bin/env python
"""Time of a training step of the ablation by memory layout, compiler, precision, threads and processes.

Each form trains the same network on the same random images of CIFAR's size, with augmentation and optimizer. The forms
take turns in one process. With `--processes N`, N processes measure at the same time, and images/s is their sum.

    python benchmarks/ablation_step.py --threads 1
    python benchmarks/ablation_step.py --threads 1 --processes 2 --forms channels_last
    python benchmarks/ablation_step.py --threads 2 --forms channels_last
    python benchmarks/ablation_step.py --threads 1 --forms 'channels_last, compiled' --kinds
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / 'train_scripts'))

import torch
from ablations.grid import RECIPES, Run, activation
from ablations.provenance import device_name
from ablations.trainer import Machine, Trainer
from measuring.random_images import random_images
from measuring.timing import Spread, interleaved, ratio
from torch.profiler import ProfilerActivity, profile


class Form(NamedTuple):
    """How a step is computed."""

    channels_last: bool
    compile: bool
    precision: str = 'float32'


FORMS = {
    'contiguous': Form(False, False),
    'channels_last': Form(True, False),
    'contiguous, compiled': Form(False, True),
    'channels_last, compiled': Form(True, True),
    'channels_last, bfloat16': Form(True, False, 'bfloat16'),
    'channels_last, compiled, bfloat16': Form(True, True, 'bfloat16'),
}
BASE = 'contiguous'
Times = dict[str, list[float]]  # seconds per step, by activation and form


def epochs(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return functions that train one epoch of `args.steps` steps, by activation and form."""
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # each network compiles the same code again
    device = torch.device(args.device)
    recipe = RECIPES['authors']
    data = random_images(args.steps * recipe.batch_size, device)

    def epoch(name: str, form: Form) -> Callable[[], object]:
        run = Run('cifar10', name, args.blocks, 4, 0, **recipe._asdict(), precision=form.precision)
        trainer = Trainer(run, data, Machine(device, channels_last=form.channels_last, compile=form.compile))
        network = trainer.wrap_model()
        trainer.train_epoch(network)  # compiles now, since the next form resets the compiler's caches
        return lambda: trainer.train_epoch(network)

    return {f'{name} {form}': epoch(name, FORMS[form]) for name in args.acts for form in args.forms}


def measure(args: argparse.Namespace, start: Any = None) -> Times:
    """Time all forms. With a barrier `start`, begin when all processes are ready."""
    subjects = epochs(args)
    if start is not None:
        start.wait()
    times = interleaved(subjects, args.rounds, torch.device(args.device))
    return {key: [seconds / args.steps for seconds in found] for key, found in times.items()}


def milliseconds_by_kind(args: argparse.Namespace) -> str:
    """Return the time of a step by kind of operation, in Markdown. It includes the profiler's overhead."""
    lines = [
        '| activation | form | 3x3 convolutions | 1x1 convolutions | all else |',
        '| --- | --- | --- | --- | --- |',
    ]
    for key, run in epochs(args).items():
        run()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            run()
        found = {3: 0.0, 1: 0.0, 0: 0.0}
        for event in profiler.key_averages(group_by_input_shape=True):
            shapes = [shape for shape in event.input_shapes if len(shape) == 4]
            kernels = [s[2] for s in shapes if s[2:] in ([1, 1], [3, 3])] if 'convolution' in event.key else []
            found[kernels[0] if kernels else 0] += event.self_cpu_time_total / 1e3 / args.steps
        name, _, form = key.partition(' ')
        lines.append(f'| {activation(name).label} | {form} | {" | ".join(f"{found[k]:.0f}" for k in (3, 1, 0))} |')
    x = torch.randn(RECIPES['authors'].batch_size, 16, 32, 32)
    times = interleaved({'copy': x.clone}, args.rounds, torch.device('cpu'), at_least=0.05)['copy']
    return '\n'.join([*lines, '', f'A copy of a map of 16 x 32 x 32, ms: {Spread.of([1e3 * s for s in times])}'])


def _child(args: argparse.Namespace, start: Any, results: Any) -> None:
    results.put(measure(args, start))


def measure_side_by_side(args: argparse.Namespace) -> list[Times]:
    """Call `measure` in several processes at the same time."""
    context = multiprocessing.get_context('spawn')
    start, results = context.Barrier(args.processes), context.Queue()
    children = [context.Process(target=_child, args=(args, start, results)) for _ in range(args.processes)]
    for child in children:
        child.start()
    found = [results.get() for _ in children]
    for child in children:
        child.join()
    return found


def report(found: list[Times], args: argparse.Namespace) -> str:
    batch_size = RECIPES['authors'].batch_size
    lines = ['| activation | form | ms per step | images/s | over the first form | over the first activation |']
    lines.append('| --- | --- | --- | --- | --- | --- |')
    for name in args.acts:
        for form in args.forms:
            key = f'{name} {form}'
            seconds = [Spread.of(times[key]).median for times in found]
            per_second = sum(batch_size / each for each in seconds)
            over = [ratio(found[0], key, base) for base in (f'{name} {args.forms[0]}', f'{args.acts[0]} {form}')]
            lines.append(
                f'| {activation(name).label} | {form} | {1e3 * sum(seconds) / len(seconds):.0f} | {per_second:.0f} '
                f'| {over[0]} | {over[1]} |'
            )
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--acts', nargs='+', default=['relu', 'atac'], metavar='NAME', help='default: relu atac')
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=list(FORMS), metavar='FORM', help='default: all')
    parser.add_argument('--blocks', type=int, default=1, choices=(1, 2, 3, 4, 5), help='blocks per stage (default: 1)')
    parser.add_argument('--steps', type=int, default=3, help='steps per sample (default: 3)')
    parser.add_argument('--rounds', type=int, default=9, help='samples of each form (default: 9)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads per process')
    parser.add_argument('--processes', type=int, default=1, help='default: 1')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--kinds', action='store_true', help='print the time by kind of operation instead; only on a CPU'
    )
    args = parser.parse_args()
    if args.kinds and args.device != 'cpu':
        parser.error(f'argument --kinds: it only profiles a CPU, got --device {args.device}')
    torch.set_num_threads(args.threads)
    if args.kinds:
        print(milliseconds_by_kind(args))
        return
    found = measure_side_by_side(args) if args.processes > 1 else [measure(args)]
    where = f'{args.processes} process(es), {device_name(torch.device(args.device))}, torch {torch.__version__}'
    print(
        f'b = {args.blocks}, batch {RECIPES["authors"].batch_size}, {where}; medians of {args.rounds} rounds (range)\n'
    )
    print(report(found, args))


if __name__ == '__main__':
    main()

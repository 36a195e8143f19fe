#!/usr/bin/env python
"""Run all measurements on a GPU with one command, in a few minutes and without a network.

    PYTHONPATH=. python benchmarks/gpu.py --minutes 9 --out gpu_report
    PYTHONPATH=. python benchmarks/gpu.py --out gpu_report --images cifar10-jpeg.tar.xz    # also trains
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --small --out /tmp/report           # shows that all stages run

It needs Python with torch, triton, timm and pytest. A stage or a test file is skipped if another package is missing;
the report names the package. Each stage runs as a separate process group, which is ended after its share of the time.
Later stages get the time that a stage does not need. Each row is added to OUT/rows.jsonl as soon as it is measured, and
OUT/report.md is then written again.

What to do with the report:

1. Look at failed tests before any time.
2. MEASURED_TO_WIN in timm_atac/kernels/switch.py gets the numbers of channels at which the report says that the kernel
   wins, under the GPU's compute capability.
3. Where it loses, the report has other tiles. The winners go into the tables of timm_atac/kernels/atac.py, if
   tests/kernels/test_kernel_ops.py and `python benchmarks/kernel_resources.py` accept them. `python
   benchmarks/kernel_tiles.py` measures all tiles.
4. benchmarks/log.md gets what came of the predictions, and docs/speed.md the figures and the name of the GPU.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gpu_stages.report import report, summary
from gpu_stages.stage import SKIPPED, read_rows

ROOT = Path(__file__).parent.parent
MOST_BYTES = 15_000_000  # in the log
TESTS = (
    'test_kernels.py',
    'test_kernels_training.py',
    'test_kernel_ops.py',
    'test_memory_efficient.py',
    'test_fuse.py',
    'test_checkpointed.py',
    'test_kernels_benchmarks.py',
    'test_cuda_graph.py',
)


class Plan(NamedTuple):
    """The time and the processes of a stage.

    Attributes:
        share: Share of the total time.
        steps: Arguments of each of its processes, which run one after the other.
        at_least: Seconds that it may take even if its share is less.
        takes_rest: True if it may also use the time that earlier stages did not need.
    """

    share: float
    steps: tuple[tuple[str, ...], ...] = ((),)
    at_least: float = 0.0
    takes_rest: bool = True


PLANS = {
    'machine': Plan(0.05, at_least=60),  # reads torch and timm from a cold disk
    'correct': Plan(0.17, (TESTS,)),
    'units': Plan(0.16),
    'networks': Plan(0.25, (('inference', 'training'), ('compiled',))),
    'attention': Plan(0.10, (('forms', 'networks', 'flex'),)),
    'tiles': Plan(0.08, takes_rest=False),
    'cifar': Plan(0.12),
    'grid': Plan(0.07),
}
SMALL_TESTS = ('test_kernels.py', 'test_checkpointed.py')  # the other files take too long


class Ended(NamedTuple):
    """A step that has ended. `how` is 'done', 'skipped', 'failed' or 'out of time'."""

    stage: str
    step: str
    how: str
    seconds: float


def environment(device: str, cache: Path) -> dict[str, str]:
    """Return the environment of the stages: our modules on PYTHONPATH, and all caches in a temporary folder."""
    paths = [ROOT, ROOT / 'benchmarks', ROOT / 'train_scripts', os.environ.get('PYTHONPATH', '')]
    found = os.environ | {
        'PYTHONPATH': os.pathsep.join(map(str, filter(None, paths))),
        'PYTHONUNBUFFERED': '1',
        'TORCHINDUCTOR_CACHE_DIR': str(cache / 'inductor'),
        'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '0',  # the cache above is empty at the start
        'TRITON_CACHE_DIR': str(cache / 'triton'),
        'TMPDIR': str(cache),
    }
    torch = find_spec('torch')
    if torch is not None and torch.origin and (Path(torch.origin).parent / '__pycache__').is_dir():
        found['PYTHONDONTWRITEBYTECODE'] = '1'
    else:  # Python has no compiled files of torch yet: let the processes share them
        found['PYTHONPYCACHEPREFIX'] = str(cache / 'bytecode')
    return found | ({'TRITON_INTERPRET': '1'} if device == 'cpu' else {})  # runs the kernels' code without a GPU


def run_step(
    command: list[str], seconds: float, env: dict[str, str], log: Path, tick: Callable[[], object]
) -> tuple[str, int]:
    """Run a command in a new process group, and end the group when its time is over.

    Args:
        command: The command.
        seconds: Its time.
        env: Its environment.
        log: File that its output is added to.
        tick: Function that is called every half second, and at the end.

    Returns:
        How it ended, as in `Ended`, and its exit status.
    """
    end = time.monotonic() + seconds
    with open(log, 'ab') as output:
        child = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            while child.poll() is None and time.monotonic() < end:
                time.sleep(0.1 if seconds < 5 else 0.5)
                tick()
            is_late = child.poll() is None
        finally:
            _end_group(child)
    tick()
    if is_late:
        return 'out of time', child.returncode
    return {0: 'done', SKIPPED: 'skipped'}.get(child.returncode, 'failed'), child.returncode


def _end_group(child: subprocess.Popen) -> None:
    """End a process group with SIGTERM, and after a second with SIGKILL."""
    for number, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(child.pid, number)
        except (ProcessLookupError, PermissionError):  # the group has ended; macOS raises the second
            break
        try:
            child.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def command_of(stage: str, step: Sequence[str], seconds: float, args: argparse.Namespace) -> list[str]:
    """Return the command of a step."""
    command = [sys.executable, '-m', f'gpu_stages.{stage}', '--device', args.device, '--seconds', f'{seconds:.1f}']
    command += ['--rows', str(args.out / 'rows.jsonl'), *['--small'] * args.small]
    return [*command, *(['--images', str(args.images)] if args.images else []), *step]


def run_all(args: argparse.Namespace, cache: Path) -> list[Ended]:
    """Run the stages, and write the report after each new row."""
    out: Path = args.out
    rows, log = out / 'rows.jsonl', out / 'log.txt'
    env = environment(args.device, cache)
    start = time.monotonic()
    total = 60 * args.minutes
    ended: list[Ended] = []
    seen = -1

    def write(force: bool = False) -> None:
        nonlocal seen
        size = rows.stat().st_size if rows.exists() else 0
        if force or size != seen:
            seen = size
            _replace(out / 'report.md', report(read_rows(rows), ended, args))

    saved = 0.0
    for name in args.stages:
        plan = PLANS[name]
        begun = time.monotonic()
        is_last = name == args.stages[-1]
        rest = start + total - begun
        own = max(plan.share * total, plan.at_least)
        share = rest if is_last else min(rest, own + max(saved, 0) * plan.takes_rest)
        steps = (SMALL_TESTS,) if args.small and name == 'correct' else plan.steps
        for index, step in enumerate(steps):
            left = begun + share - time.monotonic()
            if left < 1:
                ended.append(Ended(name, ' '.join(step), 'out of time', 0.0))
                continue
            # later steps keep some time if this one hangs
            seconds = left if index + 1 == len(steps) else 0.7 * left
            step_start = time.monotonic()
            print(f'{name} {" ".join(step)}: at most {seconds:.0f} s', flush=True)
            how, status = run_step(command_of(name, step, seconds, args), seconds, env, log, write)
            ended.append(Ended(name, ' '.join(step), how, time.monotonic() - step_start))
            print(f'    {how}{f", exit status {status}" if how == "failed" else ""}', flush=True)
            write(force=True)
        saved += plan.share * total - (time.monotonic() - begun)
    return ended


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f'.{path.name}')
    new.write_text(text, encoding='utf-8')
    os.replace(new, path)


def _shorten(log: Path) -> None:
    """Remove the middle of a log with more than `MOST_BYTES`."""
    content = log.read_bytes()
    if len(content) > MOST_BYTES:
        half = MOST_BYTES // 2
        log.write_bytes(content[:half] + b'\n[...]\n' + content[-half:])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=9.0, help='time of all stages together (default: 9)')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder for the report; new, or empty')
    parser.add_argument(
        '--stages', nargs='+', choices=PLANS, default=list(PLANS), metavar='STAGE', help=', '.join(PLANS)
    )
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--small', action='store_true', help='tiny sizes, which only show that all stages run')
    parser.add_argument('--images', type=Path, metavar='FILE', help='archive of the JPEG copy of CIFAR-10')
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f'argument --minutes: {args.minutes:g} is not above 0')
    if args.device == 'cpu' and not args.small:
        parser.error('argument --device: cpu needs --small; to measure a CPU, use benchmarks/speed.py')
    if args.images and not args.images.is_file():
        parser.error(f'argument --images: {args.images} is not a file')
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f'argument --out: {args.out} is not empty or not a folder; give a new folder')
    args.stages = [name for name in PLANS if name in args.stages]
    args.out, args.images = args.out.resolve(), args.images and args.images.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the running stage
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            ended = run_all(args, Path(cache))
            _shorten(args.out / 'log.txt')
            print(summary(read_rows(args.out / 'rows.jsonl'), ended, args), flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1 if any(step.how == 'failed' for step in ended) else 0


if __name__ == '__main__':
    sys.exit(main())

"""Stage that trains the networks of the ablation in several processes on one GPU until its time is over."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from gpu_stages.stage import Stage, main

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 60
MOST_BYTES = 15_000_000  # in the archive of networks
# blocks, activations and seeds, the most important first, as in docs/results.md
GRID = (
    ('1', 'relu atac se_act local_se nin', 3),
    ('2 3 4', 'relu atac', 3),
    ('2 3 4', 'se_act local_se nin', 3),
    ('1', 'silu xunit', 3),
)


def run(stage: Stage) -> None:
    """Train until the time is over. Finished runs are copied to the folder of the rows every second."""
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        if stage.images is None:
            stage.skip('the grid on CIFAR-10', '--images is not given')
            if not stage.small:
                return
            commands = [
                _command(stage, data, ['--datasets', 'digits', '--epochs', '1', '--size', '8', '--acts', 'relu'])
            ]
        else:
            if stage.seconds_left() < LEAST_SECONDS:
                stage.skip(
                    'the grid on CIFAR-10', f'{stage.seconds_left():.0f} s are left, and reading the images takes 30 s'
                )
                return
            (data / 'cifar10-jpeg').mkdir()
            with tarfile.open(stage.images) as archive:
                archive.extractall(data / 'cifar10-jpeg', filter='data')
            commands = [
                _command(stage, data, ['--datasets', 'cifar10-jpeg', '--data-dir', temporary, '--recipe', 'short',
                                       '--acts', *acts.split(), '--blocks', *blocks.split(), '--seeds', str(seeds)])
                for blocks, acts, seeds in GRID
            ]  # fmt: skip
        count = 1 if stage.small else min(8, max(1, (os.cpu_count() or 2) // 2))
        _train(stage, commands, count, data / 'results')


def _command(stage: Stage, data: Path, options: list[str]) -> list[str]:
    script = str(ROOT / 'train_scripts' / 'ablation.py')
    where = ['--device', stage.device, '--output', str(data / 'results'), '--export']
    return [sys.executable, script, *options, *where, *(['--seeds', '1'] if stage.small else [])]


def _train(stage: Stage, commands: list[list[str]], count: int, results: Path) -> None:
    """Run the commands one after the other in each of `count` workers, and collect finished runs."""
    workers = [Worker(commands) for _ in range(count)]
    while any(worker.works() for worker in workers) and stage.seconds_left() > 10:
        time.sleep(1)
        collect(results, stage.rows.parent)
    is_late = any(worker.works() for worker in workers)
    end = time.monotonic() + 4
    for worker in workers:
        worker.interrupt()
    for worker in workers:
        worker.end(max(0.1, end - time.monotonic()))
    collect(results, stage.rows.parent)
    rows = results / 'ablation.csv'
    done = rows.read_text().count('\n') - 1 if rows.exists() else 0
    stage.emit(
        'grid', options='; '.join(' '.join(command[2:]) for command in commands), processes=count, finished_runs=done
    )
    failed = [status for worker in workers for status in worker.statuses if status not in (0, 130)]
    if failed and not is_late:
        stage.emit('errors', what='ablation.py', error=f'exit status {failed[0]}; see log.txt')


class Worker:
    """Runs commands one after the other. A worker goes on to the next command when others still train for this one."""

    def __init__(self, commands: list[list[str]]) -> None:
        self._left = list(commands)
        self._child: subprocess.Popen | None = None
        self.statuses: list[int] = []

    def works(self) -> bool:
        """Start the next command if the last one has ended. False if no command is left."""
        if self._child is not None and self._child.poll() is None:
            return True
        if self._child is not None:
            self.statuses.append(self._child.returncode)
            self._child = None
        if not self._left:
            return False
        self._child = subprocess.Popen(self._left.pop(0), env={**os.environ, 'OMP_NUM_THREADS': '1'})
        return True

    def interrupt(self) -> None:
        self._left = []
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGINT)  # it prints which runs are unfinished

    def end(self, patience: float) -> None:
        """Wait for the command that runs, and kill it after `patience` seconds."""
        if self._child is None:
            return
        try:
            self.statuses.append(self._child.wait(timeout=patience))
        except subprocess.TimeoutExpired:
            self._child.kill()


def collect(results: Path, out: Path) -> None:
    """Copy rows, curves and the networks of seed 0 to `out`, the networks up to `MOST_BYTES`."""
    rows, copied = results / 'ablation.csv', out / 'ablation.csv'
    curves = sorted((results / 'curves').glob('*.csv'))
    if curves:
        _zip(out / 'curves.zip', curves, results)
    if not rows.exists() or (copied.exists() and copied.read_bytes() == rows.read_bytes()):
        return
    size = 0
    fitting = []
    networks = results.glob('*_seed0*/model.safetensors')
    # those of the package first
    for path in sorted(networks, key=lambda path: (not re.search('_(relu|atac)_', path.parent.name), path)):
        size += path.stat().st_size
        if size < MOST_BYTES:
            fitting += [path, path.parent / 'config.json']
    _zip(out / 'networks.zip', fitting, results)
    shutil.copy(rows, out / '.ablation.csv')
    os.replace(out / '.ablation.csv', copied)


def _zip(path: Path, files: list[Path], root: Path) -> None:
    new = path.with_name(f'.{path.name}')
    with zipfile.ZipFile(new, 'w', zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.relative_to(root))
    os.replace(new, path)


if __name__ == '__main__':
    main('grid', run)

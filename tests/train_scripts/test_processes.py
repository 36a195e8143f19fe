"""train_scripts/ablation.py in several processes: a shared results folder, torchrun, SLURM."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

run_ablation = pytest.importorskip('run_ablation', reason="needs the packages of the extra 'ablation'")
run, rows = run_ablation.run, run_ablation.rows
ablation = pytest.importorskip('ablation')
frozen_ablation = pytest.importorskip('frozen_ablation')
options = pytest.importorskip('ablations.options')


@pytest.mark.slow
@pytest.mark.weekly
def test_two_processes_share_a_folder(tmp_path) -> None:
    command = [sys.executable, ablation.__file__, '--acts', 'relu', 'silu', '--epochs', '1', '--size', '8']
    processes = [
        subprocess.Popen([*command, '--output', str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [row.run[1:5] for row in rows(tmp_path)]
    assert sorted(found) == sorted((a, 1, 4, s) for a in ('relu', 'silu') for s in (0, 1))


@pytest.mark.slow
def test_second_pass_trains_the_run_of_a_killed_process(tmp_path, monkeypatch) -> None:
    """The other process releases its lock while this one trains its last run."""
    lock = FileLock(tmp_path / '.locks' / 'digits_relu_b1_seed0_epochs-1_size-8.lock')
    train = ablation.train

    def release_and_train(*arguments: Any) -> Any:
        lock.release()
        return train(*arguments)

    monkeypatch.setattr(ablation, 'train', release_and_train)
    (tmp_path / '.locks').mkdir()
    with lock:
        assert run('--acts', 'relu', 'silu', '--seeds', 1, '--epochs', 1, '--size', 8, '--output', tmp_path) == 0
    assert [found.run.activation for found in rows(tmp_path)] == ['silu', 'relu']


@pytest.mark.slow
def test_locked_runs_are_left_to_other_processes(tmp_path, capsys) -> None:
    command = ['--acts', 'relu', 'silu', '--seeds', 1, '--epochs', 1, '--size', 8, '--output', tmp_path]
    (tmp_path / '.locks').mkdir()
    with FileLock(tmp_path / '.locks' / 'digits_relu_b1_seed0_epochs-1_size-8.lock'):
        assert run(*command) == 0
    assert [found.run.activation for found in rows(tmp_path)] == ['silu']
    assert 'Still trained by other processes: 1 of 2 runs.' in capsys.readouterr().err


def test_slurm_without_torchrun_is_one_process(monkeypatch) -> None:
    for name, value in dict(SLURM_NTASKS='4', SLURM_PROCID='1', SLURM_LOCALID='1').items():
        monkeypatch.setenv(name, value)
    machine = ablation.set_up(options.create_parser('').parse_args(['--device', 'cpu', '--channels-last']))
    assert machine == ablation.Machine(torch.device('cpu'), channels_last=True, compile=None, cuda_graph=None)


@pytest.mark.slow
def test_torchrun(tmp_path) -> None:
    """Two processes train one run. They write one row, and only rounding separates their weights from one process's."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    end = subprocess.run(
        [*launch, frozen_ablation.__file__, str(tmp_path / 'two')], capture_output=True, text=True, timeout=240
    )
    assert end.returncode == 0, end.stderr
    assert frozen_ablation.main(tmp_path / 'one') == 0
    one, two = (load_file(tmp_path / name / 'weights.safetensors') for name in ('one', 'two'))
    (row,), (alone,) = rows(tmp_path / 'two'), rows(tmp_path / 'one')
    data = ablation.load('digits', 8, tmp_path, download=False)
    start = ablation.Trainer(alone.run, data, ablation.Machine(torch.device('cpu'))).model.state_dict()
    convs = [name for name in one if 'conv' in name]
    largest = max(((two[name] - one[name]).abs().max() / one[name].abs().max()).item() for name in convs)
    print(f'largest difference over the largest weight of a layer: {largest:.1e}')
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    moved = [(one[name] - tensor).abs().max().item() for name, tensor in start.items() if 'conv' in name]
    assert min(moved) > 3e-4
    assert (row.run.processes, alone.run.processes) == (2, 1)
    assert row.result.accuracy == pytest.approx(alone.result.accuracy, abs=0.3)
    assert row.result.train_loss == pytest.approx(alone.result.train_loss, abs=1e-3)

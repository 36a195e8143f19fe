"""train_scripts/ablation.py is interrupted or killed, and run again."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

run_ablation = pytest.importorskip('run_ablation', reason="needs the packages of the extra 'ablation'")
run, rows = run_ablation.run, run_ablation.rows
ablation = pytest.importorskip('ablation')
SCRIPTS = str(Path(ablation.__file__).parent)


@pytest.mark.slow
def test_interrupt_keeps_rows_and_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    save = ablation.Trainer.save

    def interrupted(trainer: Any, path: Path) -> None:
        save(trainer, path)
        if trainer.run.activation == 'silu':
            signal.raise_signal(signal.SIGINT)

    command = ['--acts', 'relu', 'silu', '--seeds', 1, '--epochs', 1, '--size', 8, '--output', tmp_path]
    monkeypatch.setattr(ablation.Trainer, 'save', interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        assert run(*command) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    captured = capsys.readouterr()
    assert 'Interrupted; unfinished: 1 of 2 runs; the same command resumes them.' in captured.err
    assert '| ReLU' in captured.out
    (checkpoint,) = (tmp_path / 'checkpoints').iterdir()
    assert checkpoint.name == 'digits_silu_b1_seed0_epochs-1_size-8.safetensors'
    monkeypatch.undo()
    assert run(*command) == 0
    assert [found.run.activation for found in rows(tmp_path)] == ['relu', 'silu']


@pytest.mark.slow
def test_killed_in_mid_epoch(tmp_path) -> None:
    """After kill -9, the same command ends with the same bits as a run that was not killed."""
    command = ['--acts', 'atac', '--seeds', '1', '--epochs', '3', '--size', '8', '--export', '--output']
    output = tmp_path / 'killed'
    process = subprocess.Popen(
        [
            sys.executable,
            '-c',
            KILLED.format(scripts=SCRIPTS, argv=[*command, str(output)]),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, errors
    (checkpoint,) = (output / 'checkpoints').glob('*.safetensors')
    assert not (output / 'ablation.csv').exists()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process above
    try:
        assert run(*command, output) == 0
        assert run(*command, tmp_path / 'whole') == 0
    finally:
        torch.set_num_threads(threads)
    (found,), (expected,) = rows(output), rows(tmp_path / 'whole')
    assert found.run == expected.run
    times = dict(seconds=0, cpu_seconds=0, finished='')
    assert found.result._replace(**times) == expected.result._replace(**times)
    weights = [folder / found.run.name / 'model.safetensors' for folder in (output, tmp_path / 'whole')]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not checkpoint.exists()


# it kills itself in the second epoch, at a step that does not depend on the machine's speed
KILLED = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import torch
from ablations import trainer
torch.set_num_threads(1)
steps = trainer.batches
def batches(data, batch_size, augment, seed, *place):
    for i, batch in enumerate(steps(data, batch_size, augment, seed, *place)):
        if seed & 1 and i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
trainer.batches = batches
import ablation
ablation.main({argv!r})
"""

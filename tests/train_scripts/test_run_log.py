"""train_scripts/ablations/run_log.py"""

import csv
import sys
from typing import Any

import pytest

run_ablation = pytest.importorskip('run_ablation', reason="needs the packages of the extra 'ablation'")
run, rows = run_ablation.run, run_ablation.rows


@pytest.mark.slow
def test_curve(tmp_path) -> None:
    """The file has one line per epoch, also if the run was interrupted and resumed."""
    command = ['--acts', 'relu', '--seeds', 1, '--epochs', 3, '--size', 8]
    run(*command, '--output', tmp_path / 'whole')
    with run_ablation.interrupted_after(2):
        assert run(*command, '--output', tmp_path / 'killed') == 130
    run(*command, '--output', tmp_path / 'killed')
    curves = []
    for name in ('whole', 'killed'):
        (path,) = (tmp_path / name / 'curves').iterdir()
        assert path.name == 'digits_relu_b1_seed0_epochs-3_size-8.csv'
        with open(path, newline='') as file:
            keys = ('epoch', 'train/loss', 'eval/loss', 'eval/top1', 'lr')
            curves.append([[line[key] for key in keys] for line in csv.DictReader(file)])
    assert curves[0] == curves[1]
    assert [line[0] for line in curves[0]] == ['1', '2', '3']
    assert float(curves[0][-1][3]) == pytest.approx(rows(tmp_path / 'whole')[0].result.accuracy, abs=1e-3)


@pytest.mark.slow
def test_logs(tmp_path) -> None:
    pytest.importorskip('tensorboard', reason="needs the packages of the extra 'logging'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run('--acts', 'relu', '--seeds', 1, '--epochs', 2, '--size', 8, '--log-tensorboard', '--output', tmp_path)
    (folder,) = (tmp_path / 'tensorboard').iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    accuracy = events.Scalars('eval/top1')
    assert [event.step for event in accuracy] == [1, 2]
    assert accuracy[-1].value == pytest.approx(rows(tmp_path)[0].result.accuracy, abs=1e-3)
    assert len(events.Scalars('train/loss')) == len(events.Scalars('lr')) == 2


@pytest.mark.slow
def test_wandb(tmp_path, monkeypatch) -> None:
    """A resumed run keeps its id at Weights & Biases, and no epoch is left out."""
    calls: list[tuple[str, Any, Any]] = []

    class Wandb:
        def init(self, **options: Any) -> 'Wandb':
            calls.append(('init', options['id'], options))
            return self

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(('log', step, values))

        def finish(self) -> None:
            calls.append(('finish', None, None))

    monkeypatch.setitem(sys.modules, 'wandb', Wandb())
    command = ['--acts', 'relu', '--seeds', 1, '--epochs', 2, '--size', 8, '--log-wandb', '--output', tmp_path]
    with run_ablation.interrupted_after(1):
        assert run(*command) == 130
    assert run(*command) == 0
    steps = [step for name, step, _ in calls if name == 'log']
    assert steps == [1, 1, 2]  # epoch 1 is trained again, since its checkpoint was not written
    first, second = (options for name, _, options in calls if name == 'init')
    assert first == second
    assert (first['project'], first['name'], first['resume']) == (
        'timm_atac',
        'digits_relu_b1_seed0_epochs-2_size-8',
        'allow',
    )
    assert first['config']['epochs'] == 2
    last = next(values for name, step, values in calls if (name, step) == ('log', 2))
    assert last['eval/top1'] == pytest.approx(rows(tmp_path)[0].result.accuracy, abs=1e-3)
    assert [name for name, _, _ in calls].count('finish') == 2

"""benchmarks/gpu.py: stages that end, hang or fail, their rows, and the report."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_stages
import gpu
import pytest
from gpu_stages.report import kernel_is_fastest, predictions, summary
from gpu_stages.stage import Stage, read_rows

BENCHMARKS = Path(gpu.__file__).parent


def arguments(out: Path, *options: str) -> argparse.Namespace:
    return gpu.parse(['--device', 'cpu', '--small', '--out', str(out), *options])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return 'Z' not in subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True).stdout


def run_step(tmp_path: Path, code: str, seconds: float = 20.0) -> tuple[str, int]:
    return gpu.run_step([sys.executable, '-c', code], seconds, dict(os.environ), tmp_path / 'log.txt', lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    'code, expected',
    [
        ('print("said")', ('done', 0)),
        ('raise SystemExit(75)', ('skipped', 75)),
        ('raise ValueError("bad")', ('failed', 1)),
        ('import os, signal; os.kill(os.getpid(), signal.SIGSEGV)', ('failed', -signal.SIGSEGV)),
    ],
)
def test_how_a_step_ends(code, expected, tmp_path) -> None:
    assert run_step(tmp_path, code) == expected
    log = (tmp_path / 'log.txt').read_text()
    assert {'done': 'said', 'failed': 'ValueError: bad' if expected[1] == 1 else ''}.get(expected[0], '') in log


@pytest.mark.slow
def test_step_that_hangs_is_ended_with_its_children(tmp_path) -> None:
    """They are also ended if they ignore SIGTERM."""
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(90)'
child = subprocess.Popen([sys.executable, '-c', code])
open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))
time.sleep(90)
"""
    start = time.monotonic()
    how, _ = run_step(tmp_path, code, seconds=3)
    assert how == 'out of time' and time.monotonic() - start < 15
    assert not is_alive(int((tmp_path / 'pid').read_text()))


@pytest.mark.slow
def test_other_stages_run_after_one_that_fails(monkeypatch, tmp_path, capsys) -> None:
    plans = {name: gpu.Plan(0.2, takes_rest=name != 'hangs') for name in ('first', 'fails', 'hangs', 'lacks', 'last')}
    monkeypatch.setattr(gpu, 'PLANS', plans)
    bodies = {
        'first': "stage.emit('numbers', value=1 / 3, what='a|b')",
        'fails': "stage.emit('numbers', value=2); raise ValueError('bad')",
        'hangs': "stage.emit('numbers', value=3); import time; time.sleep(90)",
        'lacks': 'import a_package_that_is_not_there',
        'last': "stage.emit('numbers', value=stage.seconds_left())",
    }
    monkeypatch.setattr(gpu, 'command_of', fake_stages.fake_stages(bodies))
    out = tmp_path / 'report'
    assert gpu.main(['--device', 'cpu', '--small', '--out', str(out), '--minutes', '0.25']) == 1
    assert sorted(path.name for path in out.iterdir()) == ['log.txt', 'report.md', 'rows.jsonl']
    rows = read_rows(out / 'rows.jsonl')
    assert [row['stage'] for row in rows] == ['first', 'fails', 'hangs', 'lacks', 'last']
    assert rows[0]['value'] == 0.33333 and rows[3]['table'] == 'skipped'
    assert 5 < rows[4]['value'] < 12  # more than its share of 3 s, since the others needed less
    report = (out / 'report.md').read_text()
    for line in (
        '| first |  | done |',
        '| fails |  | failed |',
        '| hangs |  | out of time |',
        '| lacks |  | skipped |',
        '| last |  | done |',
        '| 0.3333 | a\\|b |',
        "No module named 'a_package_that_is_not_there'",
    ):
        assert line in report
    assert 'ValueError: bad' in (out / 'log.txt').read_text()
    screen = capsys.readouterr().out
    assert f'Report: {out / "report.md"}' in screen.splitlines()[-1]


@pytest.mark.slow
def test_program_that_is_ended_leaves_rows_and_report(tmp_path) -> None:
    """The program is ended in the middle of a stage. It leaves rows and report, and no process."""
    code = f"""
import sys
sys.path[:0] = [{str(BENCHMARKS)!r}, {str(Path(fake_stages.__file__).parent)!r}]
import gpu, fake_stages
gpu.PLANS = {{'hangs': gpu.Plan(1.0)}}
body = "import os; stage.emit('numbers', value=7, pid=os.getpid()); import time; time.sleep(90)"
gpu.command_of = fake_stages.fake_stages({{'hangs': body}})
sys.exit(gpu.main(['--device', 'cpu', '--small', '--out', {str(tmp_path / 'out')!r}]))
"""
    program = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL)
    report = tmp_path / 'out' / 'report.md'
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (report.exists() and '| 7 |' in report.read_text()):
        time.sleep(0.2)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=30) == 143
    (row,) = read_rows(tmp_path / 'out' / 'rows.jsonl')
    assert row['value'] == 7 and not is_alive(row['pid'])


def test_incomplete_last_row(tmp_path) -> None:
    path = tmp_path / 'rows'
    assert read_rows(path) == []
    path.write_text('{"stage": "a", "value": 1}\n{"stage": "a", "va')
    assert read_rows(path) == [{'stage': 'a', 'value': 1}]


def test_test_files_of_the_stage_correct_exist() -> None:
    tests = BENCHMARKS.parent / 'tests'
    for name in {*gpu.TESTS, *gpu.SMALL_TESTS}:
        assert len([*tests.rglob(name)]) == 1, name


def make_stage(tmp_path: Path) -> Stage:
    return Stage('units', 'cpu', True, time.monotonic() + 60, tmp_path / 'rows', None, [])


def test_parts_of_a_stage(tmp_path) -> None:
    """A part that fails adds a row, and the next parts run. Numbers that JSON lacks become strings."""
    stage = make_stage(tmp_path)
    assert not stage.attempt('first', lambda: 1 / 0)
    assert not stage.attempt('second', lambda: __import__('a_package_that_is_not_there'))
    assert stage.attempt('third', lambda: stage.emit('numbers', value=float('nan'), other=None))
    first, second, third = read_rows(stage.rows)
    assert first == dict(stage='units', table='errors', what='first', error='ZeroDivisionError: division by zero')
    assert second['table'] == 'skipped' and 'a_package_that_is_not_there' in second['reason']
    assert third['value'] == 'nan' and json.loads(stage.rows.read_text().splitlines()[-1])['other'] is None


def unit(channels: int, form: str, us: float, share: float, dtype: str = 'bfloat16') -> dict[str, Any]:
    where = dict(stage='units', table='inference', shape=f'{channels}x7x7', dtype=dtype)
    return {**where, 'form': form, 'us': us, 'share_of_copy': share}


def network(table: str, model: str, over: float, mode: str = '') -> dict[str, Any]:
    mode = mode or ('half' if table == 'inference' else 'bf16')
    return dict(stage='networks', table=table, mode=mode, model=model, over_resnet50=over, over_fused=over + 0.1)


def test_predictions_and_outcomes() -> None:
    rows = [
        unit(512, 'kernel', 20, 0.6),
        network('inference', 'atac_resnet50, fused, kernels', 0.94),
        network('training', 'atac_resnet50', 1.2),
        network('training', 'atac_resnet50', 1.4, mode='compile_bf16'),  # not part of the prediction
        network('training', 'seresnet50', 1.3),
    ]
    outcomes = {claim.claim: claim.outcome for claim in predictions(rows)}
    assert outcomes['unit of 512 channels by the kernel, share of a copy'] == '60%'
    assert outcomes['unit of 64 channels by the kernel, share of a copy'] == 'not measured'
    assert outcomes['inference of atac_resnet50, fused, kernels over resnet50, fused'] == '1.040: holds'
    less = [claim for claim in predictions(rows) if claim.claim == 'training of atac_resnet50 over resnet50']
    assert [(claim.predicted, claim.outcome) for claim in less] == [
        ('at most 1.10', '1.200: does not hold'),
        ('less than seresnet50 (1.300)', '1.200: holds'),
    ]


def test_kernel_is_fastest() -> None:
    """The kernel must be the fastest form for every shape and dtype, and the compiled form must be measured."""
    rows = [unit(64, form, us, 1 / us) for form, us in (('copy', 1), ('ReLU', 2), ('compiled', 5), ('kernel', 4))]
    rows += [unit(128, form, us, 1 / us) for form, us in (('compiled', 5), ('kernel', 4))]
    rows += [unit(128, form, us, 1 / us, 'float16') for form, us in (('compiled', 5), ('kernel', 6))]
    rows += [unit(256, form, us, 1 / us) for form, us in (('folded', 5), ('kernel', 4))]  # the compiled form is missing
    assert kernel_is_fastest(rows) == {64: True, 128: False}


def test_summary_fits_a_screen(tmp_path) -> None:
    rows = [dict(stage='correct', table='failures', test=f'test_{i}', why='x' * 500) for i in range(100)]
    lines = summary(rows, [gpu.Ended('correct', '', 'failed', 1.0)], arguments(tmp_path / 'out')).splitlines()
    assert len(lines) <= 60 and 'more lines in the report' in lines[-2] and lines[-1].startswith('Report: ')
    assert max(map(len, lines)) <= 200


def test_shapes_and_tiles_to_measure() -> None:
    tiles = pytest.importorskip('gpu_stages.tiles', reason='needs Triton')
    rows = [unit(64, 'kernel', 1, 0.9), unit(64, 'folded', 2, 0.4)]  # the fastest form, and fast enough
    rows += [unit(256, 'kernel', 1, 0.6), unit(256, 'folded', 2, 0.4)]  # too slow
    rows += [unit(512, 'kernel', 2, 0.5), unit(512, 'folded', 1, 0.9)]  # not the fastest form
    assert tiles.slow_shapes(rows) == [(512, 7, 7), (256, 7, 7)]
    used = tiles.Tile(128, 64, 32, 64, 4, 2)
    others = [used._replace(warps=8, stages=3), used._replace(stages=3), used._replace(positions=64)]
    assert [tiles.by_distance(used, others)[i] for i in (0, 2)] == [others[1], others[0]]


@pytest.mark.parametrize(
    'options, message',
    [
        (['--minutes', '0'], '0 is not above 0'),
        (['--images', 'nowhere.tar.xz'], 'nowhere.tar.xz is not a file'),
        (['--stages', 'unit'], 'invalid choice'),
    ],
)
def test_wrong_arguments(options, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match='2'):
        arguments(tmp_path / 'out', *options)
    assert message in capsys.readouterr().err


def test_folder_that_is_not_empty(tmp_path, capsys) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match='2'):
        arguments(tmp_path)
    assert 'is not empty or not a folder; give a new folder' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        gpu.parse(['--device', 'cpu', '--out', str(tmp_path / 'new')])
    assert 'cpu needs --small' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.weekly
def test_every_stage_in_small(tmp_path) -> None:
    """Without the entry point, as if nothing was installed, PYTHONPATH is enough."""
    out = tmp_path / 'report'
    command = [sys.executable, str(BENCHMARKS / 'gpu.py'), '--device', 'cpu', '--small', '--out', str(out)]
    env = {**os.environ, 'PYTHONPATH': str(BENCHMARKS.parent), 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    log = (out / 'log.txt').read_text()
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}\n{log}'
    rows = read_rows(out / 'rows.jsonl')
    assert not [row for row in rows if row['table'] in ('errors', 'failures')], log
    steps = (out / 'report.md').read_text().split('## ')[1].splitlines()
    assert steps[0] == 'Stages' and len(steps) > 10
    assert not [line for line in steps if '| failed |' in line or '| out of time |' in line]
    found = {(row['stage'], row['table']) for row in rows}
    assert {(name, 'skipped') for name in ('networks', 'attention', 'cifar', 'grid')} <= found
    assert {('machine', 'ceilings'), ('correct', 'tests'), ('units', 'training'), ('networks', 'inference')} <= found
    assert {('networks', 'training'), ('attention', 'local attention'), ('cifar', 'epochs'), ('grid', 'grid')} <= found
    assert len([*out.iterdir()]) <= 8 and {path.suffix for path in out.iterdir()} <= {
        '.txt',
        '.md',
        '.jsonl',
        '.csv',
        '.zip',
    }
    assert (out / 'ablation.csv').read_text().count('\n') == 2
    assert not [*BENCHMARKS.glob('**/*.tmp')]

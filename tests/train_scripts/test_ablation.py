"""train_scripts/ablation.py and options.py"""

import csv
import itertools
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

image_data = pytest.importorskip('ablations.image_data', reason="needs the packages of the extra 'ablation'")
ablation = pytest.importorskip('ablation', reason="needs the packages of the extra 'ablation'")
pytest.importorskip('sklearn', reason="needs the packages of the extra 'ablation'")
pytest.importorskip('matplotlib', reason="needs the packages of the extra 'ablation'")
load = pytest.importorskip('ablations.image_data').load
make_folder = pytest.importorskip('test_image_data').folder
store = pytest.importorskip('ablations.store')
options = pytest.importorskip('ablations.options')
frozen_ablation = pytest.importorskip('frozen_ablation')

SCRIPT = Path(ablation.__file__)


def rows(folder: Path) -> list[Any]:
    return store.read_rows(folder / 'ablation.csv')


def run(*arguments: Any) -> int:
    return ablation.main([str(argument) for argument in arguments])


def runs(*arguments: str) -> list[tuple]:
    return [found[:5] for found in options.runs(options.create_parser('').parse_args(arguments), 1)]


def test_run_and_again(tmp_path, capsys) -> None:
    output = tmp_path / 'out'
    command = ['--acts', 'relu', 'atac', 'relu', '--blocks', 2, 1, '--epochs', 1, '--size', 8, '--output', output]
    assert run(*command, '--seeds', 1) == 0
    first = rows(output)
    assert [found.run[1:3] for found in first] == [('relu', 1), ('atac', 1), ('relu', 2), ('atac', 2)]
    assert all(0 <= found.result.accuracy <= 100 and found.result.seconds > 0 for found in first)
    printed = capsys.readouterr().out
    assert '| b = 1' in printed and '| b = 2' in printed
    assert f'{first[1].result.accuracy:.2f}' in printed
    assert (output / 'tables.md').read_text().strip() in printed
    (plot,) = output.glob('*.png')
    assert f'Plot: {plot}' in printed
    assert not list((output / 'checkpoints').iterdir())

    # more of it: what is there is not done again
    assert run(*command, '--seeds', 2) == 0
    again = rows(output)
    assert again[:4] == first
    assert [found.run.seed for found in again[4:]] == [1] * 4
    captured = capsys.readouterr()
    assert '4 of 8 runs had been done already.' in captured.err
    assert '±' in captured.out


def test_grid() -> None:
    found = runs('--datasets', 'cifar10', 'cifar100', '--blocks', '1', '2', '3', '4', '--seeds', '1')
    assert len(found) == len(set(found)) == 2 * 4 * 5
    assert found[:5] == [('cifar10', name, 1, 4, 0) for name in ('relu', 'se_act', 'nin', 'local_se', 'atac')]
    placed = runs('--acts', 'relu', 'atac', '--act-stages', '1', '2', '3', '4', '--seeds', '1')
    assert placed == [('digits', 'relu', 1, 4, 0), *(('digits', 'atac', 1, n, 0) for n in (1, 2, 3, 4))]


def test_shards_are_the_whole() -> None:
    command = ['--blocks', '1', '2', '--seeds', '3']
    shards = [runs(*command, '--shard', f'{i}/4') for i in (1, 2, 3, 4)]
    assert sorted(itertools.chain(*shards)) == sorted(runs(*command))
    assert {len(shard) for shard in shards} == {7, 8}


def test_settings_of_the_recipe_and_of_the_command() -> None:
    parser = options.create_parser('')
    (cifar,) = options.runs(parser.parse_args(['--datasets', 'cifar10', '--acts', 'relu', '--seeds', '1']), 2)
    assert cifar._asdict() == {
        **dict(
            dataset='cifar10', activation='relu', blocks=1, act_stages=4, seed=0, epochs=400, batch_size=128, lr=0.2
        ),
        **dict(weight_decay=1e-4, size=32, augment=True, sched='multistep', precision='float32', processes=2),
        'held_out': 0,
    }
    given = ['--epochs', '3', '--batch-size', '64', '--lr', '0.5', '--weight-decay', '0', '--no-aug', '--amp']
    (changed,) = options.runs(parser.parse_args(['--datasets', 'cifar10', '--acts', 'relu', '--seeds', '1', *given]), 1)
    assert changed[5:] == (3, 64, 0.5, 0.0, 32, False, 'multistep', 'float16', 1, 0)
    short = parser.parse_args(['--datasets', 'cifar10-jpeg', '--recipe', 'short', '--hold-out', '500', '--seeds', '1'])
    run = options.runs(short, 1)[0]
    assert (run.recipe, run.held_out, run.sched) == ('short', 500, 'cosine')
    assert run.name == 'cifar10-jpeg_relu_b1_seed0_recipe-short_held_out-500'


def test_seeds_come_one_after_the_other() -> None:
    """Where not all runs are done, all activations have the same number of seeds."""
    found = runs('--acts', 'relu', 'atac', '--seeds', '2', '--blocks', '1', '2')
    assert found == [('digits', name, b, 4, seed) for b in (1, 2) for seed in (0, 1) for name in ('relu', 'atac')]


@pytest.mark.parametrize(
    'device, arguments, channels_last, updates, compiled',
    [
        ('cpu', [], True, 999, False),
        ('cpu', [], True, 1000, True),
        ('cpu', ['--no-channels-last', '--no-compile'], False, 1000, False),
        ('cpu', ['--compile'], True, 1, True),
        ('cuda', [], False, 10**6, False),
        ('cuda', ['--channels-last', '--compile'], True, 1, True),
    ],
)
def test_defaults_of_a_device(device, arguments, channels_last, updates, compiled, monkeypatch) -> None:
    monkeypatch.setattr(shutil, 'which', lambda name: f'/usr/bin/{name}')
    args = options.create_parser('').parse_args(arguments)
    args.device = device
    machine = ablation.set_up(args)
    assert (machine.channels_last, machine.compiles(updates)) == (channels_last, compiled)


def test_without_a_compiler_nothing_is_compiled_unless_asked(monkeypatch) -> None:
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    machine = ablation.set_up(options.create_parser('').parse_args(['--device', 'cpu']))
    assert not machine.compiles(10**6)
    assert machine._replace(compile=True).compiles(1)


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path) -> None:
    command = [sys.executable, str(SCRIPT), '--acts', 'relu', 'silu', '--epochs', '1', '--size', '8']
    processes = [
        subprocess.Popen([*command, '--output', str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [row.run[1:5] for row in rows(tmp_path)]
    assert sorted(found) == sorted((a, 1, 4, s) for a in ('relu', 'silu') for s in (0, 1))


def test_second_pass_finds_what_another_process_left(tmp_path, monkeypatch) -> None:
    """The other one dies while this one is at its last run."""
    lock = FileLock(tmp_path / '.locks' / 'digits_relu_b1_seed0_epochs-1_size-8.lock')
    train = ablation.train

    def then_die(*arguments: Any) -> Any:
        lock.release()
        return train(*arguments)

    monkeypatch.setattr(ablation, 'train', then_die)
    (tmp_path / '.locks').mkdir()
    with lock:
        assert run('--acts', 'relu', 'silu', '--seeds', 1, '--epochs', 1, '--size', 8, '--output', tmp_path) == 0
    assert [found.run.activation for found in rows(tmp_path)] == ['silu', 'relu']


def test_a_job_of_slurm_is_not_torchrun(monkeypatch) -> None:
    for name, value in dict(SLURM_NTASKS='4', SLURM_PROCID='1', SLURM_LOCALID='1').items():
        monkeypatch.setenv(name, value)
    machine = ablation.set_up(options.create_parser('').parse_args(['--device', 'cpu', '--channels-last']))
    assert machine == ablation.Machine(torch.device('cpu'), channels_last=True, compile=None)


def test_one_name_for_an_activation() -> None:
    found = runs('--acts', 'Swish', 'ReLU', 'SEActivation', 'silu', 'relu', 'LocalSENet', '--seeds', '1')
    assert [name for _, name, *_ in found] == ['silu', 'relu', 'se_act', 'local_se']


def test_image_folder(tmp_path, monkeypatch, capsys) -> None:
    """Named by its place: from anywhere the same run, and files with its name stay in the results folder."""
    make_folder(tmp_path / 'data' / 'pets')
    monkeypatch.chdir(tmp_path / 'data')
    command = [
        '--acts',
        'relu',
        '--seeds',
        1,
        '--epochs',
        1,
        '--size',
        8,
        '--batch-size',
        2,
        '--export',
        '--output',
        tmp_path,
    ]
    assert run('--datasets', 'pets', *command) == 0
    assert run('--datasets', tmp_path / 'data' / 'pets', *command) == 0
    (row,) = rows(tmp_path)
    assert row.run.dataset == str(tmp_path / 'data' / 'pets')
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['pets']
    network = tmp_path / row.run.name
    assert f'Network: {network}' in capsys.readouterr().out
    card = (network / 'README.md').read_text()
    assert f'trained on pets. Top-1 accuracy: {row.result.accuracy} %' in card and str(tmp_path) not in card


def test_networks_that_were_not_asked_for(tmp_path, capsys) -> None:
    command = ['--acts', 'relu', '--seeds', 1, '--epochs', 1, '--size', 8, '--output', tmp_path]
    assert run(*command) == run(*command, '--export') == 0
    assert '1 finished runs have no network' in capsys.readouterr().err


def test_leaves_to_others_what_they_are_at(tmp_path, capsys) -> None:
    command = ['--acts', 'relu', 'silu', '--seeds', 1, '--epochs', 1, '--size', 8, '--output', tmp_path]
    (tmp_path / '.locks').mkdir()
    with FileLock(tmp_path / '.locks' / 'digits_relu_b1_seed0_epochs-1_size-8.lock'):
        assert run(*command) == 0
    assert [found.run.activation for found in rows(tmp_path)] == ['silu']
    assert '1 of 2 runs are left to the processes that are at them.' in capsys.readouterr().err


def test_interrupt_keeps_rows_and_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    save = ablation.Trainer.save

    def interrupted(trainer: Any, path: Path) -> None:
        save(trainer, path)
        if trainer.run.activation == 'silu':
            signal.raise_signal(signal.SIGINT)

    command = ['--acts', 'relu', 'silu', '--seeds', 1, '--epochs', 1, '--size', 8, '--output', tmp_path]
    monkeypatch.setattr(ablation.Trainer, 'save', interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert run(*command) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    captured = capsys.readouterr()
    assert 'Interrupted: 1 of 2 runs are left; the same command goes on.' in captured.err
    assert '| ReLU' in captured.out
    (checkpoint,) = (tmp_path / 'checkpoints').iterdir()
    assert checkpoint.name == 'digits_silu_b1_seed0_epochs-1_size-8.safetensors'
    monkeypatch.undo()
    assert run(*command) == 0
    assert [found.run.activation for found in rows(tmp_path)] == ['relu', 'silu']


@pytest.mark.slow
def test_killed_in_mid_epoch(tmp_path) -> None:
    """kill -9, and the same command again: the bits of a run that was left alone."""
    command = ['--acts', 'atac', '--seeds', '1', '--epochs', '3', '--size', '8', '--export', '--output']
    output = tmp_path / 'killed'
    process = subprocess.Popen(
        [sys.executable, '-c', KILLED.format(scripts=str(SCRIPT.parent), argv=[*command, str(output)])],
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


# kills itself in the middle of the second epoch, at a place that does not depend on the machine's speed
KILLED = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import torch
from ablations import trainer as training
torch.set_num_threads(1)
steps = training.batches
def batches(data, batch_size, augment, seed, *place):
    for i, batch in enumerate(steps(data, batch_size, augment, seed, *place)):
        if seed & 1 and i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
training.batches = batches
import ablation
ablation.main({argv!r})
"""


@pytest.mark.slow
def test_torchrun(tmp_path) -> None:
    """Two processes of torchrun do one run together: one row, and the weights of one process but for rounding."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    end = subprocess.run(
        [*launch, frozen_ablation.__file__, str(tmp_path / 'two')], capture_output=True, text=True, timeout=240
    )
    assert end.returncode == 0, end.stderr
    assert frozen_ablation.main(tmp_path / 'one') == 0
    one, two = (load_file(tmp_path / name / 'weights.safetensors') for name in ('one', 'two'))
    (row,), (alone,) = rows(tmp_path / 'two'), rows(tmp_path / 'one')
    data = load('digits', 8, tmp_path, download=False)
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


def test_curve(tmp_path, monkeypatch) -> None:
    """A line an epoch, also where the run was killed between two and resumed."""
    command = ['--acts', 'relu', '--seeds', 1, '--epochs', 3, '--size', 8]
    run(*command, '--output', tmp_path / 'whole')
    fit = ablation.Trainer.fit

    def killed(trainer: Any, checkpoint: Path, after_epoch: Any) -> Any:
        def after(progress: Any) -> None:
            after_epoch(progress)
            if progress.epoch == 2:
                raise KeyboardInterrupt

        return fit(trainer, checkpoint, after)

    with monkeypatch.context() as patched:
        patched.setattr(ablation.Trainer, 'fit', killed)
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


def test_hold_out_never_looks_at_the_test_set(tmp_path, monkeypatch) -> None:
    """Training images that nobody trains on are measured: the test set may as well be noise."""
    load = ablation.load
    held_out = []

    def without_test_set(*args: Any) -> Any:
        data = load(*args)
        held_out.append(image_data.hold_out(data, 300).test[0])
        return data._replace(test=(torch.zeros(0, *data.test[0].shape[1:], dtype=torch.uint8), data.test[1][:0]))

    trained = []
    train = ablation.Trainer

    def watched(run: Any, data: Any, machine: Any) -> Any:
        trained.append(data)
        return train(run, data, machine)

    monkeypatch.setattr(ablation, 'load', without_test_set)
    monkeypatch.setattr(ablation, 'Trainer', watched)
    run('--acts', 'relu', '--seeds', 1, '--epochs', 4, '--hold-out', 300, '--export', '--output', tmp_path)
    (data,) = trained
    assert torch.equal(data.test[0], held_out[0]) and len(data.train[0]) == 700
    (found,) = rows(tmp_path)
    assert found.run.held_out == 300 and found.result.accuracy > 60
    card = (tmp_path / found.run.name / 'README.md').read_text()
    assert 'held out of training (300 images)' in card and 'held out: 300 of the training images' in card
    assert f'computed on: {found.setup.device}' in card


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


def test_wandb(tmp_path, monkeypatch) -> None:
    """A run that is killed and goes on is one run there: the same id, and no epoch is left out."""
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
    fit = ablation.Trainer.fit

    def killed(trainer: Any, checkpoint: Path, after_epoch: Any) -> Any:
        def after(progress: Any) -> None:
            after_epoch(progress)
            raise KeyboardInterrupt

        return fit(trainer, checkpoint, after)

    with monkeypatch.context() as patched:
        patched.setattr(ablation.Trainer, 'fit', killed)
        assert run(*command) == 130
    assert run(*command) == 0
    steps = [step for name, step, _ in calls if name == 'log']
    assert steps == [1, 1, 2]  # the first comes again, since its checkpoint was not there yet
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


@pytest.mark.slow
def test_finding_of_the_paper(tmp_path) -> None:
    """The local gate learns the digits, the global one is far behind."""
    run('--acts', 'se_act', 'atac', '--seeds', 1, '--epochs', 3, '--output', tmp_path)
    found = {row.run.activation: row.result.accuracy for row in rows(tmp_path)}
    assert found['atac'] > 90  # its digits differ by processor and threads
    assert found['se_act'] < found['atac'] - 2


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--acts', 'atak'], "'atak' is neither one of relu, se_act"),
        (
            ['--datasets', 'svhn'],
            "'svhn' is neither one of digits, cifar10, cifar10-jpeg, cifar100, cifar100_coarse nor a folder",
        ),
        (['--blocks', '6'], 'invalid choice: 6'),
        (['--recipe', 'long'], 'invalid choice'),
        (['--hold-out', '0'], "'0' is not a whole number of at least 1"),
        (['--act-stages', '0'], 'invalid choice: 0'),
        (['--seeds', '0'], "'0' is not a whole number of at least 1"),
        (['--epochs', '1.5'], "'1.5' is not a whole number"),
        (['--lr', 'nan'], "'nan' is not a number"),
        (['--lr', '0'], "'0' is not above 0"),
        (['--weight-decay', '-1'], "'-1' is not a number of at least 0"),
        (['--size', '7'], "'7' is less than 8"),
        (['--size', '16', '--datasets', 'cifar10'], "argument --size: 16, but CIFAR's images are 32"),
        (['--device', 'gpu'], "'gpu' cannot be used"),
        (['--shard', '5/4'], "'5/4' is not a shard such as '1/4'"),
        (['--shard', '0/4'], "'0/4' is not a shard"),
        (['--amp-dtype', 'float64'], 'invalid choice'),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit, match='2'):
        run(*arguments, '--output', tmp_path / 'out')
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--batch-size', '1001'], '1001 with 1000 training images .* expected a multiple of 1 from 2 to 1000'),
        (['--batch-size', '1'], '--batch-size 1 with 1000 training images'),
        (['--datasets', 'cifar10', '--data-dir', 'nowhere'], 'cifar10 is not in nowhere.*--download'),
    ],
)
def test_nothing_is_trained_before_all_is_checked(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run('--output', tmp_path / 'out', '--datasets', 'digits', *arguments)
    assert not (tmp_path / 'out' / 'ablation.csv').exists()


def test_network_that_is_there_without_a_row(tmp_path) -> None:
    (tmp_path / 'digits_relu_b1_seed0').mkdir()
    with pytest.raises(SystemExit, match='digits_relu_b1_seed0 is there already, without a row: remove it'):
        run('--acts', 'relu', '--seeds', 1, '--export', '--output', tmp_path)


def test_output_that_is_a_file(tmp_path, capsys) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match='2'):
        run('--output', tmp_path / 'file')
    assert 'file is a file; expected a folder' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['file']

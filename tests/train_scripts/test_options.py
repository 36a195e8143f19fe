"""train_scripts/ablations/options.py"""

import itertools
import shutil

import pytest

run_ablation = pytest.importorskip('run_ablation', reason="needs the packages of the extra 'ablation'")
run, rows = run_ablation.run, run_ablation.rows
ablation = pytest.importorskip('ablation')
options = pytest.importorskip('ablations.options')


def runs(*arguments: str) -> list[tuple]:
    return [found[:5] for found in options.selected_runs(options.create_parser('').parse_args(arguments), 1)]


def test_grid() -> None:
    found = runs('--datasets', 'cifar10', 'cifar100', '--blocks', '1', '2', '3', '4', '--seeds', '1')
    assert len(found) == len(set(found)) == 2 * 4 * 5
    assert found[:5] == [('cifar10', name, 1, 4, 0) for name in ('relu', 'se_act', 'nin', 'local_se', 'atac')]
    placed = runs('--acts', 'relu', 'atac', '--act-stages', '1', '2', '3', '4', '--seeds', '1')
    assert placed == [('digits', 'relu', 1, 4, 0), *(('digits', 'atac', 1, n, 0) for n in (1, 2, 3, 4))]


def test_shards_together_are_all_runs() -> None:
    command = ['--blocks', '1', '2', '--seeds', '3']
    shards = [runs(*command, '--shard', f'{i}/4') for i in (1, 2, 3, 4)]
    assert sorted(itertools.chain(*shards)) == sorted(runs(*command))
    assert {len(shard) for shard in shards} == {7, 8}


def test_settings_of_the_recipe_and_of_the_command() -> None:
    parser = options.create_parser('')
    (cifar,) = options.selected_runs(parser.parse_args(['--datasets', 'cifar10', '--acts', 'relu', '--seeds', '1']), 2)
    assert cifar._asdict() == {
        **dict(
            dataset='cifar10', activation='relu', blocks=1, act_stages=4, seed=0, epochs=400, batch_size=128, lr=0.2
        ),
        **dict(weight_decay=1e-4, size=32, augment=True, sched='multistep', precision='float32', processes=2),
        'held_out': 0,
    }
    given = ['--epochs', '3', '--batch-size', '64', '--lr', '0.5', '--weight-decay', '0', '--no-aug', '--amp']
    (changed,) = options.selected_runs(
        parser.parse_args(['--datasets', 'cifar10', '--acts', 'relu', '--seeds', '1', *given]), 1
    )
    assert changed[5:] == (3, 64, 0.5, 0.0, 32, False, 'multistep', 'float16', 1, 0)
    short = parser.parse_args(['--datasets', 'cifar10-jpeg', '--recipe', 'short', '--hold-out', '500', '--seeds', '1'])
    run = options.selected_runs(short, 1)[0]
    assert (run.recipe, run.held_out, run.sched) == ('short', 500, 'cosine')
    assert run.name == 'cifar10-jpeg_relu_b1_seed0_recipe-short_held_out-500'


def test_seeds_come_one_after_the_other() -> None:
    """If only the first runs are finished, all activations have the same number of seeds."""
    found = runs('--acts', 'relu', 'atac', '--seeds', '2', '--blocks', '1', '2')
    assert found == [('digits', name, b, 4, seed) for b in (1, 2) for seed in (0, 1) for name in ('relu', 'atac')]


def test_one_name_for_an_activation() -> None:
    found = runs('--acts', 'Swish', 'ReLU', 'SEActivation', 'silu', 'relu', 'LocalSENet', '--seeds', '1')
    assert [name for _, name, *_ in found] == ['silu', 'relu', 'se_act', 'local_se']


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
    assert (machine.channels_last, machine.should_compile(updates)) == (channels_last, compiled)


def test_without_a_compiler_nothing_is_compiled_unless_asked(monkeypatch) -> None:
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    machine = ablation.set_up(options.create_parser('').parse_args(['--device', 'cpu']))
    assert not machine.should_compile(10**6)
    assert machine._replace(compile=True).should_compile(1)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--acts', 'atak'], "'atak' is neither one of relu, se_act"),
        (['--acts', 'atak'], "nor an activation of timm; did you mean 'atac'?"),
        (['--datasets', 'cifr10'], "nor a folder; did you mean 'cifar10'?"),
        (['--epoch-count', '3', '--sedes', '2'], "did you mean '--seeds' instead of '--sedes'?"),
        (['--recipe', 'authers'], "did you mean 'authors' instead of 'authers'?"),
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
        (['--size', '16', '--datasets', 'cifar10'], "argument --size: 16, but CIFAR's images have a size of 32"),
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


def test_output_that_is_a_file(tmp_path, capsys) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match='2'):
        run('--output', tmp_path / 'file')
    assert 'file is a file; expected a folder' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['file']

"""train_scripts/ablation.py: runs from the command line to rows, tables and networks."""

import pytest

run_ablation = pytest.importorskip('run_ablation', reason="needs the packages of the extra 'ablation'")
run, rows = run_ablation.run, run_ablation.rows
write_image_folder = pytest.importorskip('sample_images').write_image_folder


@pytest.mark.slow
def test_run_and_again(tmp_path, capsys) -> None:
    output = tmp_path / 'out'
    command = ['--acts', 'relu', 'silu', 'relu', '--blocks', 2, 1, '--epochs', 1, '--size', 8, '--batch-size', 250]
    command += ['--output', output]
    assert run(*command, '--seeds', 1) == 0
    first = rows(output)
    assert [found.run[1:3] for found in first] == [('relu', 1), ('silu', 1), ('relu', 2), ('silu', 2)]
    assert all(0 <= found.result.accuracy <= 100 and found.result.seconds > 0 for found in first)
    printed = capsys.readouterr().out
    assert '| b = 1' in printed and '| b = 2' in printed
    assert f'{first[1].result.accuracy:.2f}' in printed
    assert (output / 'tables.md').read_text().strip() in printed
    (plot,) = output.glob('*.png')
    assert f'Plot: {plot}' in printed
    assert not list((output / 'checkpoints').iterdir())

    # another seed: the finished runs are not trained again
    assert run(*command, '--seeds', 2) == 0
    again = rows(output)
    assert again[:4] == first
    assert [found.run.seed for found in again[4:]] == [1] * 4
    captured = capsys.readouterr()
    assert 'Finished already: 4 of 8 runs.' in captured.err
    assert '±' in captured.out


@pytest.mark.slow
def test_image_folder(tmp_path, monkeypatch, capsys) -> None:
    """A run is named by the folder's absolute path. Its files are only written to the results folder."""
    write_image_folder(tmp_path / 'data' / 'pets')
    monkeypatch.chdir(tmp_path / 'data')
    command = ['--acts', 'relu', '--seeds', 1, '--epochs', 1, '--size', 8, '--batch-size', 2, '--export']
    command += ['--output', tmp_path]
    assert run('--datasets', 'pets', *command) == 0
    assert run('--datasets', tmp_path / 'data' / 'pets', *command) == 0
    (row,) = rows(tmp_path)
    assert row.run.dataset == str(tmp_path / 'data' / 'pets')
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['pets']
    network = tmp_path / row.run.name
    assert f'Network: {network}' in capsys.readouterr().out
    card = (network / 'README.md').read_text()
    assert f'trained on pets. Top-1 accuracy: {row.result.accuracy} %' in card and str(tmp_path) not in card


@pytest.mark.slow
def test_runs_without_export_have_no_network(tmp_path, capsys) -> None:
    command = ['--acts', 'relu', '--seeds', 1, '--epochs', 1, '--size', 8, '--output', tmp_path]
    assert run(*command) == run(*command, '--export') == 0
    assert 'Finished without --export, so without a network: 1 run.' in capsys.readouterr().err


@pytest.mark.slow
def test_finding_of_the_paper(tmp_path) -> None:
    """The local gate learns the digits; the global gate has a much lower accuracy."""
    run('--acts', 'se_act', 'atac', '--seeds', 1, '--epochs', 3, '--output', tmp_path)
    found = {row.run.activation: row.result.accuracy for row in rows(tmp_path)}
    assert found['atac'] > 90  # the exact value depends on CPU and threads
    assert found['se_act'] < found['atac'] - 2


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--batch-size', '1001'], '1001 with 1000 training images .* expected a multiple of 1 between 2 and 1000'),
        (['--batch-size', '1'], '--batch-size 1 with 1000 training images'),
        (['--datasets', 'cifar10', '--data-dir', 'nowhere'], 'cifar10 is missing or damaged in nowhere.*--download'),
    ],
)
def test_all_runs_are_checked_before_training(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run('--output', tmp_path / 'out', '--datasets', 'digits', *arguments)
    assert not (tmp_path / 'out' / 'ablation.csv').exists()


def test_network_without_a_row(tmp_path) -> None:
    (tmp_path / 'digits_relu_b1_seed0').mkdir()
    with pytest.raises(SystemExit, match='digits_relu_b1_seed0 exists, but its run has no row: remove the folder'):
        run('--acts', 'relu', '--seeds', 1, '--export', '--output', tmp_path)

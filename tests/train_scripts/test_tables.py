"""train_scripts/tables.py, and tables.py, table4.py and figures.py of the package behind it"""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

tables = pytest.importorskip('ablations.tables', reason="needs the packages of the extra 'ablation'")
store = pytest.importorskip('ablations.store')
provenance = pytest.importorskip('ablations.provenance')
table4 = pytest.importorskip('ablations.table4')
figures = pytest.importorskip('ablations.figures')
make_row = pytest.importorskip('sample_rows').make_row
program = pytest.importorskip('tables')
pytest.importorskip('matplotlib', reason="needs the packages of the extra 'ablation'")

REPORTED = {('cifar100_coarse', 'atac', 1): 76.4, ('cifar100_coarse', 'atac', 2): 79.6}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines() if line[:1] == '|']


def test_accuracy_table() -> None:
    rows = [
        make_row(0, 90.0, activation='relu'),
        make_row(1, 92.0, activation='relu'),
        make_row(0, 95.0),
        make_row(0, 97.0, blocks=2, params=2000),
    ]
    (group,) = tables.group_rows(rows)
    text = tables.accuracy_table(group, {})
    assert text.startswith("scikit-learn's digits, 3 epochs, batch_size 8, ")
    assert 'mean ± standard deviation over 1 to 2 seeds' in text
    head, _, relu, atac = cells(text)
    assert head == ['Activation', 'b = 1', 'b = 2', 'Parameters (k)']
    assert relu == ['ReLU', '91.00 ± 1.41', '', '1.0 / -']
    assert atac == ['ATAC', '95.00', '97.00', '1.0 / 2.0']
    assert 'one seed' in tables.accuracy_table(tables.group_rows(rows[:1])[0], {})


def test_reported_and_the_difference() -> None:
    rows = [make_row(seed, accuracy, dataset='cifar100_coarse') for seed, accuracy in enumerate([76.0, 77.0])]
    rows += [make_row(0, 70.0, dataset='cifar100_coarse', activation='nin', blocks=2)]
    text = tables.accuracy_table(tables.group_rows(rows)[0], REPORTED)
    assert "in brackets the authors' accuracy and how far that mean is from it" in text
    _, _, nin, atac = cells(text)
    assert nin[1:3] == ['', '70.00']
    assert atac[1:3] == ['76.50 ± 0.71, best 76.50 (76.40, +0.10)', '(79.60)']
    assert 'authors' not in tables.accuracy_table(tables.group_rows([make_row()])[0], REPORTED)


def test_reported_accuracies() -> None:
    """At every depth they have the order of the authors' figure, and more blocks have a higher accuracy."""
    reported = tables.read_reported()
    assert len(reported) == 4 * 5 + 4 * 5 + 4 * 3 + 4 + 4 * 5
    jpeg = {cell[1:]: accuracy for cell, accuracy in reported.items() if cell[0] == 'cifar10-jpeg'}
    assert jpeg == {cell[1:]: accuracy for cell, accuracy in reported.items() if cell[0] == 'cifar10'}
    for blocks in (1, 2, 3, 4):
        selu, relu, swish, atac = (
            reported['cifar100_coarse', name, blocks] for name in ('selu', 'relu', 'silu', 'atac')
        )
        assert selu < relu < swish < atac
    for name in ('selu', 'relu', 'silu', 'atac'):
        assert sorted(found := [reported['cifar100_coarse', name, b] for b in (1, 2, 3, 4)]) == found


def test_difference_uses_the_best_epochs() -> None:
    rows = [
        store.Row(each.run, each.result._replace(best_accuracy=77.0)) for each in [make_row(dataset='cifar100_coarse')]
    ]
    text = tables.accuracy_table(tables.group_rows(rows)[0], REPORTED)
    assert '90.00, best 77.00 (76.40, +0.60)' in text


def test_paired_differences() -> None:
    """The interval is that of scipy's paired t-test, of the seeds that both activations have."""
    from scipy import stats

    ours, theirs = [83.0, 84.5, 83.5, 85.0], [82.0, 84.0, 81.5]
    rows = [make_row(seed, accuracy) for seed, accuracy in enumerate(ours)]
    rows += [make_row(seed, accuracy, activation='relu') for seed, accuracy in enumerate(theirs)]
    rows += [make_row(0, 82.0, activation='nin'), make_row(0, 70.0, activation='relu', act_stages=2)]
    text = tables.paired_table(tables.group_rows(rows)[0])
    low, high = stats.ttest_rel(ours[:3], theirs).confidence_interval()
    _, _, relu, nin = cells(text)
    assert relu == ['ReLU', f'+1.17 ({low:+.2f} to {high:+.2f}; not significant, 3 seeds)']
    assert nin == ['NiN', '+1.00 (one seed)']
    assert low < 0 < high and text in tables.all_tables(rows)


def test_no_negative_zero() -> None:
    assert tables.difference_with_interval([-1e-9]) == '+0.00 (one seed)'
    assert tables.difference_with_interval([-0.25, 0.249]).startswith('+0.00 (-3.17 to +3.17; not significant')


def test_significant_differences_and_nothing_to_compare() -> None:
    assert tables.difference_with_interval([1.0, 1.1, 0.9]) == '+1.00 (+0.75 to +1.25; 3 seeds)'
    assert tables.difference_with_interval([-2.0, -2.5]).startswith('-2.25 (-5.43 to +0.93; not significant')
    assert tables.paired_table(tables.group_rows([make_row()])[0]) == ''
    assert tables.paired_table(tables.group_rows([make_row(activation='relu')])[0]) == ''


def test_first_row_of_a_run_is_used(capsys) -> None:
    rows = [make_row(0, 90.0), make_row(1, 91.0), make_row(0, 90.0, seconds=3.0), make_row(1, 92.0)]
    assert tables.first_rows(rows) == rows[:2]
    assert 'seed1_' in (said := capsys.readouterr().err) and 'with 91.0 and 92.0 %: the first row is used' in said
    assert said.count('twice') == 1


def test_stages_alone(tmp_path) -> None:
    """If no run has its activation in all stages, only the table of stages is printed."""
    rows = [make_row(act_stages=2)]
    text = tables.all_tables(rows)
    assert text.count('|\n|') == 2 and 'number of stages' in text
    assert [path.name[-14:] for path in tables.write_tables(rows, text, tmp_path)] == ['tables.md', 'act_stages.png']


def test_image_folders_with_the_same_name() -> None:
    groups = tables.group_rows([make_row(dataset=name) for name in ('/a/images', '/b/images')])
    assert len({group.name for group in groups}) == len({group.title for group in groups}) == 2
    assert all('/' not in group.name for group in groups)


def test_one_table_for_each_data_set_and_settings() -> None:
    rows = [make_row(), make_row(1), make_row(epochs=9), make_row(dataset='cifar10'), make_row(precision='bfloat16')]
    groups = tables.group_rows(rows)
    assert sorted(len(group.rows) for group in groups) == [1, 1, 1, 2]
    assert len({group.name for group in groups}) == len({group.title for group in groups}) == 4


def test_rows_of_several_setups_are_named() -> None:
    first, second = make_row(0), make_row(1)
    assert 'setup' not in tables.accuracy_table(tables.group_rows([first, second])[0], {})
    second = second._replace(setup=second.setup._replace(commit='abc', mode='eager'))
    text = tables.accuracy_table(tables.group_rows([first, second])[0], {})
    assert 'The setups of the rows differ: mode (unknown, eager); commit (unknown, abc).' in text


def test_held_out_images_are_no_test_set() -> None:
    (group,) = tables.group_rows([make_row(held_out=5), make_row(held_out=5, act_stages=2)])
    for text in (tables.accuracy_table(group, {}), tables.act_stages_table(group)):
        assert 'accuracy on the held-out images' in text and 'test accuracy' not in text


def test_rows_are_sorted_as_in_the_paper() -> None:
    names = ['gelu', 'hard_swish', 'atac', 'local_se', 'nin', 'se_act', 'relu']
    (group,) = tables.group_rows([make_row(activation=name) for name in names])
    labels = [line[0] for line in cells(tables.accuracy_table(group, {}))[2:]]
    assert labels == ['ReLU', 'SEActivation', 'NiN', 'LocalSENet', 'ATAC', 'GELU', 'hard_swish']


def test_act_stages() -> None:
    rows = [make_row(0, 80.0 + n, act_stages=n) for n in (1, 2, 4)] + [make_row(0, 70.0, activation='relu')]
    (group,) = tables.group_rows(rows)
    head, _, line = cells(tables.act_stages_table(group))
    assert head == ['Network', '0', '1', '2', '3', '4']
    assert line == ['ATAC, b = 1', '70.00', '81.00', '82.00', '', '84.00']
    assert cells(tables.accuracy_table(group, {}))[3][1] == '84.00'  # the runs with fewer stages are not in that table
    assert tables.act_stages_table(tables.group_rows([make_row()])[0]) == ''


def write_csv(folder: Path, rows: list) -> Path:
    subject = store.Store(folder)
    for each in rows:
        subject.append(each)
    return subject.csv


@pytest.mark.slow
def test_from_the_csv_alone(tmp_path, capsys) -> None:
    rows = [make_row(seed, 80.0 + seed, act_stages=n) for n in (2, 4) for seed in range(2)]
    path = write_csv(tmp_path / 'results', [*rows, make_row(dataset='cifar100_coarse')])
    assert program.main([str(path), '--output', str(tmp_path / 'out')]) == 0
    text = (tmp_path / 'out' / 'tables.md').read_text()
    printed = capsys.readouterr().out
    assert text.strip() in printed
    assert text.count('test accuracy after the last epoch') == 2 and text.count('number of stages') == 1
    pictures = sorted((tmp_path / 'out').glob('*.png'))
    assert len(pictures) == 3
    for picture in pictures:
        assert f'\n{picture}\n' in printed
        assert picture.read_bytes().startswith(b'\x89PNG')


def test_plot_has_one_line_per_activation_and_the_authors_lines(monkeypatch, tmp_path) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, '_save', lambda figure, axes, path: drawn.extend([axes, axes.legend()]))
    rows = [
        make_row(
            seed, 75 + blocks + seed, params=1000 * blocks, dataset='cifar100_coarse', activation=name, blocks=blocks
        )
        for name in ('relu', 'atac')
        for blocks in (1, 2)
        for seed in (0, 1)
    ]
    figures.plot_blocks('title', rows, tmp_path / 'plot.png', REPORTED)
    axes, legend = drawn
    assert {text.get_text() for text in legend.get_texts()} == {'ReLU', 'ATAC', 'pale: reported by the authors'}
    solid = [line for line in axes.lines if line.get_linestyle() == '-']
    (dashed,) = (line for line in axes.lines if line.get_linestyle() == '--' and len(line.get_xdata()))
    assert [list(line.get_xdata()) for line in solid[:2]] == [[1, 2]] * 2
    assert list(solid[1].get_ydata()) == [76.5, 77.5]
    assert list(dashed.get_ydata()) == [76.4, 79.6]


def test_second_panel_leaves_out_a_line_far_below(monkeypatch, tmp_path) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, '_save', lambda figure, axes, path: drawn.append(figure.axes))
    accuracies = {'relu': 98.5, 'atac': 99.0, 'se_act': 60.0}
    figures.plot_blocks('', [make_row(0, a, activation=name) for name, a in accuracies.items()], tmp_path, {})
    for few in (dict(relu=99.0), dict(relu=99.0, se_act=60.0), dict(relu=99.0, atac=98.0, se_act=97.0)):
        figures.plot_blocks('', [make_row(0, a, activation=name) for name, a in few.items()], tmp_path, {})
    figures.plot_blocks(
        '', [make_row(0, a, activation=n) for n, a in dict(accuracies, relu=99.0).items()], tmp_path, {}
    )
    (everything, others), *single, (_, equal) = drawn
    assert [len(axes) for axes in single] == [1, 1, 1] and len(others.lines) == len(everything.lines)
    assert equal.get_ylim() == (98.5, 99.5)
    low, high = others.get_ylim()
    assert 98 < low < 98.5 < 99 < high < 99.5


def test_without_output_nothing_is_written(tmp_path, capsys) -> None:
    path = write_csv(tmp_path, [make_row()])
    before = sorted(tmp_path.iterdir())
    assert program.main([str(path)]) == 0
    assert 'ATAC' in capsys.readouterr().out and sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_imagenet_table(monkeypatch, tmp_path, capsys) -> None:
    """The latency is that of the networks in the file of reported figures; here of two, to be quick."""
    lines = table4.REPORTED.read_text().splitlines(keepends=True)
    few = [line for line in lines[1:] if line.startswith(('resnet50,', 'atac_resnet50,'))]
    (tmp_path / 'reported.csv').write_text(''.join([lines[0], *few]))
    monkeypatch.setattr(table4, 'REPORTED', tmp_path / 'reported.csv')
    assert program.main(['--imagenet', '--rounds', '1']) == 0
    printed = capsys.readouterr().out
    assert f'Latency: {provenance.device_name(torch.device("cpu"))}, batch 1, 1 round.' in printed
    head, _, *rows = cells(printed)
    assert head[1:5] == ['Model', 'Params (M)', 'GMACs', 'Activations (M)']
    found = {row[1].strip('`'): row for row in rows}
    assert len(found) == 2
    assert found['resnet50'][2:6] == ['25.56', '4.09', '11.1', '1.000 (1.000..1.000)']
    assert float(found['atac_resnet50'][5].split()[0]) > 0


@pytest.mark.parametrize(
    'text, arguments, message',
    [
        (None, [], 'nothing to do: give CSV files, or --imagenet'),
        (None, ['{path}'], 'rows.csv: the file does not exist; expected a CSV file that ablation.py wrote'),
        (None, ['--imagenet', '--rounds', '-1'], '--rounds -1: expected 0 or more'),
        (None, ['--imagenet', '--device', 'gpu'], 'gpu'),
        ('a,b\n', ['{path}'], 'more; unknown a, b.'),
        (','.join(store.COLUMNS), ['{path}'], 'there are no rows in'),
    ],
)
def test_wrong_arguments(text, arguments, message, tmp_path, capsys) -> None:
    path = tmp_path / 'rows.csv'
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match='2'):
        program.main([argument.format(path=path) for argument in arguments])
    assert message in capsys.readouterr().err


def test_docs_results_agree_with_the_rows() -> None:
    """The tables of docs/results.md are those of results/*.csv, and so is the order of the activations in its text."""
    text = (tables.RESULTS.parent / 'docs' / 'results.md').read_text()
    (group,) = tables.group_rows(store.read_rows(tables.RESULTS / 'digits.csv'))
    assert tables.accuracy_table(group, tables.read_reported()) in text
    reported = tables.read_reported()
    for dataset, depths in (('cifar10', (1, 2, 3, 4)), ('cifar100_coarse', (1, 2, 3, 4, 5))):
        for name in {activation for of, activation, _ in reported if of == dataset}:
            found = [reported.get((dataset, name, blocks)) for blocks in depths]
            texts = ['' if value is None else f'{value:.2f}' for value in found]
            assert [tables.activation(name).label, *texts] in cells(text)
    for blocks in (1, 2, 3, 4):
        means = {
            tables.activation(name).label: tables.mean_and_spread(
                [row.result.accuracy for row in group.rows if row.run[1:3] == (name, blocks)]
            ).partition(' ')[0]
            for name in ('relu', 'se_act', 'nin', 'local_se', 'atac')
        }
        order = sorted(means, key=lambda label: -float(means[label]))
        assert [str(blocks), ', '.join(f'{label} {means[label]}' for label in order)] in cells(text)


@pytest.mark.slow
def test_docs_results_agree_with_the_registry() -> None:
    """Table 4 of docs/results.md is that of the registered networks, in all columns but the latency."""
    text = (tables.RESULTS.parent / 'docs' / 'results.md').read_text()
    rows = cells(table4.imagenet_table(rounds=0))
    for row in rows:
        (written,) = (found for found in cells(text) if found[:2] == row[:2] and len(found) == len(row))
        assert row[:5] + row[6:] == written[:5] + written[6:]
    found = {row[1].strip('`'): row for row in rows[2:]}
    assert len(found) == 6
    for row in found.values():
        assert float(row[2]) == pytest.approx(float(row[6]), rel=0.01)
    assert found['atac_resnet50'][6:] == ['28.0', '4.4', '21.41', '6.02', 'arXiv:2007.07729']
    with open(tables.RESULTS / 'results-imagenet.csv', newline='') as file:
        (ours,) = (line for line in csv.DictReader(file) if line['model'].startswith('atac_resnet50.'))
    assert float(found['atac_resnet50'][8]) == float(ours['top1_err'])

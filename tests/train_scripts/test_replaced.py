"""The programs that train models after `replace_activations`, on a few generated images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

fine_tune_replaced = pytest.importorskip('fine_tune_replaced', reason="needs the packages of the extra 'ablation'")
unit_norms = pytest.importorskip('unit_norms', reason="needs the packages of the extra 'ablation'")


def few_images(*_: Any) -> Any:
    """128 training and 20 test images."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Any:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return images, torch.arange(count) % 10

    mean, std = (0.5,) * 3, (0.25,) * 3
    return fine_tune_replaced.ImageData(split(128), split(20), list('0123456789'), mean, std)


@pytest.mark.slow
def test_fine_tuning(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fine_tune_replaced, 'load', few_images)
    csv = tmp_path / 'new' / 'rows.csv'
    command = ['resnet8_cifar', '--output', str(csv), '--epochs', '2', '--variants']
    fine_tune_replaced.main([*command, 'as_it_was', 'paper:near_one:0.5'])
    fine_tune_replaced.main([*command, 'paper:near_one:0.5', 'all:imitate:1'])  # the first one is there already
    rows = fine_tune_replaced.read(csv)
    assert [row['variant'] for row in rows] == ['as_it_was', 'paper:near_one:0.5', 'all:imitate:1']
    assert [len(row['accuracies'].split()) for row in rows] == [2, 2, 2]
    assert int(rows[0]['params']) < int(rows[1]['params']) < int(rows[2]['params'])
    # the activations are imitated well enough for most of the same answers
    assert abs(float(rows[2]['before']) - float(rows[0]['before'])) <= 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split('|')[2:5] == [' all         ', ' imitate  ', ' 1        '], lines[-1]

    fine_tune_replaced.main([*command[:-2], '0', '--variants', 'as_it_was'])
    assert fine_tune_replaced.read(csv)[3]['accuracies'] == ''


def test_order_of_the_table() -> None:
    """By network, then by variant. Rows of networks that were only tested are not there if others were fine-tuned."""
    cases = [
        ('net', 'all:imitate:1', ''),
        ('other', 'as_it_was', '70'),
        ('net', 'paper:random:0.5', '60 61'),
        ('net', 'as_it_was', '50 51'),
        ('net', 'all:imitate:1', '80 81 82'),
    ]
    rows = [
        {'model': model, 'variant': variant, 'accuracies': accuracies, 'params': '9', 'before': '7'}
        for model, variant, accuracies in cases
    ]
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in fine_tune_replaced.table(rows).splitlines()]
    assert lines[2:] == [
        ['other', 'as it was', '', '', '9', '7', '70', '70 (1 epoch)'],
        ['net', 'as it was', '', '', '9', '7', '50', '51 (2 epochs)'],
        ['net', 'paper', 'random', '0.5', '9', '7', '60', '61 (2 epochs)'],
        ['net', 'all', 'imitate', '1', '9', '7', '80', '82 (3 epochs)'],
    ]


def test_weights_from_a_file(tmp_path: Path) -> None:
    model = fine_tune_replaced.create('resnet8_cifar', 'as_it_was', None, 0)
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / 'model.safetensors')
    other = fine_tune_replaced.create('resnet8_cifar', 'as_it_was', tmp_path / 'model.safetensors', 0)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--variants', 'paper:relu:0.5'], '--variants paper:relu:0.5: expected as_it_was or WHERE:START:RD_RATIO'),
        (['--variants', 'paper'], '--variants paper: expected as_it_was or WHERE:START:RD_RATIO'),
        (['--weights', 'none.safetensors'], '--weights none.safetensors: the file does not exist'),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fine_tune_replaced, 'load', few_images)
    with pytest.raises(SystemExit) as error:
        fine_tune_replaced.main(['resnet8_cifar', '--output', str(tmp_path / 'rows.csv'), *arguments])
    assert message in f'{error.value}{capsys.readouterr().err}'
    assert not (tmp_path / 'rows.csv').exists()


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match='cifar10-jpeg is not in'):
        fine_tune_replaced.main(['resnet8_cifar', '--data-dir', str(tmp_path)])


@pytest.mark.slow
def test_norms(monkeypatch, capsys) -> None:
    images = torch.randint(0, 256, (100, 1, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(unit_norms, 'load_digits', lambda size: ((images, torch.arange(100) % 10),) * 2)
    unit_norms.main(['--models', 'test_convnext', '--epochs', '1', '--seeds', '2'])
    head, _, row = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split('|')[1:-1]] == ['model', *unit_norms.ACTS]
    assert row.startswith('| test_convnext ') and row.count(' ± ') == 4

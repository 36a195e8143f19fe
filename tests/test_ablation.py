"""train_scripts/ablation.py"""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ablation = pytest.importorskip('ablation', reason="needs the packages of the extra 'ablation'")
pytest.importorskip('sklearn', reason="needs the packages of the extra 'ablation'")
pytest.importorskip('matplotlib', reason="needs the packages of the extra 'ablation'")


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_digits() -> None:
    train, test = ablation.load_digits(16, torch.device('cpu'))
    assert (len(train), len(test)) == (1000, 797)
    images, labels = train.tensors
    assert images.shape == (1000, 1, 16, 16)
    assert (images.min(), images.max()) == (0, 1)
    assert set(labels.tolist()) == set(range(10))
    everything = torch.cat([train.tensors[0], test.tensors[0]]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # nothing is in both


@pytest.mark.parametrize('activation', [*ablation.ACTIVATIONS, 'silu'])
def test_models(activation) -> None:
    model = ablation.create_model(activation, 2)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)


def test_run(tmp_path, capsys) -> None:
    arguments = [
        '--acts',
        'relu',
        'atac',
        'relu',
        '--blocks',
        '2',
        '1',
        '--epochs',
        '1',
        '--seeds',
        '2',
        '--output',
        str(tmp_path / 'out'),
    ]
    assert ablation.main(arguments) == 0
    rows = read(tmp_path / 'out' / 'ablation.csv')
    assert [(r['activation'], r['blocks'], r['seed']) for r in rows] == [
        (a, b, s) for b in '12' for a in ('relu', 'atac') for s in '01'
    ]
    assert all(0 <= float(r['accuracy']) <= 100 for r in rows)
    assert (tmp_path / 'out' / 'ablation.png').read_bytes().startswith(b'\x89PNG')

    mean = (float(rows[2]['accuracy']) + float(rows[3]['accuracy'])) / 2
    spread = abs(float(rows[2]['accuracy']) - float(rows[3]['accuracy'])) / 2**0.5
    printed = capsys.readouterr().out
    assert f'| ATAC       | {mean:.2f} ± {spread:.2f}' in printed
    assert '| b = 1' in printed and '| b = 2' in printed
    assert str(tmp_path / 'out' / 'ablation.png') in printed

    # the same seed gives the same run, and nothing is overwritten
    before = (tmp_path / 'out' / 'ablation.csv').read_bytes()
    assert ablation.main(['--acts', 'relu', '--epochs', '1', '--seeds', '1', '--output', str(tmp_path / 'out')]) == 0
    (again,) = read(tmp_path / 'out-1' / 'ablation.csv')
    assert again['accuracy'] == rows[0]['accuracy']
    assert (tmp_path / 'out' / 'ablation.csv').read_bytes() == before


@pytest.mark.slow
def test_finding_of_the_paper(tmp_path) -> None:
    """The local gate learns the digits, the global one is far behind."""
    ablation.main(['--acts', 'se_act', 'atac', '--seeds', '1', '--output', str(tmp_path / 'out')])
    found = {r['activation']: float(r['accuracy']) for r in read(tmp_path / 'out' / 'ablation.csv')}
    assert found['atac'] > 96
    assert found['se_act'] < found['atac'] - 2


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--acts', 'atak'], "'atak' is neither one of relu, se_act"),
        (['--blocks', '5'], 'invalid choice: 5'),
        (['--seeds', '0'], "'0' is not a whole number of at least 1"),
        (['--epochs', '1.5'], "'1.5' is not a whole number"),
        (['--batch-size', '1001'], "'1001' is not in 2..1000"),
        (['--lr', 'nan'], "'nan' is not a number"),
        (['--lr', '0'], "'0' is not above 0"),
        (['--weight-decay', '-1'], "'-1' is not a number of at least 0"),
        (['--size', '7'], "'7' is less than 8"),
        (['--device', 'gpu'], "'gpu' cannot be used"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit, match='2'):
        ablation.main([*arguments, '--output', str(tmp_path / 'out')])
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_output_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match=r'argument --output: .*Not a directory'):
        ablation.main(['--output', str(tmp_path / 'file' / 'out')])


def test_output_that_is_a_file(tmp_path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match='file is a file; expected a folder'):
        ablation.main(['--output', str(tmp_path / 'file')])
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_table_counts_what_is_there() -> None:
    def row(activation, seed, accuracy):
        return ablation.Row(activation, 1, seed, 100, 8, 0.1, accuracy, 1.0)

    text = ablation.table([row('relu', 0, 90.0), row('relu', 1, 92.0), row('atac', 0, 95.0)])
    assert 'over 1 to 2 seeds' in text
    assert '91.00 ± 1.41' in text
    assert 'one seed' in ablation.table([row('relu', 0, 90.0)])


def test_interrupt_keeps_the_finished_rows(tmp_path) -> None:
    script = Path(ablation.__file__)
    output = tmp_path / 'out'
    process = subprocess.Popen(
        [sys.executable, str(script), '--epochs', '1', '--seeds', '100', '--output', str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 400
        while not (output / 'ablation.csv').exists() or len(read(output / 'ablation.csv')) < 2:
            assert process.poll() is None and time.monotonic() < deadline, 'no two rows'
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    rows = read(output / 'ablation.csv')
    assert process.returncode == 130, errors
    assert f'Interrupted after {len(rows)} of 500 runs.' in errors
    assert '| ReLU' in printed
    assert all(None not in row.values() for row in rows)
    assert (output / 'ablation.png').exists()

"""train_scripts/ablations/store.py"""

import threading
from pathlib import Path
from typing import Any

import pytest
from test_trainer import RUN

store = pytest.importorskip('ablations.store', reason="needs the packages of the extra 'ablation'")


def row(seed: int = 0, accuracy: float = 90.0, seconds: float = 2.0, params: int = 1000, **changes: Any) -> Any:
    result = store.Result(params, 0.5, 0.6, accuracy, accuracy, seconds, seconds, '2026-01-01T00:00:00+00:00')
    return store.Row(RUN._replace(seed=seed, **changes), result, store.Setup('cpu'))


def test_rows_come_back(tmp_path) -> None:
    subject = store.Store(tmp_path / 'new' / 'folder')
    assert subject.rows() == []
    rows = [row(0), row(1, accuracy=float('inf'), augment=False), row(2, dataset='a folder, "quoted"')]
    for each in rows:
        subject.append(each)
    assert subject.rows() == rows == store.Store(subject.folder).rows()
    assert subject.has(rows[1].run) and not subject.has(RUN._replace(seed=9))


def test_appended_by_many(tmp_path) -> None:
    def append(first: int) -> None:
        subject = store.Store(tmp_path)
        for seed in range(first, first + 5):
            subject.append(row(seed))

    threads = [threading.Thread(target=append, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found.run.seed for found in store.Store(tmp_path).rows()) == list(range(15))


def test_row_takes_the_place_of_the_checkpoint(tmp_path) -> None:
    subject = store.Store(tmp_path)
    checkpoint = subject.checkpoint(RUN)
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b'')
    subject.append(row(RUN.seed))
    assert not checkpoint.exists()


def test_claims(tmp_path) -> None:
    mine, theirs = store.Store(tmp_path), store.Store(tmp_path)
    with mine.claim(RUN) as first, theirs.claim(RUN) as second, theirs.claim(RUN._replace(seed=8)) as other:
        assert (first, second, other) == (True, False, True)
    with theirs.claim(RUN) as free:
        assert free
    mine.append(row(RUN.seed))
    with theirs.claim(RUN) as free:
        assert not free  # it has a row


def test_claim_removes_what_a_killed_process_left(tmp_path) -> None:
    subject = store.Store(tmp_path)
    checkpoint = subject.checkpoint(RUN)
    leftover, others = checkpoint.with_name(f'.{checkpoint.name}.x'), checkpoint.with_name('.other.safetensors.x')
    checkpoint.parent.mkdir()
    for path in (checkpoint, leftover, others):
        path.write_bytes(b'')
    with subject.claim(RUN):
        assert sorted(checkpoint.parent.iterdir()) == sorted([checkpoint, others])
    subject.append(row(RUN.seed))
    checkpoint.write_bytes(b'')  # died after the row
    (tmp_path / '.ablation.csv.x').write_bytes(b'')
    with subject.claim(RUN):
        assert list(checkpoint.parent.iterdir()) == [others]
    subject.append(row(7))
    assert not (tmp_path / '.ablation.csv.x').exists()


HEADER = ','.join(store.COLUMNS)


@pytest.mark.parametrize(
    'text, message',
    [
        ('activation,blocks\n', "has the columns 'activation,blocks', expected 'dataset,"),
        ('', "has the columns '', expected"),
        ('\udcff', 'is no CSV file of ablation.py'),
        (f'{HEADER}\nrelu,1\n', r'line 2: 2 values, expected \d+'),
        (f'{HEADER}\n{",".join(["x"] * len(store.COLUMNS))}\n', "line 2: blocks is 'x', expected a value like int"),
    ],
)
def test_a_file_that_is_not_ours(text, message, tmp_path) -> None:
    data = text.encode(errors='surrogateescape')
    (tmp_path / 'ablation.csv').write_bytes(data)
    with pytest.raises(store.StoreError, match=message):
        store.Store(tmp_path)
    assert (tmp_path / 'ablation.csv').read_bytes() == data


def test_claim_removes_what_a_killed_export_left(tmp_path) -> None:
    subject = store.Store(tmp_path)
    left, other = (tmp_path / f'.{run.name}.abc' for run in (RUN, RUN._replace(seed=8)))
    for folder in (left, other):
        folder.mkdir()
        (folder / 'config.json').write_text('{}')
    with subject.claim(RUN):
        assert not left.exists() and other.exists()


def test_no_folder(tmp_path) -> None:
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'out'):
        with pytest.raises(store.StoreError, match=f'{path} cannot be a results folder'):
            store.Store(Path(path))

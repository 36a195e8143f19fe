"""train_scripts/ablations/store.py"""

import threading
from pathlib import Path

import pytest

store = pytest.importorskip('ablations.store', reason="needs the packages of the extra 'ablation'")
sample_rows = pytest.importorskip('sample_rows')
RUN, make_row = sample_rows.RUN, sample_rows.make_row


def test_rows_round_trip(tmp_path) -> None:
    subject = store.Store(tmp_path / 'new' / 'folder')
    assert subject.rows() == []
    rows = [make_row(0), make_row(1, accuracy=float('inf'), augment=False), make_row(2, dataset='a folder, "quoted"')]
    for each in rows:
        subject.append(each)
    assert subject.rows() == rows == store.Store(subject.folder).rows()
    assert subject.has_row(rows[1].run) and not subject.has_row(RUN._replace(seed=9))


def test_appended_by_many(tmp_path) -> None:
    def append(first: int) -> None:
        subject = store.Store(tmp_path)
        for seed in range(first, first + 5):
            subject.append(make_row(seed))

    threads = [threading.Thread(target=append, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found.run.seed for found in store.Store(tmp_path).rows()) == list(range(15))


def test_append_removes_the_checkpoint(tmp_path) -> None:
    subject = store.Store(tmp_path)
    checkpoint = subject.checkpoint(RUN)
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b'')
    subject.append(make_row(RUN.seed))
    assert not checkpoint.exists()


def test_claims(tmp_path) -> None:
    mine, theirs = store.Store(tmp_path), store.Store(tmp_path)
    with mine.claim(RUN) as first, theirs.claim(RUN) as second, theirs.claim(RUN._replace(seed=8)) as other:
        assert (first, second, other) == (True, False, True)
    with theirs.claim(RUN) as free:
        assert free
    mine.append(make_row(RUN.seed))
    with theirs.claim(RUN) as free:
        assert not free  # the run has a row


def test_claim_removes_files_of_a_killed_process(tmp_path) -> None:
    subject = store.Store(tmp_path)
    checkpoint = subject.checkpoint(RUN)
    leftover, others = checkpoint.with_name(f'.{checkpoint.name}.x'), checkpoint.with_name('.other.safetensors.x')
    checkpoint.parent.mkdir()
    for path in (checkpoint, leftover, others):
        path.write_bytes(b'')
    with subject.claim(RUN):
        assert sorted(checkpoint.parent.iterdir()) == sorted([checkpoint, others])
    subject.append(make_row(RUN.seed))
    checkpoint.write_bytes(b'')  # the process was killed after it wrote the row
    (tmp_path / '.ablation.csv.x').write_bytes(b'')
    with subject.claim(RUN):
        assert list(checkpoint.parent.iterdir()) == [others]
    subject.append(make_row(7))
    assert not (tmp_path / '.ablation.csv.x').exists()


HEADER = ','.join(store.COLUMNS)


@pytest.mark.parametrize(
    'text, message',
    [
        (
            'activation,blocks\n',
            r'has other columns than a CSV file of ablation.py: missing dataset, .*, \.\.\. \d+ more',
        ),
        ('', 'has other columns than a CSV file of ablation.py: missing dataset, '),
        ('\udcff', 'is not a CSV file of ablation.py'),
        (f'{HEADER}\nrelu,1\n', r'line 2: 2 values, expected \d+'),
        (f'{HEADER}\n{",".join(["x"] * len(store.COLUMNS))}\n', "line 2: blocks is 'x', expected a value like int"),
    ],
)
def test_other_csv_files_are_refused(text, message, tmp_path) -> None:
    data = text.encode(errors='surrogateescape')
    (tmp_path / 'ablation.csv').write_bytes(data)
    with pytest.raises(store.StoreError, match=message):
        store.Store(tmp_path)
    assert (tmp_path / 'ablation.csv').read_bytes() == data


def test_claim_removes_folders_of_a_killed_export(tmp_path) -> None:
    subject = store.Store(tmp_path)
    left, other = (tmp_path / f'.{run.name}.abc' for run in (RUN, RUN._replace(seed=8)))
    for folder in (left, other):
        folder.mkdir()
        (folder / 'config.json').write_text('{}')
    with subject.claim(RUN):
        assert not left.exists() and other.exists()


def test_folder_that_cannot_be_created(tmp_path) -> None:
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'out'):
        with pytest.raises(store.StoreError, match=f'{path} cannot be a results folder'):
            store.Store(Path(path))

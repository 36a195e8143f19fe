import os
import pickle
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from params_files import CODES, NONES, listed, mutate, record, samples

import timm_atac
from timm_atac.weights.params import ParamsError, parse_params, read_params, write_params

DATA = Path(__file__).parents[1] / 'data'

dtypes = st.sampled_from([np.dtype(code) for code in CODES])
arrays = dtypes.flatmap(
    lambda dtype: st_np.arrays(dtype, st_np.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
)
names = st.text(st.characters(exclude_categories=['Cs']), max_size=12).filter(
    lambda n: not n.startswith(('arg:', 'aux:'))
)


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return list(found) == list(expected) and all(
        found[k].dtype == v.dtype and found[k].shape == v.shape and found[k].tobytes() == v.tobytes()
        for k, v in expected.items()
    )


@pytest.mark.slow
@given(st.dictionaries(names, arrays, max_size=5))
@settings(deadline=None)
def test_round_trip(tmp_path_factory, expected) -> None:
    path = tmp_path_factory.getbasetemp() / 'round_trip.params'
    write_params(path, expected)
    assert equal(read_params(path), expected)


@given(arrays, st.sampled_from(['legacy', 'V1', 'V2', 'V3']), st.tuples(st.integers(0, 9), st.integers(-1, 9)))
@settings(deadline=None)
def test_versions(array, version, device) -> None:
    if array.ndim == 0 and version != 'V3':
        array = array[None]
    data = listed({'arg:a': record(array, version, device), 'aux:b': record(array, version)})
    assert equal(parse_params(data), {'a': array, 'b': array})


@given(st.binary(max_size=200))
@example(b'')
@settings(deadline=None)
def test_any_bytes(data) -> None:
    with pytest.raises(ParamsError):
        parse_params(data)


@pytest.mark.parametrize('stem', ['cifar_b1_atac', 'cifar_b1_atac_fp16'])
def test_files_of_mxnet(stem, tmp_path) -> None:
    """Two files that MXNet 1.9.1 has written are read, and written again byte for byte."""
    arrays = timm_atac.read_params(DATA / f'{stem}.params')
    assert len(arrays) == 113
    assert arrays['features.2.0.msAA1.module.0.weight'].shape == (8, 16, 1, 1)
    low = {name for name, array in arrays.items() if array.dtype == np.float16}
    assert low == ({n for n in arrays if n.endswith('.weight') or n == 'output.bias'} if 'fp16' in stem else set())
    write_params(tmp_path / 'again.params', arrays)
    assert (tmp_path / 'again.params').read_bytes() == (DATA / f'{stem}.params').read_bytes()


def test_nothing_is_copied(tmp_path) -> None:
    path = tmp_path / 'large.params'
    write_params(path, {'a': np.arange(1 << 22, dtype=np.float32), 'b': np.ones(3, np.float16)})
    tracemalloc.start()
    try:
        found = read_params(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 16
    assert found['a'][-1] == (1 << 22) - 1
    with pytest.raises(ValueError, match='read-only'):
        found['a'][0] = 1


@pytest.mark.parametrize('kind', NONES)
def test_none(kind) -> None:
    found = parse_params(listed({'a': NONES[kind], 'b': record(np.ones(2, np.int8))}))
    assert equal(found, {'a': np.empty(0, np.float32), 'b': np.ones(2, np.int8)})


ONE = record(np.ones((2, 3), np.float32))
TWO = listed({'x': ONE, 'y': ONE})
HEAD = struct.pack('<3Q', 0x112, 0, 1)


def broken(at: int, layout: str, *numbers: int, data: bytes = TWO) -> bytes:
    return data[:at] + struct.pack(f'<{layout}', *numbers) + data[at + struct.calcsize(f'<{layout}') :]


# offset in the message, words of it, the file
BAD = [
    (0, 'header would take 16 bytes, but 3 are left', TWO[:3]),
    (0, 'begins with 0x113', broken(0, 'Q', 0x113)),
    (0, 'begins with', b'PK\x03\x04' + TWO[4:]),
    (8, 'reserved field is 0x1', broken(8, 'Q', 1)),
    (16, '9223372036854775808 arrays do not fit', broken(16, 'Q', 1 << 63)),
    (24, 'magic number 0xdeadbeef', broken(24, 'I', 0xDEADBEEF)),
    (28, r'storage type 1 \(row sparse\)', broken(28, 'i', 1)),
    (28, r'storage type 2 \(compressed', broken(28, 'i', 2)),
    (28, r'storage type -1 \(undefined', broken(28, 'i', -1)),
    (28, r'storage type 7 \(unknown', broken(28, 'i', 7)),
    (24, 'an array of 33 dimensions', broken(32, 'I', 33)),
    (24, 'array of 4294967295 dimensions', broken(32, 'I', 0xFFFFFFFF)),
    (24, 'negative dimension', broken(36, 'q', -1)),
    (24, 'larger than any memory', broken(36, '2q', 1 << 62, 1 << 62)),
    (24, 'larger than any memory', broken(36, '2q', 0, (1 << 63) - 1)),
    (64, 'would take 4398046511104 bytes', broken(36, '2q', 1 << 20, 1 << 20)),
    (60, 'unknown dtype 8', broken(60, 'i', 8)),
    (60, 'unknown dtype -1', broken(60, 'i', -1)),
    (152, '1 names for 2 arrays', broken(152, 'Q', 1)),
    (152, '0 names for 2 arrays', broken(152, 'Q', 0)[:160]),
    (168, 'a name would take 18446744073709551615', broken(160, 'Q', (1 << 64) - 1)),
    (168, 'not UTF-8', listed({b'\xff': ONE, 'y': ONE})),
    (177, "second array is named 'x'", broken(177, 'B', ord('x'))),
    (177, "second array is named 'x'", listed({'x': ONE, 'aux:x': ONE})),
    (178, '1 bytes follow', TWO + b'\0'),
    (56, 'neither 0 nor 1', listed({'x': record(np.ones(3, bool))}).replace(b'\1\1\1', b'\1\2\1')),
]


@pytest.mark.parametrize('offset, reason, data', BAD)
def test_bad_files(offset, reason, data, tmp_path) -> None:
    path = tmp_path / 'bad.params'
    path.write_bytes(data)
    with pytest.raises(ParamsError, match=reason) as caught:
        read_params(path)
    assert caught.value.offset == offset
    assert str(path) in str(caught.value) and f'at byte {offset}.' in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_every_truncation() -> None:
    assert len(parse_params(TWO)) == 2
    for length in range(len(TWO)):
        with pytest.raises(ParamsError):
            parse_params(TWO[:length])


def test_no_file(tmp_path) -> None:
    (tmp_path / 'empty.params').touch()
    with pytest.raises(ParamsError, match='it is empty'):
        read_params(tmp_path / 'empty.params')
    with pytest.raises(FileNotFoundError):
        read_params(tmp_path / 'absent.params')


@pytest.mark.slow
@pytest.mark.parametrize(
    'data',
    [
        struct.pack('<3Q', 0x112, 0, 80_000) + bytes(1_000_000),  # arrays of no dimensions, then names of no length
        listed({f'{i:x}': NONES['legacy'] for i in range(60_000)}),
        listed({f'{i:x}': record(np.ones((1,) * 32, np.int8)) for i in range(3_000)}),
        broken(36, '2q', 1 << 31, 1 << 31, data=TWO + bytes(1_000_000)),
    ],
)
def test_memory_is_bounded(data) -> None:
    tracemalloc.start()
    try:
        parse_params(data)
    except ParamsError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 20 * len(data)


def test_mutations() -> None:
    """A short run of `tools/fuzz_params.py`."""
    rng = random.Random(0)
    files = samples()
    broken = 0
    for _ in range(5_000):
        try:
            parse_params(mutate(rng.choice(files), rng))
        except ParamsError:
            broken += 1
    assert 2_500 < broken < 5_000


def test_fuzzer_finds_what_there_is(monkeypatch) -> None:
    """The fuzzer fails when the parser has a fault."""
    import fuzz_params

    def faulty(data: bytes) -> None:
        parse_params(data)
        raise IndexError

    monkeypatch.setattr(fuzz_params, 'parse_params', faulty)
    with pytest.raises(IndexError):
        fuzz_params.mutations(runs=1_000, seed=0)


@pytest.mark.parametrize(
    'arrays, message',
    [
        ({'a': np.ones(2, np.complex64)}, "'a': a .params file cannot hold complex64"),
        ({'a': np.array(['x'])}, 'cannot hold <U1'),
        ({'arg:a': np.ones(2)}, "'arg:a': expected a name without"),
        ({'a': np.ones((1,) * 33)}, 'at most 32 dimensions'),
        ({'\ud800': np.ones(2)}, 'surrogates not allowed'),
    ],
)
def test_what_cannot_be_written(arrays, message, tmp_path) -> None:
    path = tmp_path / 'a.params'
    path.write_bytes(b'before')
    with pytest.raises(ValueError, match=message):
        write_params(path, arrays)
    assert path.read_bytes() == b'before'
    assert os.listdir(tmp_path) == ['a.params']


def test_layout_in_memory_does_not_matter(tmp_path) -> None:
    a = np.arange(12, dtype='>f4').reshape(3, 4).T[::2]
    write_params(tmp_path / 'a.params', {'a': a})
    found = read_params(tmp_path / 'a.params')['a']
    assert found.dtype == '<f4'
    assert np.array_equal(found, a)

import gzip
import hashlib
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from params_files import CODES, MAGIC, NONES, listed, mutate, record, samples
from safetensors.torch import save_file

import timm_atac
from timm_atac.weights.folder import FolderError, load_folder, save_for_hf
from timm_atac.weights.params import (
    OtherFileError,
    ParamsError,
    UnsupportedParamsError,
    parse_params,
    read_params,
    write_params,
)

MAX_DIMS = 64 if np.lib.NumpyVersion(np.__version__) >= '2.0.0' else 32  # of an array
DATA = Path(__file__).parents[1] / 'data'

dtypes = st.sampled_from([np.dtype(code) for code in CODES])
arrays = dtypes.flatmap(
    lambda dtype: st_np.arrays(dtype, st_np.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
)
names = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=12).filter(
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
    (8, 'reserved field is 0x1', broken(8, 'Q', 1)),
    (16, '9223372036854775808 arrays do not fit', broken(16, 'Q', 1 << 63)),
    (24, 'magic number 0xdeadbeef', broken(24, 'I', 0xDEADBEEF)),
    (28, 'storage type -1, expected 0', broken(28, 'i', -1)),
    (28, 'storage type 7, expected 0', broken(28, 'i', 7)),
    (24, 'an array of 33 dimensions', broken(32, 'I', 33)),
    (24, 'array of 4294967295 dimensions', broken(32, 'I', 0xFFFFFFFF)),
    (24, 'negative dimension', broken(36, 'q', -1)),
    (24, 'larger than any memory', broken(36, '2q', 1 << 62, 1 << 62)),
    (24, 'larger than any memory', broken(36, '2q', 0, (1 << 63) - 1)),
    (64, 'would take 4398046511104 bytes', broken(36, '2q', 1 << 20, 1 << 20)),
    (60, 'unknown dtype 13', broken(60, 'i', 13)),
    (60, 'unknown dtype -1', broken(60, 'i', -1)),
    (152, 'the number of names is 1, expected 2', broken(152, 'Q', 1)),
    (168, 'a name would take 18446744073709551615', broken(160, 'Q', (1 << 64) - 1)),
    (168, 'not UTF-8', listed({b'\xff': ONE, 'y': ONE})),
    (177, "second array is named 'x'", broken(177, 'B', ord('x'))),
    (177, "second array is named 'x'", listed({'x': ONE, 'aux:x': ONE})),
    (178, 'the number of bytes after the last name is 1, expected 0', TWO + b'\0'),
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


# of valid files that are not read: offset in the message, words of it, the file
UNSUPPORTED = [
    (28, 'a row sparse array, expected dense ones', broken(28, 'i', 1)),
    (28, 'a compressed sparse row array, expected dense ones', broken(28, 'i', 2)),
    (60, 'an array of int16, expected float32, float64', broken(60, 'i', 8)),
    (60, 'an array of bfloat16, expected float32, float64', broken(60, 'i', 12)),
    (152, r'its 2 arrays have no names, as `nd\.save` of a list writes them', broken(152, 'Q', 0)[:160]),
]


@pytest.mark.parametrize('offset, reason, data', UNSUPPORTED)
def test_valid_files_that_are_not_read(offset, reason, data, tmp_path) -> None:
    path = tmp_path / 'valid.params'
    path.write_bytes(data)
    with pytest.raises(UnsupportedParamsError, match=f'a .params file that cannot be read here: {reason}') as caught:
        read_params(path)
    assert caught.value.offset == offset and f'at byte {offset}.' in str(caught.value)
    assert 'not a valid' not in str(caught.value)


WILD = Path(__file__).parents[3] / 'shared' / 'params_wild'


@pytest.mark.skipif(not WILD.is_dir(), reason=f'the files that others have written are not in {WILD}')
@pytest.mark.parametrize('name', ['legacy_arg.params', 'v1_named.ndarray', 'v2_gluon.params', 'legacy_nameless.v0'])
def test_files_of_others(name) -> None:
    """Names, types, shapes and bytes are those that MXNet 1.9.1 reads."""
    expected = json.loads((WILD / 'mxnet_reads.json').read_text())[name]
    if not expected['named']:
        with pytest.raises(UnsupportedParamsError, match=f'its {len(expected["arrays"])} arrays have no names'):
            read_params(WILD / name)
        return
    arrays = read_params(WILD / name)
    found = {
        key: {'dtype': a.dtype.name, 'shape': list(a.shape), 'sha256': hashlib.sha256(a.tobytes()).hexdigest()}
        for key, a in arrays.items()
    }
    assert found == {key.removeprefix('arg:').removeprefix('aux:'): value for key, value in expected['arrays'].items()}


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


@pytest.mark.slow
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
        pytest.param(
            {'a': np.empty((1,) * MAX_DIMS)},
            'at most 32 dimensions',
            marks=pytest.mark.skipif(MAX_DIMS == 32, reason='arrays have at most 32 dimensions before NumPy 2'),
        ),
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


def magics(data: bytes) -> set[str]:
    return {version for version, magic in MAGIC.items() if struct.pack('<Ii', magic, 0) in data}


def test_a_file_has_one_version(tmp_path) -> None:
    """MXNet refuses a file of V2 and V3 records, with and without `npx.set_np()`."""
    path = tmp_path / 'one.params'
    one = {'w': np.ones((2, 3), 'f4')}
    write_params(path, one)
    assert magics(path.read_bytes()) == {'V2'}
    others: list[np.ndarray] = [np.array(3.5, 'f4'), np.ones((0, 2), 'f4')]
    for other in others:
        write_params(path, {**one, 's': other})
        assert magics(path.read_bytes()) == {'V3'}
        assert equal(read_params(path), {**one, 's': other})


def test_names_that_mxnet_cuts(tmp_path) -> None:
    path = tmp_path / 'nul.params'
    with pytest.raises(ValueError, match='expected a name without NUL, where MXNet cuts it off'):
        write_params(path, {'a\0b': np.ones(1), 'a\0c': np.ones(1)})
    assert not path.exists()


def files_of_other_kinds(folder: Path) -> dict[str, bytes]:
    """What people have in place of weights, written by the programs that write it."""
    save_file({'a': torch.ones(2)}, folder / 'a.safetensors')
    torch.save({'a': torch.ones(2)}, folder / 'new.pth')
    torch.save({'a': torch.ones(2)}, folder / 'old.pth', _use_new_zipfile_serialization=False)
    np.savez(folder / 'a.npz', a=np.ones(2))
    np.save(folder / 'a.npy', np.ones(2))
    with zipfile.ZipFile(folder / 'a.zip', 'w') as archive:
        archive.writestr('weights/net.params', TWO)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    return written | {
        'pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 56059364\n',
        'page': b'\n<!DOCTYPE html>\n<html lang="en">',
        'pickle': pickle.dumps({'a': 1}),
        'gzip': gzip.compress(TWO),
        'json': b'{\n  "nodes": []}',
        'text': b'Not Found',
        'zeros': bytes(100),
    }


KINDS = {
    'a.safetensors': 'a safetensors file: timm loads it by',
    'new.pth': 'a checkpoint of PyTorch, which is a zip with a pickle. Load it by `torch.load',
    'old.pth': 'a pickle, for example a checkpoint of PyTorch before 1.6',
    'a.npz': 'an archive of NumPy arrays (.npz): give the arrays of `numpy.load(FILE)` to',
    'a.npy': 'an array of NumPy (.npy)',
    'a.zip': 'a zip archive: unpack it',
    'pointer': 'a Git LFS pointer: the file itself was not downloaded. Run `git lfs pull`',
    'page': 'a web page: the address gave a page and not the file',
    'pickle': 'a pickle',
    'gzip': 'compressed by gzip: unpack it',
    'json': 'JSON: MXNet writes the network into NAME-symbol.json',
    'text': 'text, for example an error message in place of a download',
    'zeros': 'empty space: its first bytes are all zero',
}


def test_files_of_other_kinds(tmp_path) -> None:
    (tmp_path / 'made').mkdir()
    files = files_of_other_kinds(tmp_path / 'made')
    assert files.keys() == KINDS.keys()
    for name, data in files.items():
        path = tmp_path / 'net.params'
        path.write_bytes(data)
        with pytest.raises(OtherFileError) as caught:
            read_params(path)
        assert str(caught.value).startswith(f'{path} is not a .params file. It is {KINDS[name]}')
        assert caught.value.offset == 0 and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_weights_of_other_kinds_in_a_folder(tmp_path) -> None:
    """The same for `model.safetensors`, which `timm-atac push` loads."""
    save_for_hf(timm.create_model('atac_resnet8_cifar'), tmp_path)
    (tmp_path / 'made').mkdir()
    for name, data in {**files_of_other_kinds(tmp_path / 'made'), 'params': TWO}.items():
        (tmp_path / 'model.safetensors').write_bytes(data)
        if name == 'a.safetensors':
            expected = r'model\.safetensors does not fit config\.json'
        elif name == 'params':
            expected = r'model\.safetensors is not a safetensors file\. It is a \.params file of MXNet'
        else:
            expected = rf'model\.safetensors is not a safetensors file\. It is {re.escape(KINDS[name])}'
        with pytest.raises(FolderError, match=expected):
            load_folder(tmp_path)

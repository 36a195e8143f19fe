"""Makes `.params` files of every version byte by byte, and damages them, for the tests and the fuzzer."""

import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

CODES = {'<f4': 0, '<f8': 1, '<f2': 2, '|u1': 3, '<i4': 4, '|i1': 5, '<i8': 6, '|b1': 7}
MAGIC = {'V1': 0xF993FAC8, 'V2': 0xF993FAC9, 'V3': 0xF993FACA}


def record(array: np.ndarray, version: str = 'V2', device: tuple[int, int] = (1, 0)) -> bytes:
    """Return the record of an array as MXNet saved it; 'legacy' is the format before V1, with 32-bit dimensions."""
    head = b'' if version == 'legacy' else struct.pack('<I', MAGIC[version])
    if version in ('V2', 'V3'):
        head += struct.pack('<i', 0)
    dims = 'I' if version == 'legacy' else 'q'
    shape = struct.pack(f'<I{array.ndim}{dims}', array.ndim, *array.shape)
    return head + shape + struct.pack('<3i', *device, CODES[array.dtype.str]) + array.tobytes()


NONES = {
    'legacy': struct.pack('<I', 0),
    'V1': struct.pack('<II', MAGIC['V1'], 0),
    'V2': struct.pack('<IiI', MAGIC['V2'], 0, 0),
    'V3 of unknown dimensions': struct.pack('<IiI', MAGIC['V3'], 0, 0xFFFFFFFF),
    'V3 of an unknown dimension': struct.pack('<IiIqq', MAGIC['V3'], 0, 2, 3, -1),
}


def listed(records: Mapping[Any, bytes]) -> bytes:
    """Return a file with these records by name; a name is text or bytes."""
    names = [name.encode() if isinstance(name, str) else name for name in records]
    return b''.join(
        [
            struct.pack('<3Q', 0x112, 0, len(records)),
            *records.values(),
            struct.pack('<Q', len(names)),
            *(struct.pack('<Q', len(name)) + name for name in names),
        ]
    )


def samples() -> list[bytes]:
    """Return small valid files; together they have every version, dtype and kind of shape."""
    rng = np.random.default_rng(0)
    files = [listed({})]
    for version in ('legacy', 'V1', 'V2', 'V3'):
        shapes = [(1,), (2, 3), (2, 1, 3, 1), (0, 2)] + ([()] if version == 'V3' else [])
        arrays = {
            f'{dtype}{shape}': record(rng.integers(0, 2, shape).astype(dtype), version)
            for dtype in CODES
            for shape in shapes
        }
        files.append(listed(arrays))
        files += [listed({name: data}) for name, data in list(arrays.items())[:4]]
    files.append(listed({f'arg:{name}': data for name, data in NONES.items()}))
    return files


INTERESTING = [0, 1, 2, 7, 8, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, *MAGIC.values()]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Make up to four changes: to a bit, a byte or an integer, or remove, repeat or cut off a piece."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        way = rng.randrange(6)
        if way == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif way == 2:
            at -= at % 4
            out[at : at + 4] = struct.pack('<I', rng.choice(INTERESTING))
        elif way == 3:
            out[at : at + 8] = struct.pack('<Q', rng.choice([*INTERESTING, 2**62, 2**63, 2**64 - 1]))
        elif way == 4:
            end = min(len(out), at + rng.choice([1, 4, 8, 16, 64]))
            out[at:end] = b'' if rng.random() < 0.5 else out[at:end] * 2
        else:
            del out[at:]
    return bytes(out)

"""Reads and writes MXNet's `.params` files as NumPy arrays, without MXNet.

A file is a list of arrays and a list of their names, little-endian. Four versions of the array record are in use, and
all can be read. The format is that of `NDArray::Save` and `NDArray::Load` in MXNet 1.9.1 (src/ndarray/ndarray.cc).
"""

import math
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._files import replaced_file
from .file_kinds import HEAD, describe

__all__ = [
    'OtherFileError',
    'ParamsError',
    'UnsupportedParamsError',
    'is_params',
    'parse_params',
    'read_params',
    'write_params',
]

_LIST = 0x112
_MAGIC = struct.pack('<Q', _LIST)
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_MAX_DIMS = 32
_UNKNOWN_DIMS = 0xFFFFFFFF  # -1 as u32, in V3 records
_MIN_RECORD = 4 + 8  # bytes of the shortest array record, and of the length of its name
_DTYPES = tuple(np.dtype(code) for code in ('<f4', '<f8', '<f2', 'u1', '<i4', 'i1', '<i8', '?'))
_SPARSE = {1: 'row sparse', 2: 'compressed sparse row'}
# valid in MXNet, and not read here: NumPy has no bfloat16, and MXNet's own Python reads none of the others
_OTHER_DTYPES = {8: 'int16', 9: 'uint16', 10: 'uint32', 11: 'uint64', 12: 'bfloat16'}
_PREFIXES = ('arg:', 'aux:')
_CPU = 1, 0
_NONE = np.empty(0, np.float32)
_NONE.flags.writeable = False


class ParamsError(ValueError):
    """The file is not a complete and valid `.params` file.

    Attributes:
        path: The file.
        offset: Position of the fault in the file, in bytes.
        reason: The fault.
    """

    _text = '{path}: not a valid .params file: {reason}, at byte {offset}.'

    def __init__(self, path: Any, offset: int, reason: str) -> None:
        super().__init__(path, offset, reason)
        self.path, self.offset, self.reason = path, offset, reason

    def __str__(self) -> str:
        return self._text.format_map(vars(self))


class UnsupportedParamsError(ParamsError):
    """MXNet can read the file, and `read_params` cannot: it has sparse arrays, a rare dtype, or no names."""

    _text = '{path}: a .params file that cannot be read here: {reason}, at byte {offset}.'


class OtherFileError(ParamsError):
    """The file is of another kind, for example a checkpoint of PyTorch or a web page."""

    _text = '{path} is not a .params file. It is {reason}.'


def read_params(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the arrays of a `.params` file that MXNet's `save_parameters`, `save_checkpoint` or `nd.save` has written.

    Nothing is copied: the arrays are read-only views of the memory-mapped file, which must not change while they are in
    use. Every length is compared with the rest of the file before memory is allocated, so time and memory are bounded
    by the size of the file.

    Args:
        path: The file.

    Returns:
        Name -> array, in the order of the file. The prefixes `arg:` and `aux:` of `save_checkpoint` are removed, as
        Gluon does. An array that was saved without a value ("none") is a float32 array of shape (0,).

    Raises:
        UnsupportedParamsError: MXNet can read the file, but it has a sparse array, a dtype other than those of
            `write_params`, or arrays without names. It is a `ParamsError`.
        ParamsError: The file is truncated or malformed, has more bytes after its end, or two arrays of one name. The
            message has the offset and the reason. For another kind of file, it names the kind and what to do.
        OSError: The file cannot be read.
    """
    with open(path, 'rb') as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ParamsError(path, 0, 'it is empty')
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parse_params(buffer, path)


def is_params(path: str | os.PathLike[str]) -> bool:
    """True if the file begins like a `.params` file."""
    with open(path, 'rb') as file:
        return file.read(8) == _MAGIC


def parse_params(buffer: Any, path: Any = '<buffer>') -> dict[str, np.ndarray]:
    """Parse the content of a `.params` file as `read_params` does; the arrays are views of the buffer.

    Args:
        buffer: Bytes of a complete file, or another buffer.
        path: Name of the file in errors.
    """
    return _Parser(buffer, path).file()


def write_params(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as MXNet 1.9.1 does. After an error the file has not changed.

    Args:
        path: The file. It is replaced if it exists.
        arrays: Name -> array of float32, float64, float16, uint8, int32, int8, int64 or bool.

    The file has V2 records, which MXNet reads unless `npx.set_np()` was called. If one of the arrays has no dimensions
    or no elements, all records are V3, which MXNet reads only after `npx.set_np()`.

    Raises:
        ValueError: An array has another dtype or more than 32 dimensions. A name begins with `arg:` or `aux:`, or has a
            NUL, where MXNet cuts it off.
    """
    for name, array in arrays.items():
        if array.dtype.newbyteorder('<') not in _DTYPES:
            known = ', '.join(dtype.name for dtype in _DTYPES)
            raise ValueError(f'{name!r}: a .params file cannot hold {array.dtype}; expected one of {known}.')
        if array.ndim > _MAX_DIMS:
            raise ValueError(f'{name!r}: expected at most {_MAX_DIMS} dimensions, not {array.ndim}.')
        if name.startswith(_PREFIXES):
            raise ValueError(f'{name!r}: expected a name without {" or ".join(_PREFIXES)}, which readers remove.')
        if '\0' in name:
            raise ValueError(f'{name!r}: expected a name without NUL, where MXNet cuts it off.')
    names = [name.encode() for name in arrays]
    magic = _V2 if all(array.size and array.ndim for array in arrays.values()) else _V3  # MXNet reads no mixture
    with replaced_file(Path(path)) as file:
        file.write(struct.pack('<3Q', _LIST, 0, len(arrays)))
        for array in arrays.values():
            dtype = array.dtype.newbyteorder('<')
            record = magic, 0, array.ndim, *array.shape, *_CPU, _DTYPES.index(dtype)
            file.write(struct.pack(f'<IiI{array.ndim}q3i', *record))
            file.write(array.astype(dtype, copy=False).tobytes())
        file.write(struct.pack('<Q', len(names)))
        for name_bytes in names:
            file.write(struct.pack('<Q', len(name_bytes)) + name_bytes)


class _Parser:
    """Reads a file from its start to its end; each length is compared with the rest of the file first."""

    def __init__(self, buffer: Any, path: Any) -> None:
        self.buffer, self.path = buffer, path
        self.size = len(buffer)
        self.offset = 0

    def error(self, reason: str, offset: int | None = None) -> ParamsError:
        return ParamsError(self.path, self.offset if offset is None else offset, reason)

    def unsupported(self, reason: str, offset: int) -> UnsupportedParamsError:
        return UnsupportedParamsError(self.path, offset, reason)

    def skip(self, length: int, what: str) -> int:
        """Skip `length` bytes; return the offset of the first one."""
        start, left = self.offset, self.size - self.offset
        if length > left:
            raise self.error(f'{what} would take {length} bytes, but {left} are left')
        self.offset += length
        return start

    def numbers(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack_from(f'<{layout}', self.buffer, self.skip(struct.calcsize(f'<{layout}'), what))

    def number(self, layout: str, what: str) -> int:
        return self.numbers(layout, what)[0]

    def file(self) -> dict[str, np.ndarray]:
        head = bytes(self.buffer[:HEAD])
        if not head.startswith(_MAGIC) and (kind := describe(head)):
            raise OtherFileError(self.path, 0, kind)
        magic, reserved = self.numbers('QQ', 'the header')
        if magic != _LIST:
            raise self.error(f'it begins with {magic:#x}, expected {_LIST:#x}', 0)
        if reserved:
            raise self.error(f'the reserved field is {reserved:#x}, expected 0', 8)
        count = self.number('Q', 'the number of arrays')
        if count > (self.size - self.offset) // _MIN_RECORD:
            raise self.error(f'{count} arrays do not fit into the {self.size - self.offset} bytes left', 16)
        arrays = [self.array() for _ in range(count)]
        names = self.names(count)
        if self.offset != self.size:
            raise self.error(f'the number of bytes after the last name is {self.size - self.offset}, expected 0')
        return dict(zip(names, arrays, strict=True))

    def array(self) -> np.ndarray:
        start = self.offset
        magic = self.number('I', "an array's magic number")
        if magic in (_V2, _V3):
            storage = self.number('i', "an array's storage type")
            if storage in _SPARSE:
                raise self.unsupported(f'a {_SPARSE[storage]} array, expected dense ones', start + 4)
            if storage != 0:
                raise self.error(f'storage type {storage}, expected 0 (dense)', start + 4)
        shape = self.shape(magic, start)
        if shape is None:
            return _NONE
        _, _, code = self.numbers('3i', "an array's device and dtype")
        if code in _OTHER_DTYPES:
            known = ', '.join(dtype.name for dtype in _DTYPES)
            raise self.unsupported(f'an array of {_OTHER_DTYPES[code]}, expected {known}', self.offset - 4)
        if not 0 <= code < len(_DTYPES):
            raise self.error(f'unknown dtype {code}, expected 0 to {len(_DTYPES) - 1}', self.offset - 4)
        return self.values(_DTYPES[code], shape, start)

    def shape(self, magic: int, start: int) -> tuple[int, ...] | None:
        """Read a shape; return None for an array without a value, whose record ends here."""
        dims, layout = magic, 'I'  # the oldest records begin with the number of dimensions
        if magic in (_V1, _V2, _V3):
            dims, layout = self.number('I', "an array's number of dimensions"), 'q'
            if magic == _V3 and dims == _UNKNOWN_DIMS:
                return None
        if dims > _MAX_DIMS:
            what = f'{dims} dimensions' if layout == 'q' else f'magic number {magic:#x}'
            raise self.error(
                f'an array of {what}, expected at most {_MAX_DIMS} or a magic number of V1 to V3',
                start,
            )
        shape = self.numbers(f'{dims}{layout}', f'a shape of {dims} dimensions')
        if not shape and magic != _V3:
            return None
        if magic == _V3 and -1 in shape:
            return None
        if min(shape, default=0) < 0:
            raise self.error(f'shape {shape} has a negative dimension', start)
        return shape

    def values(self, dtype: np.dtype, shape: tuple[int, ...], start: int) -> np.ndarray:
        if math.prod(max(dim, 1) for dim in shape) * dtype.itemsize > sys.maxsize:
            raise self.error(f'shape {shape} is larger than any memory', start)
        count = math.prod(shape)
        offset = self.skip(count * dtype.itemsize, f'{dtype.name} values of shape {shape}')
        if dtype == np.bool_ and count and np.frombuffer(self.buffer, np.uint8, count, offset).max() > 1:
            raise self.error('a bool is neither 0 nor 1', offset)
        return np.frombuffer(self.buffer, dtype, count, offset).reshape(shape)

    def names(self, count: int) -> list[str]:
        found = self.number('Q', 'the number of names')
        if count and not found:
            reason = f'its {count} arrays have no names, as `nd.save` of a list writes them. Save a dict in MXNet'
            raise self.unsupported(reason, self.offset - 8)
        if found != count:
            raise self.error(f'the number of names is {found}, expected {count}', self.offset - 8)
        names: dict[str, None] = {}
        for _ in range(count):
            length = self.number('Q', "a name's length")
            start = self.skip(length, 'a name')
            try:
                name = str(self.buffer[start : start + length], 'utf-8')
            except UnicodeDecodeError as error:
                raise self.error(f'a name is not UTF-8: {error}', start) from None
            if name.startswith(_PREFIXES):
                name = name[len(_PREFIXES[0]) :]
            if name in names:
                raise self.error(f'a second array is named {name!r}', start)
            names[name] = None
        return list(names)

"""Names the files that people have in place of weights, by their first bytes, and says what to do with each."""

import re

__all__ = ['HEAD', 'describe']

HEAD = 512
"""Number of first bytes that `describe` needs."""

_UNPACK = 'unpack it'
_BY_START = (
    (
        b'version https://git-lfs',
        'a Git LFS pointer: the file itself was not downloaded. Run `git lfs pull` in its repository',
    ),
    (b'\x93NUMPY', 'an array of NumPy (.npy)'),
    (b'\x89HDF\r\n', 'an HDF5 file, for example of Keras'),
    (b'\x1f\x8b', f'compressed by gzip: {_UNPACK}'),
    (b'BZh', f'compressed by bzip2: {_UNPACK}'),
    (b'\xfd7zXZ\0', f'compressed by xz: {_UNPACK}'),
    (b'\x28\xb5\x2f\xfd', f'compressed by zstd: {_UNPACK}'),
    (b'7z\xbc\xaf', f'a 7z archive: {_UNPACK}'),
    (b'Rar!', f'a RAR archive: {_UNPACK}'),
    (
        b'\x12\x01\0\0\0\0\0\0',
        "a .params file of MXNet. `timm-atac convert` makes a folder of one of the authors' files",
    ),
)
_PICKLE = (
    'a pickle, for example a checkpoint of PyTorch before 1.6. It is not opened here, since a pickle can run any code. '
    'Load it by `torch.load(FILE, weights_only=True)`, and save its tensors as safetensors'
)


def describe(head: bytes) -> str | None:
    """Return what a file is and what to do, None if its first bytes say nothing.

    Args:
        head: The first `HEAD` bytes of the file, or all of a smaller one.
    """
    head = bytes(head[:HEAD])
    if head and not head.strip(b'\0'):
        return 'empty space: its first bytes are all zero. Download it again'
    for start, kind in _BY_START:
        if head.startswith(start):
            return kind
    if re.match(rb'\x80[\x00-\x05]', head):
        return _PICKLE
    if head.startswith(b'PK\x03\x04'):
        return _zip(head)
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < 1 << 32:
        return "a safetensors file: timm loads it by pretrained_cfg_overlay=dict(file='FILE.safetensors')"
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        return (
            'a web page: the address gave a page and not the file. On GitHub, /raw/ in place of /blob/ gives the file'
        )
    if text.startswith((b'{', b'[')):
        return 'JSON: MXNet writes the network into NAME-symbol.json, and its arrays into NAME-0000.params'
    if text and re.fullmatch(rb'[\x20-\x7e\s]+', text):
        return 'text, for example an error message in place of a download'
    return None


def _zip(head: bytes) -> str:
    """Describe a zip archive by the name of its first entry."""
    name = head[30 : 30 + int.from_bytes(head[26:28], 'little')]
    if name.endswith((b'/data.pkl', b'/.format_version', b'/byteorder', b'/version')):
        return (
            'a checkpoint of PyTorch, which is a zip with a pickle. Load it by `torch.load(FILE, weights_only=True)`, '
            'and save its tensors as safetensors'
        )
    if name.endswith(b'.npy'):
        return 'an archive of NumPy arrays (.npz): give the arrays of `numpy.load(FILE)` to `timm_atac.write_params`'
    return f'a zip archive: {_UNPACK}'

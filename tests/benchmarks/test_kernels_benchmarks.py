"""The benchmarks of the Triton kernels in small sizes, on a GPU or interpreted (test_kernels_interpreted.py)."""

from unittest import mock

import kernel_tiles
import kernels
import pytest
import speed
import timm
import torch
from kernel_units import DEVICE, ERRORS, skip_without_kernels

from timm_atac.kernels import atac

skip_without_kernels()
pytestmark = pytest.mark.usefixtures('kernels_as_before')


def rows(capsys) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ') and '---' not in line]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def test_benchmark_of_units(monkeypatch, capsys, tmp_path) -> None:
    pytest.importorskip('matplotlib')
    where = f'--device {DEVICE.type} --batch-size 2 --rounds 1 --shapes 16x3x2'.split()
    picture = tmp_path / 'kernels.png'
    options = ['--forms', 'eager', 'folded', 'kernel', '--trained', 'ATACMe', 'ATACMe, kernels', '--plot', str(picture)]
    monkeypatch.setattr('sys.argv', ['kernels.py', *where, *options])
    kernels.main()
    table = rows(capsys)
    assert [row[0] for row in table] == ['C x H x W', '16 x 3 x 2'] * 2 + ['C', '16', '16', '16']
    for row, (name, dtype) in zip(table[-3:], kernels.DTYPES.items(), strict=True):
        assert row[1] == name
        assert all(0 < float(cell) < 2 * ERRORS[dtype] for cell in row[2:])
    assert picture.stat().st_size > 10_000


def test_benchmark_of_tiles(monkeypatch, capsys) -> None:
    where = f'--device {DEVICE.type} --batch-size 2 --rounds 1 --shapes 32x3x2 --best 1'.split()
    monkeypatch.setattr(kernel_tiles, 'SIZES', {name: sizes[:2] for name, sizes in kernel_tiles.SIZES.items()})
    monkeypatch.setattr('sys.argv', ['kernel_tiles.py', *where])
    kernel_tiles.main()
    x = torch.empty(2, 32, 3, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    in_use = ', '.join(map(str, atac.tile_for(x, torch.empty(16, 32, dtype=x.dtype))))
    assert {row[0] for row in rows(capsys)} & {f'{in_use} (in use)'}


def test_benchmark_of_networks() -> None:
    names = {'tiny': lambda: timm.create_model('atac_resnet8_cifar')}
    mode = speed.Mode(*speed.MODES['half'], device=DEVICE)
    with mock.patch.multiple(speed, MODELS=names, FUSED=names):
        infer = speed.inference(mode, ['tiny'], 1, 8, 1, kernels=True)
        train = speed.training(speed.Mode(*speed.MODES['bf16'], device=DEVICE), ['tiny'], 2, 8, 1, kernels=True)
    assert [row.name for row in infer] == ['tiny', 'tiny, fused', 'tiny, fused, kernels']
    assert [row.name for row in train] == ['tiny', 'tiny, kernels']

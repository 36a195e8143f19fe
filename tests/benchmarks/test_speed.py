"""benchmarks/speed.py and benchmarks/measuring/timing.py"""

import gc
import importlib
import re

import pytest
import speed
import torch
import torch.nn as nn
from measuring.timing import bytes_kept, interleaved, peak_memory, ratio
from torch.multiprocessing.reductions import StorageWeakRef

CPU = torch.device('cpu')


def test_runs_take_turns() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in 'ab'}
    times = interleaved(runs, 3, CPU)
    assert calls == [*'aabb', *'ab' * 3]
    assert [len(values) for values in times.values()] == [3, 3]
    assert ratio({'a': [2.0, 3.0, 8.0], 'b': [1.0, 1.0, 2.0]}, 'a', 'b') == (3.0, 2.0, 4.0)


def test_peak_memory() -> None:
    """4 MiB and 8 MiB at the same time, then 1 MiB: freed memory does not count."""

    def run() -> None:
        a = torch.zeros(1 << 20)
        b = torch.zeros(1 << 21)
        del a, b
        torch.zeros(1 << 18)

    assert peak_memory(run, CPU) == pytest.approx(12 << 20, rel=0.01)


def test_bytes_kept_frees_the_maps() -> None:
    network, maps = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)), []
    for layer in network:
        layer.register_forward_hook(lambda module, args, y: maps.append(StorageWeakRef(y.untyped_storage())))
    assert bytes_kept(lambda: network(torch.randn(2, 3, 5, 7)).sum(), network) > 0
    gc.collect()
    assert len(maps) == 4 and all(storage.expired() for storage in maps)


def test_bytes_kept() -> None:
    """A square and a convolution save their input. A weight belongs to its module. Views of one tensor count once."""
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    conv = nn.Conv2d(3, 4, 1)
    assert bytes_kept(lambda: x.square(), conv) == x.numel() * 4
    assert bytes_kept(lambda: conv(x.transpose(2, 3)) + x.transpose(2, 3).square().sum(), conv) == x.numel() * 4
    with torch.no_grad():
        assert bytes_kept(lambda: conv(x), conv) == 0


@pytest.mark.slow
def test_shapes_are_those_of_the_networks() -> None:
    shapes = speed.shapes()
    assert {(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7), (16, 32, 32), (64, 8, 8)} < set(shapes)
    assert len(shapes) == len(set(shapes))


@pytest.mark.slow
@pytest.mark.weekly
def test_tables_and_picture(monkeypatch, capsys, tmp_path) -> None:
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(speed, 'shapes', lambda: [(6, 5, 3)])
    arguments = '--models resnet50 atac_resnet50 --batch-size 2 --img-size 32 --rounds 1'.split()
    monkeypatch.setattr('sys.argv', ['speed.py', *arguments, '--plot', str(tmp_path / 'speed.png')])
    speed.main()
    lines = [re.sub(r'[\d.]+', '0', line) for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    names = ['resnet0', 'resnet0, fused', 'atac_resnet0', 'atac_resnet0, fused']
    assert [line for line in lines if line.endswith('| | |')] == [f'| {n} | 0 | 0 (0) | 0 | 0 | | |' for n in names]
    assert [line for line in lines if line.endswith('| 0 | 0 |')] == [
        f'| {n} | 0 | 0 (0) | 0 | 0 | 0 | 0 |' for n in ('resnet0', 'atac_resnet0')
    ]
    assert lines[-1] == f'| 0 x 0 x 0 |{" 0, 0, 0 |" * 6}'
    assert (tmp_path / 'speed.png').stat().st_size > 10_000


@pytest.mark.parametrize('module', ['kernels', 'kernel_tiles', 'speed'])
def test_error_without_kernels(monkeypatch, capsys, module) -> None:
    if module == 'kernel_tiles':
        pytest.importorskip('triton')
    main = importlib.import_module(module).main
    monkeypatch.setattr('sys.argv', [f'{module}.py', '--device', 'cpu', *(['--kernels'] if module == 'speed' else [])])
    with pytest.raises(SystemExit):
        main()
    assert 'runs on cpu' in capsys.readouterr().err

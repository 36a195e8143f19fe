"""ATACMe against ATAC with BatchNorms of every type and in every mode."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from atac_me import SHAPE, assert_same, everything, is_recomputed, pair, with_name
from timm.layers import LayerNorm2d
from timm.utils import freeze

from timm_atac import ATAC, ATACMe, NiN, SEActivation, XUnit
from timm_atac.units.batch_norm import BatchNorm


@pytest.mark.parametrize(
    'options',
    [
        {'momentum': None},
        {'momentum': 0.3, 'eps': 1e-3},
        {'affine': False},
        {'track_running_stats': False},
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_norms(options, training) -> None:
    plain, me = pair(norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, **options, **dd))
    plain.double().train(training)
    me.double().train(training)
    for _ in range(2):
        assert_same(plain, me, torch.randn(SHAPE, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_one_norm_frozen() -> None:
    """As in fine-tuning with some norms in eval mode."""
    plain, me = pair()
    for unit in (plain.double(), me.double()):
        unit.bn1.eval().requires_grad_(False)
    assert_same(plain, me, torch.randn(SHAPE, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_frozen_by_timm() -> None:
    plain, me = pair()
    for unit in (plain, me):
        freeze(unit, ['bn1', 'bn2'])
    assert type(me.bn1).__name__ == 'FrozenBatchNorm2d'
    assert_same(plain, me, torch.randn(SHAPE), rtol=1e-5, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert not is_recomputed(me(torch.randn(SHAPE)))  # a frozen norm returns float32 there


def test_statistics_are_taken_once() -> None:
    _, me = pair()
    me(torch.randn(SHAPE)).sum().backward()
    before = {name: buffer.clone() for name, buffer in me.named_buffers()}
    assert before['bn1.num_batches_tracked'] == before['bn2.num_batches_tracked'] == 1
    me(torch.randn(SHAPE)).backward(torch.randn(SHAPE))
    after = dict(me.named_buffers())
    assert after['bn2.num_batches_tracked'] == 2
    assert not torch.equal(before['bn2.running_var'], after['bn2.running_var'])


def test_statistics_that_change_before_the_backward_pass() -> None:
    """An evaluation uses running statistics, a training pass updates them: the gradients use the earlier statistics."""
    plain, me = pair()
    x, grad = torch.randn(2, *SHAPE, dtype=torch.float64)
    expected = everything(plain.double().eval(), x, grad, recomputed=False)
    x.requires_grad_()
    y = me.double().eval()(x)
    me.train()(x.detach() * 3)
    y.backward(grad)
    for name, p in me.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, expected['input'], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('frozen', [[], ['bn1'], ['bn1', 'bn2']])
@pytest.mark.parametrize('shape', [(0, 14, 4, 4), (1, 14, 1, 1)])
def test_nothing_to_take_statistics_of(frozen, shape) -> None:
    """ATAC and ATACMe do the same, also for errors and running statistics."""
    found: list[Any] = []
    for unit in pair():
        if frozen:
            freeze(unit, frozen)
        for other in {'bn1', 'bn2'} - set(frozen):
            setattr(unit, other, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(unit, other)))
        x = torch.ones(shape, requires_grad=True)
        try:
            unit(x).sum().backward()
            found.append([x.grad, *unit.buffers()])
        except (RuntimeError, ValueError) as error:
            found.append([type(error), *unit.buffers()])
    for a, b in zip(*found, strict=True):
        assert a is b if isinstance(a, type) else torch.equal(a, b)


ONE_VALUE: list[tuple[Any, tuple[int, ...], str]] = [
    (ATAC(14), (1, 14, 1, 1), r'ATAC \(14 channels\)'),
    (ATACMe(14), (1, 14, 1, 1), r'ATACMe \(14 channels\)'),
    (NiN(14), (1, 14, 1, 1), r'NiN \(14 channels\)'),
    (SEActivation(14), (1, 14, 5, 3), r'SEActivation \(14 channels\)'),
    (SEActivation(14, input_fmt='NLC'), (1, 5, 14), r'SEActivation \(14 channels\)'),
    (XUnit(14), (1, 14, 1, 1), r'XUnit \(14 channels\)'),
    (nn.Sequential(nn.Linear(3, 14), ATAC()), (1, 3), r"ATAC at '1' of .*Sequential \(14 channels\)"),
    (ATAC(14, norm_layer=partial(nn.BatchNorm2d, track_running_stats=False)), (1, 14, 1, 1), r'ATAC \(14 channels\)'),
]


@pytest.mark.parametrize('unit, shape, name', ONE_VALUE)
def test_one_value_per_channel_is_an_error(unit, shape, name) -> None:
    message = rf'{name} got an input of shape .* in training: Expected more than 1 value per channel.*drop_last=True'
    with pytest.raises(ValueError, match=message):
        unit.train()(torch.randn(shape, requires_grad=True))
    unit(torch.randn(2, *shape[1:])).sum().backward()


@pytest.mark.parametrize('way', [torch.no_grad, torch.enable_grad])
def test_one_value_per_channel_without_statistics_of_the_batch(way) -> None:
    """Norms in eval(), other norms and evaluation need no second value. Empty batches are no error of ours."""
    frozen = ATACMe(14)
    freeze(frozen, ['bn1', 'bn2'])
    with way():
        for unit in (frozen, ATAC(14, norm_layer=nn.Identity), ATAC(14, norm_layer=LayerNorm2d), ATACMe(14).eval()):
            assert unit(torch.randn(1, 14, 1, 1)).shape == (1, 14, 1, 1)
        assert SEActivation(14).eval()(torch.randn(1, 14, 5, 3)).shape == (1, 14, 5, 3)
        assert XUnit(14)(torch.randn(1, 14, 1, 2)).shape == (1, 14, 1, 2)


@pytest.mark.slow
def test_one_value_per_channel_compiled() -> None:
    """The check breaks no graph, and does not bind an exported program to the sizes of its example."""
    torch._dynamo.reset()
    compiled = torch.compile(ATACMe(14), backend='eager', fullgraph=True, dynamic=True)
    assert compiled(torch.randn(2, 14, 3, 3)).shape == (2, 14, 3, 3)
    assert compiled(torch.randn(3, 14, 5, 2)).shape == (3, 14, 5, 2)
    sizes = {0: torch.export.Dim('batch'), 2: torch.export.Dim('height')}
    program: Any = torch.export.export(SEActivation(14), (torch.randn(2, 14, 3, 3),), dynamic_shapes=(sizes,))
    assert program.module()(torch.randn(5, 14, 4, 3)).shape == (5, 14, 4, 3)
    with pytest.raises(Exception, match='more than 1 value per channel'):
        torch.compile(ATACMe(14), backend='eager')(torch.randn(1, 14, 1, 1))


def _sync(rank: int, folder: str, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    try:
        unit, x, grad = torch.load(f'{folder}/given.pt', weights_only=False)
        unit = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
        x, grad = x.split(sizes)[rank], grad.split(sizes)[rank]
        single = copy.deepcopy(unit).float()
        torch.save(everything(unit, x, grad, recomputed=True), f'{folder}/{rank}.pt')
        with torch.autocast('cpu', torch.bfloat16):
            torch.save(everything(single, x.float(), grad.float(), recomputed=True), f'{folder}/{rank}-bf16.pt')
        with pytest.raises(RuntimeError, match='SyncBatchNorm has no second derivative'):
            torch.autograd.grad(unit(x.requires_grad_()).sum(), x, create_graph=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('sizes, affine', [((3, 1), True), ((4, 0), False)])
def test_synchronized_norms(tmp_path, sizes, affine) -> None:
    """Two processes with a part of a batch each, one part may be empty, against one process with the whole batch."""
    plain, me = pair(norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, affine=affine, **dd))
    x, grad = torch.randn(2, 4, 14, 25, 23).double()
    grad += 1  # equal rounding errors at all positions then add up
    torch.save((me.double(), x, grad), tmp_path / 'given.pt')
    torch.multiprocessing.spawn(_sync, args=(str(tmp_path), sizes), nprocs=2)
    expected = everything(plain.double(), x, grad, recomputed=False)
    parts = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1)]
    for name, value in expected.items():
        if name in ('output', 'input'):
            found = torch.cat([part[name] for part in parts])
        elif name.startswith('buffer'):
            found = parts[0][name]
            torch.testing.assert_close(parts[1][name], found)
        else:
            found = parts[0][name] + parts[1][name]  # DDP takes the mean of gradients, and each loss is a mean
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-9, msg=with_name(name))

    halves = [torch.load(tmp_path / f'{rank}-bf16.pt', weights_only=True) for rank in (0, 1)]
    for name in ('conv1.weight', 'conv2.weight'):
        error = (halves[0][name] + halves[1][name] - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_statistics_alone(dtype) -> None:
    """Without normalising: the same values and running statistics as in a forward pass."""
    norms: list[Any] = [nn.BatchNorm2d(14, dtype=dtype) for _ in range(2)]
    h = torch.randn(SHAPE, dtype=dtype) + 1
    expected = norms[0](h)
    norm = BatchNorm.from_module(norms[1])
    mean, invstd, weight, bias = (v.view(1, -1, 1, 1) for v in norm.rows(norm.statistics(h), None, None))
    torch.testing.assert_close((h - mean) * invstd * weight + bias, expected)
    for found, buffer in zip(norms[1].buffers(), norms[0].buffers(), strict=True):
        torch.testing.assert_close(found, buffer)

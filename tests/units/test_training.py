"""What timm's users do with a model, for models that got ATAC by name or by replacement."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from timm_atac import replace_activations
from timm_atac.units.deferred import ChannelModule

MODELS = {
    'by name': lambda: timm.create_model('test_resnet', act_layer='atac', num_classes=7),
    'by name, tokens': lambda: timm.create_model('test_vit', act_layer='atac', num_classes=7, img_size=64),
    'replaced': lambda: replace_activations(timm.create_model('test_efficientnet', num_classes=7)),
    'replaced and rewritten': lambda: replace_activations(timm.create_model('dla46_c', num_classes=7)),
}


@pytest.fixture(params=MODELS)
def model(request) -> Any:
    model = MODELS[request.param]()
    assert any(isinstance(m, ChannelModule) for m in model.modules())
    return model


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64)


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 7)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model, x).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    try:
        for i, create in enumerate(MODELS.values()):
            torch.manual_seed(rank)  # DDP starts every process with the parameters of the first
            model = DistributedDataParallel(create())
            start = copy.deepcopy(model.module.state_dict())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                loss(model, images()).backward()
                optimizer.step()
            torch.save([start, model.module.state_dict()], f'{folder}/{i}-{rank}.pt')
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ddp(tmp_path) -> None:
    """One pair of processes for all models, because processes start slowly."""
    torch.multiprocessing.spawn(_train, args=(str(tmp_path),), nprocs=2)
    for i, create in enumerate(MODELS.values()):
        states = (torch.load(tmp_path / f'{i}-{rank}.pt', weights_only=True) for rank in (0, 1))
        (start0, end0), (start1, end1) = states
        model = create()
        units = {n for n, m in model.named_modules() if isinstance(m, ChannelModule)}
        parameters = {n for n, _ in model.named_parameters()}
        assert start0.keys() == end1.keys()
        for key in parameters:
            torch.testing.assert_close(start0[key], start1[key], rtol=0, atol=0)
            torch.testing.assert_close(end0[key], end1[key], rtol=0, atol=0)
        inside = [key for key in parameters if key.startswith(tuple(f'{unit}.' for unit in units))]
        moved = [key for key in inside if not torch.equal(start0[key], end0[key])]
        assert len(moved) > 0.9 * len(inside)  # in a block that starts as the identity, some do not change in two steps


@pytest.mark.slow
def test_ema(model) -> None:
    ema = ModelEmaV3(model, decay=0.75)
    before = copy.deepcopy(model.state_dict())
    loss(model, images()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ema.update(model)
    after = model.state_dict()
    averaged = ema.module.state_dict()
    assert averaged.keys() == after.keys()
    for key, value in averaged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[key].lerp(after[key], 0.25), rtol=1e-4, atol=1e-6)
    assert ema(images()).shape == (4, 7)


@pytest.mark.slow
def test_compile_without_graph_break(model) -> None:
    model, x = model.double(), images().double()  # compiled, a unit runs op by op, with other rounding
    expected = gradients(copy.deepcopy(model), x)
    compiled: Any = torch.compile(model, fullgraph=True, backend='aot_eager')
    for name, gradient in gradients(compiled, x).items():
        torch.testing.assert_close(gradient, expected[name.removeprefix('_orig_mod.')], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sync_batchnorm(model) -> None:
    """The conversion keeps names and output; training is for several GPUs."""
    model.eval()
    x = images()
    expected = model(x)
    names = list(model.state_dict())
    units = [name for name, m in model.named_modules() if isinstance(m, ChannelModule)]
    converted = timm.layers.convert_sync_batchnorm(model)
    assert list(converted.state_dict()) == names
    for name in units:
        unit = converted.get_submodule(name)
        assert isinstance(unit, ChannelModule)
        assert isinstance(unit.bn1, nn.SyncBatchNorm)
        assert isinstance(unit.bn2, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected)


@pytest.mark.slow
def test_amp(model) -> None:
    x = images()
    expected = model.eval()(x)  # batch statistics of a few positions would magnify every difference
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)
        value = loss(model.train(), x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    value.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


@pytest.mark.slow
def test_gradient_checkpointing(model) -> None:
    x = images()
    expected = gradients(copy.deepcopy(model), x)
    try:
        model.set_grad_checkpointing(True)
    except AssertionError:
        pytest.skip(f'{type(model).__name__} of timm has no gradient checkpointing')
    found = gradients(model, x)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, {'layer_decay': 0.75}])
def test_optimizers_of_timm_get_every_parameter_once(model, options) -> None:
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, **options)
    given = [id(p) for group in optimizer.param_groups for p in group['params']]
    assert sorted(given) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    units: list[Any] = [m for m in model.modules() if isinstance(m, ChannelModule)]
    for unit in units:
        assert id(unit.conv1.weight) in decayed
        assert id(unit.bn1.weight) not in decayed


@pytest.mark.slow
def test_another_head(model) -> None:
    model.reset_classifier(5)
    assert model(images()).shape == (4, 5)

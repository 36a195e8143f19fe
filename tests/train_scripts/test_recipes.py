"""train_scripts/*.yaml, recipes for timm's `train.py --config`: their schedules, weight decay, models and images."""

import math
import random
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from recipes import RECIPES
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from train_options import load_options, nearest

OPTIONS = load_options(nearest(timm.__version__))
IMAGENET, MODERN = 'imagenet_atac_resnet50', 'imagenet_atac_resnet50_modern'
UPDATES = 1281167 // 256  # updates per epoch of ImageNet in the authors' script and with timm's loader
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def namespace(name: str, **command_line: Any) -> Namespace:
    """Return the arguments that train.py's parser returns for a recipe and more options."""
    defaults = {dest: option['default'] for dest, option in OPTIONS.items()}
    return Namespace(**{**defaults, **RECIPES[name], **command_line})


def create(args: Namespace) -> Any:
    """Create the model with all arguments that train.py takes from its options."""
    return timm.create_model(
        args.model,
        in_chans=args.input_size[0] if args.input_size else 3,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        scriptable=args.torchscript,
        **args.model_kwargs,
    )


def create_optimizer(args: Namespace, model: nn.Module, images: int = 256) -> torch.optim.Optimizer:
    """Create the optimizer as train.py does, for `images` per update over all processes and accumulated batches."""
    if not args.lr:
        ratio = images / args.lr_base_size
        args.lr = args.lr_base * (math.sqrt(ratio) if args.lr_base_scale == 'sqrt' else ratio)
    return create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)


class Schedule:
    """The learning rates of train.py, for `images` per update and `updates` per epoch."""

    def __init__(self, name: str, images: int, updates: int) -> None:
        args = namespace(name)
        self.optimizer = create_optimizer(args, nn.Linear(2, 2), images)
        self.updates = updates
        kwargs = scheduler_kwargs(args, decreasing_metric=False)
        self.scheduler, self.epochs = create_scheduler_v2(self.optimizer, **kwargs, updates_per_epoch=updates)

    def lr(self, update: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        self.scheduler.step(update // self.updates)
        self.scheduler.step_update(update)
        (rate,) = {group['lr'] for group in self.optimizer.param_groups}
        return rate


@pytest.mark.parametrize(
    ('name', 'images', 'updates', 'lr', 'epochs'),
    [
        (IMAGENET, 128 * 2, UPDATES, 0.075, 160),
        (IMAGENET, 1024, UPDATES // 4, 0.3, 160),
        (IMAGENET, 128, UPDATES * 2, 0.0375, 160),
        (MODERN, 2048, UPDATES // 8, 5e-3, 300),
        (MODERN, 512, UPDATES // 2, 2.5e-3, 300),
        ('cifar10', 128, 390, 0.2, 400),
        ('cifar100', 128, 390, 0.2, 400),
        ('digits', 50, 20, 0.1, 8),
    ],
)
def test_peak_and_length(name: str, images: int, updates: int, lr: float, epochs: int) -> None:
    schedule = Schedule(name, images, updates)
    assert schedule.epochs == epochs
    assert schedule.scheduler.base_values == pytest.approx([lr] * len(schedule.optimizer.param_groups))


def authors_imagenet_lr(update: int) -> float:
    """Return the authors' learning rate of an update, counted from 1.

    Source: train_imagenet.py, LRSequential of gluon-cv 0.6.0.
    """
    warmup, rest = 5 * UPDATES, 155 * UPDATES
    if update < warmup:
        return 0.075 * update / (warmup - 1)
    return 0.075 * (1 + math.cos(math.pi * min(update - warmup, rest - 1) / (rest - 1))) / 2


@pytest.mark.parametrize(
    ('epoch', 'batch', 'lr'),
    [
        (0, 49, 0.000150),
        (2, 2499, 0.037501),
        (4, 4999, 0.075000),
        (5, 4999, 0.074992),
        (82, 2499, 0.037493),
        (120, 4999, 0.011111),
        (155, 49, 0.000190),
        (159, 2499, 0.000002),
    ],
)
def test_authors_formula_is_their_log(epoch: int, batch: int, lr: float) -> None:
    """The values are lines of params/resnet50_v1b_ChaATAC_2.log. A batch across two epochs belongs to the first."""
    assert authors_imagenet_lr(math.ceil(epoch * 1281167 / 256) + batch + 1) == pytest.approx(lr, abs=5.1e-7)


def test_imagenet_learning_rate() -> None:
    schedule = Schedule(IMAGENET, 256, UPDATES)
    for epoch in (0, 1, 2.5, 4.99, 5, 5.5, 82.5, 155, 159.5, 159.99):
        update = int(epoch * UPDATES)
        # timm's update 0 is their 1, and their warm-up ends one earlier: twice the change of an update of the warm-up
        assert schedule.lr(update) == pytest.approx(authors_imagenet_lr(update + 1), abs=0.151 / (5 * UPDATES)), epoch


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_learning_rate(name: str) -> None:
    schedule = Schedule(name, 128, 390)
    authors = 0.2
    for epoch in range(400):  # the loop of train_cifar.py
        if epoch in (300, 350):
            authors *= 0.1
        for update in (epoch * 390, epoch * 390 + 389):
            assert schedule.lr(update) == pytest.approx(authors), epoch


def test_modern_learning_rate() -> None:
    schedule = Schedule(MODERN, 2048, 625)
    for epoch in (0, 3, 5, 6, 150, 299):
        warmup = 1e-4 + (5e-3 - 1e-4) * epoch / 5
        cosine = 1e-6 + (5e-3 - 1e-6) * (1 + math.cos(math.pi * epoch / 300)) / 2
        for update in (epoch * 625, epoch * 625 + 624):
            assert schedule.lr(update) == pytest.approx(warmup if epoch < 5 else cosine), epoch


def test_digits_learning_rate() -> None:
    schedule = Schedule('digits', 50, 20)
    for update in (0, 10, 19, 20, 80, 159):
        warmup, cosine = 0.01 + 0.09 * update / 20, 0.05 * (1 + math.cos(math.pi * update / 160))
        assert schedule.lr(update) == pytest.approx(warmup if update < 20 else cosine), update


@pytest.mark.parametrize('name', RECIPES)
def test_optimizer(name: str) -> None:
    (group,) = create_optimizer(namespace(name), nn.Linear(2, 2, bias=False)).param_groups
    if name == MODERN:
        assert (group['betas'], group['weight_decay']) == ((0.9, 0.999), 0.02)
    else:
        assert (group['nesterov'], group['momentum'], group['weight_decay']) == (True, 0.9, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'everything'),
    [(IMAGENET, False), (MODERN, False), ('cifar10', True), ('cifar100', True), ('digits', True)],
)
def test_weight_decay(name: str, everything: bool) -> None:
    """With the authors' --no-wd on ImageNet only weights of convolutions and classifier decay; on CIFAR all do."""
    args = namespace(name)
    with torch.device('meta'):
        model = create(args)
    weights = {module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    decayed = {
        parameter
        for group in create_optimizer(args, model).param_groups
        if group['weight_decay'] == args.weight_decay
        for parameter in group['params']
    }
    assert decayed == (set(model.parameters()) if everything else weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'command_line', 'params'),
    [
        (IMAGENET, {}, 27_934_760),
        (IMAGENET, {'model': 'resnet50'}, 25_557_032),
        (MODERN, {'model': 'resnet50'}, 25_557_032),
        (MODERN, {'model': 'seresnet50'}, 28_088_024),
        (MODERN, {'model': 'ge_plus_resnet50'}, 33_637_592),
        (MODERN, {'model': 'aa_resnet50'}, 25_777_392),
        (MODERN, {'model': 'fa_resnet50'}, 18_007_344),
        (MODERN, {'model': 'aa_resnet50', 'model_kwargs': {'zero_init_last': True, 'img_size': 160}}, 25_773_712),
    ],
)
def test_imagenet_models(name: str, command_line: dict[str, Any], params: int) -> None:
    model = create(namespace(name, **command_line))
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    assert [block.bn3.weight.abs().max().item() for block in blocks] == [0] * 16  # --last-gamma
    rate = 0.05 if name == MODERN else 0.0
    assert getattr(blocks[-1].drop_path, 'drop_prob', 0.0) == pytest.approx(rate)


@pytest.mark.parametrize(
    ('name', 'command_line', 'params'),
    [
        ('cifar10', {}, 306_858),
        ('cifar10', {'model': 'atac_resnet8_cifar'}, 89_578),
        ('cifar10', {'model': 'resnet8_cifar'}, 77_850),
        ('cifar100', {}, 312_708),
        ('cifar100', {'model': 'resnet8_cifar.cifar100', 'model_kwargs': {'act_layer': 'silu'}}, 83_700),
        ('cifar100', {'model': 'resnet8_cifar.cifar100', 'model_kwargs': {'attn_layer': 'local_se'}}, None),
        ('digits', {}, None),
        ('digits', {'model': 'resnet14_cifar'}, None),
    ],
)
def test_cifar_models(name: str, command_line: dict[str, Any], params: int | None) -> None:
    args = namespace(name, **command_line)
    model = create(args)
    assert params in (None, sum(parameter.numel() for parameter in model.parameters()))
    assert model(torch.zeros(2, *args.input_size)).shape == (2, args.num_classes)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUTHORS_MEAN = tuple(pixel / 255 for pixel in (123.68, 116.779, 103.939))
AUTHORS_STD = tuple(pixel / 255 for pixel in (58.393, 57.12, 57.375))


@pytest.mark.parametrize(
    ('name', 'model', 'config'),
    [
        (IMAGENET, 'resnet50', ((3, 224, 224), 'bilinear', AUTHORS_MEAN, AUTHORS_STD, 0.875)),
        (MODERN, 'atac_resnet50', ((3, 224, 224), 'bicubic', IMAGENET_MEAN, IMAGENET_STD, 0.95)),
        (MODERN, 'seresnet50', ((3, 224, 224), 'bicubic', IMAGENET_MEAN, IMAGENET_STD, 0.95)),
        (MODERN, 'ge_plus_resnet50', ((3, 224, 224), 'bicubic', IMAGENET_MEAN, IMAGENET_STD, 0.95)),
        (MODERN, 'aa_resnet50', ((3, 224, 224), 'bicubic', IMAGENET_MEAN, IMAGENET_STD, 0.95)),
        (MODERN, 'fa_resnet50', ((3, 224, 224), 'bicubic', IMAGENET_MEAN, IMAGENET_STD, 0.95)),
        ('cifar10', 'resnet8_cifar', ((3, 32, 32), 'bilinear', CIFAR_MEAN, CIFAR_STD, 1.0)),
        ('cifar100', 'resnet8_cifar.cifar100', ((3, 32, 32), 'bilinear', CIFAR_MEAN, CIFAR_STD, 1.0)),
        ('digits', 'resnet8_cifar', ((1, 16, 16), 'bilinear', (0.0,), (1.0,), 1.0)),
    ],
)
def test_data_config(name: str, model: str, config: tuple) -> None:
    """The data configuration is the recipe's, whatever the model's is."""
    own: Any = timm.models.get_pretrained_cfg(model)
    found = resolve_data_config(vars(namespace(name)), pretrained_cfg=own.to_dict())
    assert tuple(found[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')) == config


def crops(image: np.ndarray, count: int, **command_line: Any) -> list[np.ndarray]:
    """Return training images that the CIFAR recipe makes from one image, without flips."""
    args = namespace('cifar10', hflip=0.0, **command_line)
    transform = create_transform(
        args.input_size,
        is_training=True,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        use_prefetcher=True,
    )
    random.seed(0)
    return [transform(Image.fromarray(image)).permute(1, 2, 0).numpy() for _ in range(count)]


def test_padded_cifar_is_cropped_as_the_authors() -> None:
    """`--scale 0.64 0.64` crops padded training images at each of the 81 positions, and does not scale them."""
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    expected = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    assert {crop.tobytes() for crop in crops(padded, 1000, scale=[0.64, 0.64])} == expected


def test_cifar_crops_leave_as_much_as_the_authors() -> None:
    gradient = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (32, 32, 3)).copy()
    sides = {round(float(crop[0, -1, 0]) - float(crop[0, 0, 0])) // 8 + 1 for crop in crops(gradient, 300)}
    assert sides == {28, 29, 30, 31, 32}

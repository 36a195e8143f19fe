"""What a model card says of a network's units: their names, tags, papers and citations."""

from typing import Any, NamedTuple

from ..models.aa_resnet import AugmentedConv2d
from ..models.fa_resnet import LocalAttention2d
from ..units.atac import ATAC, LocalSE, NiN, SEActivation
from ..units.gather_excite import GatherExcite
from ..units.sine import Sine
from ..units.xunit import XUnit

__all__ = ['ATTENTION_AS_ACTIVATION', 'Unit', 'units_of']


class Unit(NamedTuple):
    """A kind of layer of this package.

    Attributes:
        label: Its name in the text of a card.
        tag: Its tag on the Hub.
        title, url: Paper that describes it.
        key, authors, venue, year: For the citation of the paper.
    """

    label: str
    tag: str
    title: str
    url: str
    key: str
    authors: str
    venue: str
    year: int

    @property
    def citation(self) -> str:
        """The BibTeX entry of the paper."""
        fields = {'title': self.title, 'author': self.authors, 'booktitle': self.venue, 'year': self.year}
        lines = ',\n'.join(f'  {name:9} = {{{value}}}' for name, value in fields.items())
        return f'@inproceedings{{{self.key},\n{lines}\n}}'


_NEURIPS = 'Advances in Neural Information Processing Systems (NeurIPS)'
ATTENTION_AS_ACTIVATION = Unit(
    'ATAC',
    'atac',
    'Attention as Activation',
    'https://arxiv.org/abs/2007.07729',
    'dai2020attention',
    'Dai, Yimian and Oehmcke, Stefan and Gieseke, Fabian and Wu, Yiquan and Barnard, Kobus',
    'International Conference on Pattern Recognition (ICPR)',
    2020,
)
# subclasses first: the first class that fits names a layer
_BY_CLASS: dict[type, Unit] = {
    SEActivation: ATTENTION_AS_ACTIVATION._replace(label='SEActivation', tag='se_act'),
    LocalSE: ATTENTION_AS_ACTIVATION._replace(label='LocalSENet', tag='local_se'),
    NiN: ATTENTION_AS_ACTIVATION._replace(label='NiN', tag='nin'),
    ATAC: ATTENTION_AS_ACTIVATION,
    XUnit: Unit(
        'xUnit',
        'xunit',
        'xUnit: Learning a Spatial Activation Function for Efficient Image Restoration',
        'https://arxiv.org/abs/1711.06445',
        'kligvasser2018xunit',
        'Kligvasser, Idan and Rott Shaham, Tamar and Michaeli, Tomer',
        'Conference on Computer Vision and Pattern Recognition (CVPR)',
        2018,
    ),
    Sine: Unit(
        'sine',
        'siren',
        'Implicit Neural Representations with Periodic Activation Functions',
        'https://arxiv.org/abs/2006.09661',
        'sitzmann2020implicit',
        'Sitzmann, Vincent and Martel, Julien and Bergman, Alexander and Lindell, David and Wetzstein, Gordon',
        _NEURIPS,
        2020,
    ),
    GatherExcite: Unit(
        'Gather-Excite',
        'gather-excite',
        'Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks',
        'https://arxiv.org/abs/1810.12348',
        'hu2018gather',
        'Hu, Jie and Shen, Li and Albanie, Samuel and Sun, Gang and Vedaldi, Andrea',
        _NEURIPS,
        2018,
    ),
    AugmentedConv2d: Unit(
        'attention-augmented convolution',
        'attention-augmented',
        'Attention Augmented Convolutional Networks',
        'https://arxiv.org/abs/1904.09925',
        'bello2019attention',
        'Bello, Irwan and Zoph, Barret and Vaswani, Ashish and Shlens, Jonathon and Le, Quoc V.',
        'International Conference on Computer Vision (ICCV)',
        2019,
    ),
    LocalAttention2d: Unit(
        'local self-attention',
        'local-self-attention',
        'Stand-Alone Self-Attention in Vision Models',
        'https://arxiv.org/abs/1906.05909',
        'ramachandran2019stand',
        'Ramachandran, Prajit and Parmar, Niki and Vaswani, Ashish and Bello, Irwan and Levskaya, Anselm and '
        'Shlens, Jonathon',
        _NEURIPS,
        2019,
    ),
}


def units_of(model: Any) -> list[Unit]:
    """Return the kinds of units of this package in a model, each once, in the order of its layers."""
    found = (next((unit for cls, unit in _BY_CLASS.items() if isinstance(m, cls)), None) for m in model.modules())
    return list(dict.fromkeys(unit for unit in found if unit is not None))

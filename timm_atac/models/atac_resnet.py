"""ATAC-ResNets for ImageNet: timm's ResNets with ATAC inside the residual branches of chosen stages.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import LayerType
from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..units.checks import check_stages
from ..units.create import create_activation, init_weights
from ..weights import published
from ._build import build_model
from ._open_atac import OpenAtacWeights
from ._stages import StageBlock, imagenet_cfg

__all__ = ['AtacBasicBlock', 'AtacBottleneck', 'AtacResNet']


class AtacBasicBlock(BasicBlock):
    """timm's `BasicBlock` with the unit `unit_layer(channels)` as `act1`. The activation after the addition stays."""

    def __init__(self, *args: Any, unit_layer: Callable[..., nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act1 = _create_unit(unit_layer, self.conv1, kwargs)


class AtacBottleneck(Bottleneck):
    """timm's `Bottleneck` with units as `act1` and `act2`. The activation after the addition stays."""

    def __init__(self, *args: Any, unit_layer: Callable[..., nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act1 = _create_unit(unit_layer, self.conv1, kwargs)
        self.act2 = _create_unit(unit_layer, self.conv2, kwargs)


def _create_unit(unit_layer: Callable[..., nn.Module], conv: nn.Conv2d, block_args: dict[str, Any]) -> nn.Module:
    """Create a unit for the output of a convolution, with the norm layer, device and dtype of the block."""
    options = {name: block_args.get(name) for name in ('norm_layer', 'device', 'dtype')}
    return unit_layer(conv.out_channels, **options)


_UNIT_BLOCKS: dict[type, type] = {BasicBlock: AtacBasicBlock, Bottleneck: AtacBottleneck}


class AtacResNet(OpenAtacWeights, ResNet):
    """timm's ResNet with ATAC in place of the activations inside the residual branches of chosen stages.

    The activations of the stem and after each addition are ReLUs.

    timm's ResNets apply these ReLUs and add shortcuts in place. PyTorch forbids both beside full backward hooks, as
    Opacus and Captum register them on all modules. For such hooks, set `inplace = False` on each module that has it and
    `drop_path = torch.clone` on each `BasicBlock` and `Bottleneck` of a network without stochastic depth. The CIFAR
    networks need no change, unless they have an attention module of timm: set its `inplace = False`.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: Blocks in each of the four stages.
        atac_stages: Stages whose blocks get the unit, from 1 to 4. In the paper's network these are the last two.
        act_layer: The unit: 'atac', 'se_act', 'nin', another activation, or a `partial` with options.
        rd_ratio: Width of the units' bottleneck over their channels, None for the default of the unit (0.5).
        **kwargs: Arguments of timm's `ResNet`. A `norm_layer` is used inside the units too. `zero_init_last` sets the
            last norm of each block to zero.

    Raises:
        ValueError: `block` is another one, a stage of `atac_stages` does not exist, or `act_layer` does not take the
            given `rd_ratio`.

    Source:
        ATAC-ResNet-50 of the paper's Table 4; placement and initialisation as in the authors' `ResNet50_v1bATAC`.
    """

    open_atac_layout = 'imagenet'

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        atac_stages: Sequence[int] = (3, 4),
        act_layer: LayerType = 'atac',
        rd_ratio: float | None = None,
        **kwargs,
    ) -> None:
        if block not in _UNIT_BLOCKS:
            raise ValueError(f"block={block!r}: expected timm's BasicBlock or Bottleneck of timm.models.resnet.")
        stages = check_stages(atac_stages, num_stages=len(layers))
        unit_layer = partial(create_activation, act_layer, rd_ratio=rd_ratio)
        unit_block = StageBlock(_UNIT_BLOCKS[block], unit_layer=unit_layer)
        blocks = tuple(unit_block if stage in stages else block for stage in range(1, len(layers) + 1))
        super().__init__(cast(Any, blocks), tuple(layers), **kwargs)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise as the authors do. With `zero_init_last`, each block starts as the identity."""
        init_weights(self, zero_init_last)


def _create_atac_resnet(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> AtacResNet:
    """Create a variant with its own arguments, which those of the user (`kwargs`) override."""
    return build_model(AtacResNet, variant, pretrained, **{**model_args, **kwargs})


_cfg = partial(imagenet_cfg, paper_ids='arXiv:2007.07729', paper_name='Attention as Activation')

# `_register.py` registers the entry function named by each key.
default_cfgs = generate_default_cfgs(
    {
        'atac_resnet18.untrained': _cfg(),
        'atac_resnet34.untrained': _cfg(),
        'atac_resnet50.open_atac_in1k': _cfg(
            **published.cfg_fields('atac_resnet50.open_atac_in1k'),
            mean=(123.68 / 255, 116.779 / 255, 103.939 / 255),
            std=(58.393 / 255, 57.12 / 255, 57.375 / 255),
            license='none-stated',
            description=(
                "The authors' weights, by their log 21.41 % top-1 and 6.03 % top-5 error on ImageNet-1k at 224 px. "
                'Their repository states no licence.'
            ),
        ),
        'atac_resnet50.untrained': _cfg(),
        'atac_resnet50_full.untrained': _cfg(),
        'atac_resnet101.untrained': _cfg(),
        'atac_resnext50_32x4d.untrained': _cfg(),
    }
)


def atac_resnet18(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ResNet-18 with ATAC as the first activation of each block in stages 3 and 4."""
    return _create_atac_resnet('atac_resnet18', pretrained, kwargs, block=BasicBlock, layers=(2, 2, 2, 2))


def atac_resnet34(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ResNet-34 with ATAC as the first activation of each block in stages 3 and 4."""
    return _create_atac_resnet('atac_resnet34', pretrained, kwargs, block=BasicBlock, layers=(3, 4, 6, 3))


def atac_resnet50(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ATAC-ResNet-50 of the paper's Table 4: ATAC as the first two activations of each block in stages 3 and 4."""
    return _create_atac_resnet('atac_resnet50', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3))


def atac_resnet50_full(pretrained: bool = False, **kwargs) -> AtacResNet:
    """The fully attentional ResNet-50: ATAC as the first two activations of every block."""
    return _create_atac_resnet(
        'atac_resnet50_full', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3), atac_stages=(1, 2, 3, 4)
    )


def atac_resnet101(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ResNet-101 with ATAC as the first two activations of each block in stages 3 and 4."""
    return _create_atac_resnet('atac_resnet101', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 23, 3))


def atac_resnext50_32x4d(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ResNeXt-50 32x4d with ATAC as the first two activations of each block in stages 3 and 4."""
    return _create_atac_resnet(
        'atac_resnext50_32x4d', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4
    )

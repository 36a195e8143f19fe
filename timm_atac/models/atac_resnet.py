"""ATAC-ResNets for ImageNet: timm's ResNet with attentional activations in the residual branches of chosen stages.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import LayerType
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..units.checks import check_stages
from ..units.create import create_activation, init_weights
from ..weights import published
from ._open_atac import OpenAtacWeights
from ._stages import StageBlock, imagenet_cfg

__all__ = ['AtacBasicBlock', 'AtacBottleneck', 'AtacResNet']


class AtacBasicBlock(BasicBlock):
    """timm's `BasicBlock` with `unit_layer(channels)` for `act1`; the ReLU after the addition stays."""

    def __init__(self, *args: Any, unit_layer: Callable[..., nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = {name: kwargs.get(name) for name in ('norm_layer', 'device', 'dtype')}
        self.act1 = unit_layer(self.conv1.out_channels, **options)


class AtacBottleneck(Bottleneck):
    """timm's `Bottleneck` with `unit_layer(channels)` for `act1` and `act2`; the ReLU after the addition stays."""

    def __init__(self, *args: Any, unit_layer: Callable[..., nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = {name: kwargs.get(name) for name in ('norm_layer', 'device', 'dtype')}
        self.act1 = unit_layer(self.conv1.out_channels, **options)
        self.act2 = unit_layer(self.conv2.out_channels, **options)


_UNIT_BLOCKS: dict[type, type] = {BasicBlock: AtacBasicBlock, Bottleneck: AtacBottleneck}


class AtacResNet(OpenAtacWeights, ResNet):
    """timm's ResNet whose blocks have ATAC for the activations inside the residual branch, in chosen stages.

    The stem's activation and the one after each addition are ReLUs.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: Blocks in each of the four stages.
        atac_stages: Stages, of 1 to 4, whose blocks get the unit. The paper's network has it in the last two.
        act_layer: The unit: 'atac', 'se_act', 'nin', another activation, or a `partial` with options of its own.
        rd_ratio: Width of the units' bottleneck over their channels, None for the unit's own (0.5).
        zero_init_last: Initialise the last norm of each block to zero.
        **kwargs: Arguments of timm's `ResNet`; a `norm_layer` goes into the units as well.

    Raises:
        ValueError: Another block, `atac_stages` names a stage there is not, or `rd_ratio` goes with an `act_layer` that
            takes none.

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
        """Initialise as the authors do; `zero_init_last` makes each block start as the identity."""
        init_weights(self, zero_init_last)


def _create_atac_resnet(variant: str, pretrained: bool = False, **kwargs) -> AtacResNet:
    return build_model_with_cfg(AtacResNet, variant, pretrained, **kwargs)


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
    """ResNet-18 with ATAC for the first activation of the blocks of stages 3 and 4."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_atac_resnet('atac_resnet18', pretrained, **dict(model_args, **kwargs))


def atac_resnet34(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ResNet-34 with ATAC for the first activation of the blocks of stages 3 and 4."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_atac_resnet('atac_resnet34', pretrained, **dict(model_args, **kwargs))


def atac_resnet50(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ATAC-ResNet-50 of the paper's Table 4: ATAC for the first two activations of the blocks of stages 3 and 4."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_atac_resnet('atac_resnet50', pretrained, **dict(model_args, **kwargs))


def atac_resnet50_full(pretrained: bool = False, **kwargs) -> AtacResNet:
    """The fully attentional ResNet-50: ATAC for the first two activations of every block."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), atac_stages=(1, 2, 3, 4))
    return _create_atac_resnet('atac_resnet50_full', pretrained, **dict(model_args, **kwargs))


def atac_resnet101(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ResNet-101 with ATAC for the first two activations of the blocks of stages 3 and 4."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_atac_resnet('atac_resnet101', pretrained, **dict(model_args, **kwargs))


def atac_resnext50_32x4d(pretrained: bool = False, **kwargs) -> AtacResNet:
    """ResNeXt-50 32x4d with ATAC for the first two activations of the blocks of stages 3 and 4."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_atac_resnet('atac_resnext50_32x4d', pretrained, **dict(model_args, **kwargs))

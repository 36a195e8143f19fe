"""The paper's CIFAR networks: pre-activation ResNets with three stages of b blocks, and with ReLU, ATAC or other units.

Papers:
* `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)
* `Identity Mappings in Deep Residual Networks` - https://arxiv.org/abs/1603.05027 (the order of the layers)
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerType, calculate_drop_path_rates, create_attn, create_classifier, get_norm_layer
from timm.models import checkpoint_seq, generate_default_cfgs

from .._timm import feature_take_indices
from ..units.atac import LocalSE
from ..units.checks import check_stages
from ..units.create import create_activation, init_weights
from ..weights.published import cfg_fields
from ._build import build_model
from ._open_atac import OpenAtacWeights

__all__ = ['CifarResNet', 'PreActBasicBlock']


class PreActBasicBlock(nn.Module):
    """Residual block: norm, activation and 3x3 convolution, twice. The shortcut starts before the first norm.

    Args:
        in_chs: Channels of the input (B, in_chs, H, W).
        out_chs: Channels of the output (B, out_chs, H / stride, W / stride).
        stride: Stride of the first convolution and of the shortcut.
        act_layer: Activation, as in `timm_atac.units.create.create_activation`.
        rd_ratio: Width of the activations' bottleneck over their channels, None for their default.
        norm_layer: Normalisation layer.
        attn_layer: Attention module at the end of the residual branch, None for none.
        drop_path_rate: Stochastic depth rate of the block.

    Source:
        The authors' `ResBlockV2ATAC`. The shortcut is a 1x1 convolution without norm if the channels change, else the
        identity.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        act_layer: LayerType = nn.ReLU,
        rd_ratio: float | None = None,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        attn_layer: LayerType | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.bn1 = norm_layer(in_chs, **dd)
        self.act1 = create_activation(act_layer, in_chs, rd_ratio, norm_layer, **dd)
        self.conv1 = nn.Conv2d(in_chs, out_chs, kernel_size=3, stride=stride, padding=1, bias=False, **dd)
        self.bn2 = norm_layer(out_chs, **dd)
        self.act2 = create_activation(act_layer, out_chs, rd_ratio, norm_layer, **dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, kernel_size=3, padding=1, bias=False, **dd)
        self.attn = create_attn(attn_layer, out_chs, **dd) or nn.Identity()
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.downsample = (
            nn.Conv2d(in_chs, out_chs, kernel_size=1, stride=stride, bias=False, **dd)
            if in_chs != out_chs
            else nn.Identity()
        )

    def zero_init_last(self) -> None:
        """Set the last convolution to zero, so that the block starts as its shortcut."""
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.conv1(x)
        x = self.bn2(x)
        x = self.act2(x)
        x = self.conv2(x)
        x = self.attn(x)
        x = self.drop_path(x)
        return x + shortcut


class CifarResNet(OpenAtacWeights, nn.Module):
    """Pre-activation ResNet for 32x32 images: (B, in_chans, 32, 32) -> (B, num_classes).

    Its layers are a norm of the images without weights (the data norm), a 3x3 convolution, three stages of strides 1, 2
    and 2, a norm, an activation, an average pool and a classifier.

    Args:
        layers: Blocks in each of the three stages. The paper's networks have b = 1..4 in all of them.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: Global pooling type.
        channels: Channels of the first convolution and of the stages.
        act_layer: Activation: 'relu', another name of timm, 'atac', 'se_act', 'nin', 'xunit', or a `partial` with
            options.
        atac_stages: Stages with `act_layer`: 1 to 3, and 4 for the last activation. The others have ReLU.
        rd_ratio: Width of the activations' bottleneck over their channels, None for their default (0.5).
        norm_layer: Normalisation layer of the blocks and inside the activations.
        data_norm_layer: Data norm, created with `affine=False`: a name of timm, a class or a `partial`, '' for none.
            None is 'batchnorm2d', also with another `norm_layer`, because saved networks have the statistics of that
            data norm. In training, the logits of an image then depend on the other images of the batch, and a warning
            says so. Differentially private training needs '' or 'groupnorm1'.
        attn_layer: Attention module at the end of each residual branch: 'local_se' or as in timm.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last block. It rises linearly from 0.
        zero_init_last: Set the last convolution of each block to zero (not in the paper).

    Raises:
        ValueError: A stage of `atac_stages` does not exist, or `act_layer` does not take the given `rd_ratio`.

    Source:
        The network of the paper's Tables 2 and 3: the authors' `ResNet20V2ATAC`, with their initialisation.
    """

    open_atac_layout = 'cifar'

    def __init__(
        self,
        layers: Sequence[int] = (3, 3, 3),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        channels: Sequence[int] = (16, 16, 32, 64),
        act_layer: LayerType = 'relu',
        atac_stages: Sequence[int] = (1, 2, 3, 4),
        rd_ratio: float | None = None,
        norm_layer: LayerType = nn.BatchNorm2d,
        data_norm_layer: LayerType | None = None,
        attn_layer: LayerType | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        stages = check_stages(atac_stages, num_stages=len(layers) + 1)
        norm: Any = get_norm_layer(norm_layer)
        attn_layer = partial(LocalSE, norm_layer=norm) if attn_layer == 'local_se' else attn_layer
        acts = [
            dict(act_layer=act_layer, rd_ratio=rd_ratio) if stage in stages else dict(act_layer=nn.ReLU)
            for stage in range(1, len(layers) + 2)
        ]

        data_norm: Any = nn.BatchNorm2d if data_norm_layer is None else get_norm_layer(data_norm_layer)
        self.data_bn = nn.Identity() if data_norm is None else data_norm(in_chans, affine=False, **dd)
        self.conv1 = nn.Conv2d(in_chans, channels[0], kernel_size=3, padding=1, bias=False, **dd)
        self.feature_info: list[dict[str, Any]] = []
        self.stages = nn.Sequential()
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        in_chs = channels[0]
        for i, (depth, out_chs) in enumerate(zip(layers, channels[1:], strict=True)):
            blocks = [
                PreActBasicBlock(
                    in_chs if j == 0 else out_chs,
                    out_chs,
                    stride=2 if i > 0 and j == 0 else 1,
                    norm_layer=norm,
                    attn_layer=attn_layer,
                    drop_path_rate=drop_path_rates[i][j],
                    **acts[i],
                    **dd,
                )
                for j in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=out_chs, reduction=2**i, module=f'stages.{i}'))
            in_chs = out_chs

        self.num_features = in_chs
        self.norm = norm(in_chs, **dd)
        if data_norm_layer is None and not isinstance(self.norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)):
            warnings.warn(
                f'norm_layer={norm_layer!r}, data_norm_layer=None: the norm of the images is still a BatchNorm. In '
                f'training, the logits of an image then depend on the other images of the batch. Pass '
                f"data_norm_layer='' for no such norm, 'groupnorm1' for one that does not mix images, or 'batchnorm2d' "
                f'to keep this one.',
                stacklevel=2,
            )
        self.act = create_activation(channels=in_chs, norm_layer=norm, **acts[-1], **dd)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialise as the authors do. With `zero_init_last`, each block starts as its shortcut."""
        init_weights(self, zero_init_last)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions that group the parameters by depth."""
        return dict(
            stem=r'^data_bn|^conv1',
            blocks=[
                (r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)', None),
                (r'^norm|^act', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier; it is an identity if there is none."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Global pooling type, None to keep it.
        """
        dd: dict[str, Any] = {'device': self.conv1.weight.device, 'dtype': self.conv1.weight.dtype}
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = cast(Any, self).global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the network and return the outputs of the stages too.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Indices of the stages, an integer n for the last n stages, or None for all.
            norm: Apply the final norm and activation to the output of the last stage.
            stop_early: Stop after the last stage of `indices`.
            output_fmt: 'NCHW'.
            intermediates_only: Return only the outputs of the stages.

        Returns:
            The final features and the list of stage outputs (B, C, H / reduction, W / reduction), or only the list.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        last = len(self.feature_info) - 1
        take_indices, max_index = feature_take_indices(last + 1, indices)
        intermediates = []

        x = self.data_bn(x)
        x = self.conv1(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a Sequential
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i in take_indices:
                intermediates.append(self.act(self.norm(x)) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if len(stages) == last + 1:
            x = self.act(self.norm(x))
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers after the last of the given stages.

        Args:
            indices: Indices of the stages, or an integer n for the last n stages.
            prune_norm: Remove the final norm and activation too.
            prune_head: Remove the classifier too.

        Returns:
            The indices of the stages.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        prune_end = max_index < len(self.feature_info) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:  # their width is the one of the last stage
            self.norm = nn.Identity()
            self.act = nn.Identity()
        if prune_end:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Run all layers before the pooling: (B, in_chans, H, W) -> (B, C, H / 4, W / 4)."""
        x = self.data_bn(x)
        x = self.conv1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        x = self.norm(x)
        return self.act(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify: (B, C, H, W) -> (B, num_classes), or with `pre_logits` (B, head_hidden_size)."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Adapt the statistics of `data_bn` to the model's number of input channels.

    timm does so for the weight of the first convolution. One channel gets the mean over the checkpoint's channels; for
    more channels than in the checkpoint, these are repeated.
    """
    in_chans = cast(int, model.in_chans)
    out = dict(state_dict)
    for name in ('data_bn.running_mean', 'data_bn.running_var'):
        stat = out.get(name)
        if stat is not None and len(stat) != in_chans:
            repeated = stat.repeat(math.ceil(in_chans / len(stat)))[:in_chans]
            out[name] = stat.mean(0, keepdim=True) if in_chans == 1 else repeated
    return out


def _create_cifar_resnet(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> CifarResNet:
    """Create a variant with its own arguments, which those of the user (`kwargs`) override."""
    return build_model(
        CifarResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2), flatten_sequential=True),
        **{**model_args, **kwargs},
    )


def _cfg(url: str = '', **kwargs) -> dict[str, Any]:
    return {
        'url': url,
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0.4914, 0.4822, 0.4465),
        'std': (0.2023, 0.1994, 0.2010),
        'first_conv': 'conv1',
        'classifier': 'fc',
        'paper_ids': 'arXiv:2007.07729',
        'paper_name': 'Attention as Activation',
        **kwargs,
    }


_CIFAR10_LABELS = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')

# `_register.py` registers the entry function named by each key.
default_cfgs = generate_default_cfgs(
    {
        f'{arch}.{tag}': _cfg(num_classes=num_classes, label_names=labels, **cfg_fields(f'{arch}.{tag}'))
        for arch in (
            'resnet8_cifar',
            'resnet14_cifar',
            'resnet20_cifar',
            'resnet26_cifar',
            'resnet32_cifar',
            'atac_resnet8_cifar',
            'atac_resnet14_cifar',
            'atac_resnet20_cifar',
            'atac_resnet26_cifar',
        )
        for tag, num_classes, labels in (('cifar10', 10, _CIFAR10_LABELS), ('cifar100', 100, None))
    }
)


def resnet8_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The paper's network with b = 1 and ReLU, or another `act_layer`."""
    return _create_cifar_resnet('resnet8_cifar', pretrained, kwargs, layers=(1, 1, 1))


def resnet14_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The paper's network with b = 2 and ReLU, or another `act_layer`."""
    return _create_cifar_resnet('resnet14_cifar', pretrained, kwargs, layers=(2, 2, 2))


def resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The paper's network with b = 3 and ReLU, or another `act_layer`."""
    return _create_cifar_resnet('resnet20_cifar', pretrained, kwargs, layers=(3, 3, 3))


def resnet26_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The paper's network with b = 4 and ReLU, or another `act_layer`."""
    return _create_cifar_resnet('resnet26_cifar', pretrained, kwargs, layers=(4, 4, 4))


def resnet32_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The network with b = 5. It is in the authors' figure on activation units, but in no table of the paper."""
    return _create_cifar_resnet('resnet32_cifar', pretrained, kwargs, layers=(5, 5, 5))


def atac_resnet8_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The paper's network with b = 1 and ATAC as every activation."""
    return _create_cifar_resnet('atac_resnet8_cifar', pretrained, kwargs, layers=(1, 1, 1), act_layer='atac')


def atac_resnet14_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The paper's network with b = 2 and ATAC as every activation."""
    return _create_cifar_resnet('atac_resnet14_cifar', pretrained, kwargs, layers=(2, 2, 2), act_layer='atac')


def atac_resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The paper's network with b = 3 and ATAC as every activation."""
    return _create_cifar_resnet('atac_resnet20_cifar', pretrained, kwargs, layers=(3, 3, 3), act_layer='atac')


def atac_resnet26_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """The paper's network with b = 4 and ATAC as every activation."""
    return _create_cifar_resnet('atac_resnet26_cifar', pretrained, kwargs, layers=(4, 4, 4), act_layer='atac')

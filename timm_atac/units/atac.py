"""Attention as activation: the ATAC unit and the units the paper compares it with, in plain PyTorch.

This file is the reference for everything else in the package.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)

An activation and an attention module are both a gate, `x' = G(x) * x`. All units here share one bottleneck of two 1x1
convolutions and differ in where it looks and in what is done with its output:

| unit           | gate                                   | in place of              |
| -------------- | -------------------------------------- | ------------------------ |
| `ATAC`         | local, from the channels of a position | each ReLU                |
| `SEActivation` | global, from the channels' means       | each ReLU                |
| `NiN`          | none                                   | each ReLU                |
| `LocalSE`      | local, as `ATAC`                       | an SE module, ReLUs stay |
"""

import math
from numbers import Integral, Real

import torch
import torch.nn as nn
from timm.layers import LayerType, create_act_layer, get_norm_layer

from .deferred import ChannelModule
from .xunit import XUnit

__all__ = ['ACTIVATIONS', 'ATAC', 'LocalSE', 'NiN', 'SEActivation']


def init_weight_(weight: torch.Tensor) -> None:
    """He initialisation as the authors have it (MXNet's `MSRAPrelu`): fan averaged, for a PReLU of slope 0.25.

    Args:
        weight: Weight of a convolution or a linear layer, changed in place.
    """
    nn.init.xavier_normal_(weight, gain=nn.init.calculate_gain('leaky_relu', 0.25))


def get_rd_channels(channels: int, rd_ratio: float) -> int:
    """Width of the bottleneck, `max(1, channels * rd_ratio)` rounded down.

    Raises:
        ValueError: `channels` is not an integer >= 1, or `rd_ratio` is not in (0, 1].
    """
    if not isinstance(channels, Integral) or isinstance(channels, bool) or channels < 1:
        raise ValueError(f'channels={channels!r}: expected an integer >= 1, the width C of the (B, C, H, W) input.')
    if not isinstance(rd_ratio, Real) or not 0 < rd_ratio <= 1:
        raise ValueError(
            f"rd_ratio={rd_ratio!r}: expected a number in (0, 1], the bottleneck's share of the channels "
            f"(the paper's r = 2 is rd_ratio=0.5)."
        )
    return max(1, math.floor(channels * rd_ratio + 1e-6))  # a ratio of 1 / r is seldom exact


class ChannelBottleneck(ChannelModule):
    """What all units share: `BN2(conv2(act(BN1(conv1(x)))))`, 1x1 convolutions C -> max(1, C * rd_ratio) -> C.

    The names `conv1`, `bn1`, `conv2`, `bn2` are those of published weights and stay.

    Args:
        channels: Width C of the input. Without it, the unit is completed when it is put into a module: it takes width,
            layout, device and dtype from the layers around it (`timm_atac.units.deferred`).
        rd_ratio: Width of the bottleneck over C.
        act_layer: Activation inside the bottleneck, None for none.
        norm_layer: Normalisation after each convolution, None for none.
        inplace: Accepted because timm passes it to activations. The input is never changed.
        input_fmt: Layout of the input: 'NCHW' is (B, C, H, W), 'NCL' (B, C, ...), 'NHWC' and 'NLC' are (B, ..., C).

    Raises:
        ValueError: `channels` is not an integer >= 1, `rd_ratio` is not in (0, 1], or `input_fmt` is not one of the
            four. Of a unit that was put where its width cannot be known: from any use of its parameters.
    """

    def __init__(
        self,
        channels: int | None = None,
        rd_ratio: float = 0.5,
        act_layer: LayerType | None = nn.ReLU,
        norm_layer: LayerType | None = nn.BatchNorm2d,
        inplace: bool = False,
        input_fmt: str = 'NCHW',
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(input_fmt)
        get_rd_channels(1, rd_ratio)  # an error here, where it was given
        self.rd_ratio = rd_ratio
        self._act_layer = act_layer
        self._norm_layer = get_norm_layer(norm_layer) or _no_norm
        self.initialize_parameters(channels, device=device, dtype=dtype)

    def build(self, channels: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        rd_channels = get_rd_channels(channels, self.rd_ratio)
        self.conv1 = nn.Conv2d(channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.bn1 = self._norm_layer(rd_channels, **dd)
        self.act = create_act_layer(self._act_layer, inplace=True) or nn.Identity()
        self.act.to(**dd)  # PReLU has a parameter
        self.conv2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.bn2 = self._norm_layer(channels, **dd)
        init_weight_(self.conv1.weight)
        init_weight_(self.conv2.weight)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act(x)
        x = self.conv2(x)
        return self.bn2(x)


class ATAC(ChannelBottleneck):
    """Attentional activation: `x * sigmoid(BN2(conv2(relu(BN1(conv1(x))))))`, (B, C, H, W) -> (B, C, H, W).

    A local channel attention in place of an activation: the gate of a position is computed from the channels at that
    position alone.

    Args:
        channels: Width C of the input. Without it, as `act_layer=ATAC` in timm's models, the unit is completed when it
            is put into a module: it takes width, layout, device and dtype from the layers around it.
        rd_ratio: Width of the bottleneck over C (the paper's 1 / r, r = 2).
        act_layer: Activation inside the bottleneck, None for none.
        norm_layer: Normalisation after each convolution, None for none.
        gate_layer: Squashes the bottleneck's output to the gate, None for none.
        inplace: Accepted because timm passes it to activations. The input is never changed.
        input_fmt: Layout of the input: 'NCHW' is (B, C, H, W), 'NCL' (B, C, ...), 'NHWC' and 'NLC' are (B, ..., C).

    Raises:
        ValueError: `channels` is not an integer >= 1, `rd_ratio` is not in (0, 1], or `input_fmt` is not one of the
            four; an input of another width. Of a unit that was put where its width cannot be known: from any use of
            its parameters.

    Source:
        Section III of the paper; the authors' `ChaATAC`.
    """

    def __init__(
        self,
        channels: int | None = None,
        rd_ratio: float = 0.5,
        act_layer: LayerType | None = nn.ReLU,
        norm_layer: LayerType | None = nn.BatchNorm2d,
        gate_layer: LayerType | None = nn.Sigmoid,
        inplace: bool = False,
        input_fmt: str = 'NCHW',
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, rd_ratio, act_layer, norm_layer, inplace, input_fmt, **dd)
        self.gate = (create_act_layer(gate_layer) or nn.Identity()).to(**dd)

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.bottleneck(x))


class SEActivation(ATAC):
    """`ATAC` behind a global average pool: one gate a channel for the whole map, (B, C, H, W) -> (B, C, H, W).

    Arguments and parameter count are those of `ATAC`. In training a batch of one has a single value a channel left to
    normalise, which BatchNorm refuses.

    Source:
        Compared with ATAC in Tables 2 and 3. The slides show it as a picture, read here as the pool in front of the
        same bottleneck, BatchNorm and inner ReLU included, as in the authors' code (`useGlobal`).
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.bottleneck(x.mean((2, 3), keepdim=True)))


class NiN(ChannelBottleneck):
    """Network-in-network unit: the bottleneck's output itself, no gate, (B, C, H, W) -> (B, C, H, W).

    Arguments are those of `ATAC` but `gate_layer`; the parameter count is the same.

    Source:
        Compared with ATAC in Tables 2 and 3. The slides show it as a picture, read here as `ATAC` without the sigmoid
        and the product: `BN2(conv2(relu(BN1(conv1(x)))))`.
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(x)


class LocalSE(ATAC):
    """The gate of `ATAC` once a block, as an `attn_layer`: (B, C, H, W) -> (B, C, H, W).

    Put where an SE module sits, at the end of the residual branch, while the block's activations stay ReLUs. It adds
    `2 * C * C * rd_ratio + 2 * C * (1 + rd_ratio)` parameters a block: 5,712 to the CIFAR network of b = 1 (77,850 to
    83,562), where ATAC's two units a block and the last one add 11,728.

    Source:
        LocalSENet, compared with ATAC in Tables 2 and 3. The slides show it as a picture, read here as an SE block (Hu
        et al. 2018) whose gate is `ATAC`'s: no pool, r = 2, BatchNorm, ReLU inside.
    """


# the names of the units that take an activation's place, as timm's `act_layer` has them
ACTIVATIONS: dict[str, type[ChannelModule]] = {'atac': ATAC, 'se_act': SEActivation, 'nin': NiN, 'xunit': XUnit}


def _no_norm(channels: int, device=None, dtype=None) -> nn.Module:
    return nn.Identity()

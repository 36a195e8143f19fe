"""Attention as activation: the ATAC unit and the units the paper compares it with, in plain PyTorch.

This file is the reference for everything else in the package.

Paper: `Attention as Activation` - https://arxiv.org/abs/2007.07729 (Dai et al., ICPR 2020)

An activation and an attention module are both a gate, `x' = G(x) * x`. All units here share one bottleneck of two 1x1
convolutions. They differ in the input of the bottleneck and in the use of its output:

| unit           | gate                                   | in place of              |
| -------------- | -------------------------------------- | ------------------------ |
| `ATAC`         | local, from the channels of a position | each ReLU                |
| `SEActivation` | global, from the channels' means       | each ReLU                |
| `NiN`          | none                                   | each ReLU                |
| `LocalSE`      | local, as `ATAC`                       | an SE module, ReLUs stay |
"""

import math
from numbers import Real

import torch
import torch.nn as nn
from timm.layers import LayerType, create_act_layer, get_norm_layer

from .deferred import ChannelModule

__all__ = ['ATAC', 'LocalSE', 'NiN', 'SEActivation']


def init_weight_(weight: torch.Tensor) -> None:
    """Initialise a weight as the authors do, by MXNet's `MSRAPrelu`: the average of both fans, PReLU of slope 0.25.

    Args:
        weight: Weight of a convolution or a linear layer, changed in place.
    """
    nn.init.xavier_normal_(weight, gain=nn.init.calculate_gain('leaky_relu', 0.25))


def get_rd_channels(channels: int, rd_ratio: float) -> int:
    """Return the width of the bottleneck, `max(1, channels * rd_ratio)` rounded down.

    Raises:
        ValueError: `rd_ratio` is not in (0, 1].
    """
    if not isinstance(rd_ratio, Real) or not 0 < rd_ratio <= 1:
        raise ValueError(
            f'rd_ratio={rd_ratio!r}: expected a number in (0, 1], the width of the bottleneck over the channels '
            f"(the paper's r = 2 is rd_ratio=0.5)."
        )
    return max(1, math.floor(channels * rd_ratio + 1e-6))  # the float 1 / r may be slightly too small


class _EmptyConv2d(nn.Conv2d):
    """A convolution whose parameters have no values yet."""

    def reset_parameters(self) -> None:
        pass


class ChannelBottleneck(ChannelModule):
    """Base of the units: `BN2(conv2(act(BN1(conv1(x)))))`, 1x1 convolutions C -> max(1, C * rd_ratio) -> C.

    Published weights use the names `conv1`, `bn1`, `conv2` and `bn2`, so these names must not change.

    Args:
        channels: Width C of the input. Without it, the layers are created when the unit is put into a module. Width,
            layout, device and dtype then come from the neighbouring layers (`timm_atac.units.deferred`).
        rd_ratio: Width of the bottleneck over C.
        act_layer: Activation inside the bottleneck, None for none.
        norm_layer: Normalisation after each convolution, None for none.
        inplace: Accepted because timm passes it to activations. The input is never changed.
        input_fmt: Layout of the input: 'NCHW' is (B, C, H, W), 'NCL' (B, C, ...), 'NHWC' and 'NLC' are (B, ..., C).

    Raises:
        ValueError: `channels` is not an integer >= 1, `rd_ratio` is not in (0, 1], or `input_fmt` is not one of the
            four. If the neighbouring layers do not give the width: any use of the unit's parameters.
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
        get_rd_channels(1, rd_ratio)  # raises a wrong ratio here, also for a unit that has no width yet
        self.rd_ratio = rd_ratio
        self._act_layer = act_layer
        self._norm_layer = get_norm_layer(norm_layer) or nn.Identity
        self.initialize_parameters(channels, device=device, dtype=dtype)

    def build(self, channels: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        rd_channels = get_rd_channels(channels, self.rd_ratio)
        self.conv1 = self._create_conv(channels, rd_channels, **dd)
        self.bn1 = self._norm_layer(rd_channels, **dd)
        self.act = create_act_layer(self._act_layer) or nn.Identity()  # not in place: full backward hooks forbid it
        self.act.to(**dd)  # PReLU has a parameter
        self.conv2 = self._create_conv(rd_channels, channels, **dd)
        self.bn2 = self._norm_layer(channels, **dd)
        init_weight_(self.conv1.weight)
        init_weight_(self.conv2.weight)
        del self._act_layer, self._norm_layer  # pickle refuses a lambda

    def _create_conv(self, in_channels: int, out_channels: int, device=None, dtype=None) -> nn.Conv2d:
        """Create a 1x1 convolution whose weight is to be initialised.

        PyTorch's own initialisation takes as long as `init_weight_`, which overwrites it. A unit inside a model of timm
        goes without it. A unit that is created with its width does not, so that a seed gives the same networks of this
        package as in former versions.
        """
        cls = _EmptyConv2d if self.inferred_from else nn.Conv2d
        conv = cls(in_channels, out_channels, kernel_size=1, bias=False, device=device, dtype=dtype)
        conv.__class__ = nn.Conv2d
        return conv

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
        channels: Width C of the input. Without it, as for `act_layer=ATAC` in timm's models, the layers are created
            when the unit is put into a module. Width, layout, device and dtype then come from the neighbouring layers.
        rd_ratio: Width of the bottleneck over C (the paper's 1 / r, r = 2).
        act_layer: Activation inside the bottleneck, None for none.
        norm_layer: Normalisation after each convolution, None for none.
        gate_layer: Activation that turns the bottleneck's output into the gate, None for none.
        inplace: Accepted because timm passes it to activations. The input is never changed.
        input_fmt: Layout of the input: 'NCHW' is (B, C, H, W), 'NCL' (B, C, ...), 'NHWC' and 'NLC' are (B, ..., C).

    Raises:
        ValueError: `channels` is not an integer >= 1, `rd_ratio` is not in (0, 1], or `input_fmt` is not one of the
            four. The input has another width. If the neighbouring layers do not give the width: any use of the unit's
            parameters.

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

    def build(self, channels: int, device=None, dtype=None) -> None:
        super().build(channels, device=device, dtype=dtype)
        if hasattr(self, 'gate'):  # the width was not known in __init__. Register the gate last, as if it had been
            gate = self.gate
            del self.gate
            self.gate = gate.to(device=device, dtype=dtype)

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.bottleneck(x))


class SEActivation(ATAC):
    """`ATAC` behind a global average pool: one gate per channel for the whole map, (B, C, H, W) -> (B, C, H, W).

    It has the arguments and the number of parameters of `ATAC`. In training, BatchNorm raises an error for a batch of
    one, because the pool leaves one value per channel.

    Source:
        Tables 2 and 3 compare it with ATAC. The slides show it only as a picture. This implementation puts the pool in
        front of the same bottleneck, with BatchNorm and the inner ReLU, as the authors' code does (`useGlobal`).
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.bottleneck(x.mean((2, 3), keepdim=True)))

    def has_one_value_per_channel(self, x: torch.Tensor) -> bool:
        return x.shape[0] == 1


class NiN(ChannelBottleneck):
    """Network-in-network unit: the bottleneck's output itself, no gate, (B, C, H, W) -> (B, C, H, W).

    It has the arguments of `ATAC` except `gate_layer`, and as many parameters.

    Source:
        Tables 2 and 3 compare it with ATAC. The slides show it only as a picture. This implementation is `ATAC` without
        the sigmoid and the product: `BN2(conv2(relu(BN1(conv1(x)))))`.
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(x)


class LocalSE(ATAC):
    """The gate of `ATAC` as an `attn_layer`, one per block: (B, C, H, W) -> (B, C, H, W).

    It takes the place of an SE module at the end of the residual branch. The block's activations stay ReLUs. It adds
    `2 * C * C * rd_ratio + 2 * C * (1 + rd_ratio)` parameters per block. To the CIFAR network of b = 1 it adds 5,712
    parameters (77,850 to 83,562). ATAC adds 11,728, by two units per block and one at the end.

    Source:
        Tables 2 and 3 compare LocalSENet with ATAC. The slides show it only as a picture. This implementation is an SE
        block (Hu et al. 2018) with the gate of `ATAC`: no pool, r = 2, BatchNorm, ReLU inside.
    """

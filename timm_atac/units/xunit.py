"""xUnit: its gate comes from neighbouring positions of one channel. ATAC's comes from the channels at one position.

Paper: `xUnit: Learning a Spatial Activation Function for Efficient Image Restoration` -
https://arxiv.org/abs/1711.06445 (Kligvasser, Rott Shaham and Michaeli, CVPR 2018)
"""

from numbers import Integral
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerType, create_act_layer, get_norm_layer

from .deferred import ChannelModule

__all__ = ['Gaussian', 'XUnit']


class Gaussian(nn.Module):
    """`exp(-x^2)`, the gate of an xUnit, for inputs of any shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-x.square())


class XUnit(ChannelModule):
    """Spatial activation: `x * exp(-d^2)` with `d = BN(conv(relu(x)))`, (B, C, H, W) -> (B, C, H, W).

    The convolution is depthwise. Each channel has its own gate, computed from the neighbours of a position.

    Args:
        channels: Width C of the input. Without it, the layers are created when the unit is put into a module, as for
            `ATAC`.
        kernel_size: Height and width of the convolution in positions, odd.
        act_layer: Activation before the convolution, None for none.
        norm_layer: Normalisation after the convolution, None for none.
        gate_layer: Activation that turns d into the gate, None for none.
        inplace: Accepted because timm passes it to activations. The input is never changed.
        input_fmt: Layout of the input: 'NCHW' and 'NCL' are (B, C, H, W), 'NHWC' and 'NLC' are (B, H, W, C).

    Raises:
        ValueError: `channels` is not an integer >= 1, `kernel_size` is not an odd integer >= 1, or `input_fmt` is not
            one of the four. The input has another width, or does not have four dimensions.

    Source:
        The paper's unit is ReLU, depthwise convolution of 9 x 9 positions and Gaussian. The unit that "Attention as
        Activation" compares with is not published. The figure on activation units in its authors' README
        (https://github.com/YimianDai/open-atac) shows 12 more parameters per channel: those of a 3 x 3 convolution with
        bias and of one norm. Their train_cifar.py also has 3 x 3 (`skernel`). The code of xUnit's authors
        (https://github.com/kligvasser/xUnit) has one norm before the ReLU and one after the convolution. The figure
        does not show which of them remains. Here it is the second, because the network has a norm before the unit.
    """

    first_layer = 'conv'

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 3,
        act_layer: LayerType | None = nn.ReLU,
        norm_layer: LayerType | None = nn.BatchNorm2d,
        gate_layer: LayerType | None = Gaussian,
        inplace: bool = False,
        input_fmt: str = 'NCHW',
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(input_fmt)
        if (
            not isinstance(kernel_size, Integral)
            or isinstance(kernel_size, bool)
            or kernel_size < 1
            or kernel_size % 2 == 0
        ):
            raise ValueError(f'kernel_size={kernel_size!r}: expected an odd integer >= 1.')
        self.kernel_size: int = kernel_size
        self._act_layer: LayerType | None = act_layer
        self._norm_layer: Any = get_norm_layer(norm_layer) or nn.Identity
        self.gate: nn.Module = create_act_layer(gate_layer) or nn.Identity()
        self.initialize_parameters(channels, device=device, dtype=dtype)

    def build(self, channels: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        self.act: nn.Module = create_act_layer(self._act_layer) or nn.Identity()
        self.conv: nn.Module = nn.Conv2d(
            channels, channels, self.kernel_size, padding=self.kernel_size // 2, groups=channels, **dd
        )
        self.bn: nn.Module = self._norm_layer(channels, **dd)
        self.act.to(**dd)  # PReLU has a parameter
        for module in self.act.modules():
            if hasattr(module, 'inplace'):
                module.inplace = False  # it would change the input of the unit
        self.gate.to(**dd)
        del self._act_layer, self._norm_layer  # pickle refuses a lambda

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.bn(self.conv(self.act(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            self.check_input(x)
        if self.input_fmt == 'NCHW' or self.input_fmt == 'NCL':
            return self.activate(x)
        return self.activate(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def check_input(self, x: torch.Tensor) -> None:
        super().check_input(x)
        if not isinstance(x, torch.fx.Proxy) and x.ndim != 4:
            raise ValueError(
                f'XUnit{self.place} got an input of shape {tuple(x.shape)}: expected (B, C, H, W) or (B, H, W, C), '
                f'because its gates come from neighbouring rows and columns. Use ATAC for other inputs.'
            )

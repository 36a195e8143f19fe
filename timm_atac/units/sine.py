"""Sine as an activation (SIREN)."""

import torch
import torch.nn as nn

__all__ = ['Sine']


class Sine(nn.Module):
    """Sine as an activation: `sin(omega * x)`, for inputs of any shape.

    Args:
        omega: Frequency of the sine, omega_0 in the paper.

    Source:
        "SIREN", `Implicit Neural Representations with Periodic Activation Functions` -
        https://arxiv.org/abs/2006.09661 (Sitzmann et al., NeurIPS 2020). The paper uses omega_0 = 30.
    """

    def __init__(self, omega: float = 1.0) -> None:
        super().__init__()
        self.omega = omega

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.omega * x)

    def extra_repr(self) -> str:
        return f'omega={self.omega}'

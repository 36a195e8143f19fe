"""A forward pass leaves a model as it was."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn

from timm_atac.utils.forward_pass import evaluation_mode


class Counter(nn.Module):
    """Counts its calls in two buffers, one changed in place and one replaced, and keeps a cache in inference."""

    changed: torch.Tensor
    replaced: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('changed', torch.zeros(1))
        self.register_buffer('replaced', torch.zeros(1))
        self.register_buffer('without_values', torch.zeros(3, device='meta'))
        self.frozen = nn.BatchNorm2d(3).eval()
        self.cache: list[torch.Tensor] = []

    def train(self, mode: bool = True) -> 'Counter':
        if mode:
            self.cache.clear()
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.changed += 1
        self.replaced = self.replaced + 1
        self.cache.append(x)
        return self.frozen(x)


@pytest.mark.parametrize('fails', [False, True])
def test_evaluation_mode(fails) -> None:
    model = Counter()
    model.train()
    model.frozen.eval()
    buffers = dict(model.named_buffers())
    with pytest.raises(RuntimeError) if fails else nullcontext(), evaluation_mode(model):
        model(torch.zeros(2, 4 if fails else 3, 5, 7))
    assert model.training and not model.frozen.training
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert model.changed == 0 and model.replaced == 0
    assert not model.cache


def test_evaluation_mode_does_not_call_eval() -> None:
    """Some models do more in `eval()` than to set a mode: LoRA layers merge their weights into their neighbours'."""

    class Merges(nn.Linear):
        def train(self, mode: bool = True) -> 'Merges':
            self.is_merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merges(3, 3)).train()
    with evaluation_mode(model):
        assert not model[0].training and not model[0].is_merged


def test_buffers_that_did_not_change_are_not_written() -> None:
    """A backward pass that needs them is still possible afterwards."""
    model = nn.BatchNorm2d(3).eval()
    y = model(torch.randn(2, 3, 5, 7, requires_grad=True))
    with evaluation_mode(model):
        model(torch.randn(2, 3, 5, 7))
    y.sum().backward()

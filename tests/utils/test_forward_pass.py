"""A forward pass leaves a model as it was, and its observer's exceptions are not taken for the model's."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn as nn

from timm_atac.utils.forward_pass import ForwardError, ForwardObserver, evaluation_mode, observe_forward


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


class Observer(ForwardObserver):
    """Records what it is called with, and raises an exception in one of its methods."""

    def __init__(self, fails_in: str = '') -> None:
        super().__init__()
        self.fails_in = fails_in
        self.calls: list[str] = []

    def _record(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise KeyError(name)

    def before_module(self, module: nn.Module, args: tuple, kwargs: Any) -> None:
        self._record('before_module')

    def after_module(self, module: nn.Module, output: Any) -> None:
        self._record('after_module')

    def after_function(self, function: Any, args: tuple, kwargs: Any, output: Any) -> None:
        self._record('after_function')


class Catches(nn.Module):
    """A model that goes on after any exception of its layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.layer(x)
        except Exception:
            return x


class NeedsValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()


@pytest.mark.parametrize('wrapper', [nn.Sequential, Catches])
@pytest.mark.parametrize('fails_in', ['before_module', 'after_module', 'after_function'])
def test_an_exception_of_the_observer_is_raised(fails_in, wrapper) -> None:
    """It does not lead to a second run, and it is not reported as an error of the model."""
    observers: list[Observer] = []

    def create(original_of: Any) -> Observer:
        observers.append(Observer(fails_in))
        return observers[-1]

    with pytest.raises(KeyError, match=fails_in):
        observe_forward(wrapper(nn.Linear(3, 3)), (torch.zeros(2, 3),), create)
    assert len(observers) == 1


def test_an_exception_in_creating_the_observer_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        observe_forward(nn.Linear(3, 3), (torch.zeros(2, 3),), lambda original_of: Observer(str(1 / 0)))


def test_a_model_that_needs_values_runs_on_its_own_device() -> None:
    x = torch.ones(2, 3)
    observer, output, on_meta = observe_forward(NeedsValues(), (x,), lambda original_of: Observer())
    assert not on_meta and torch.equal(output, 6 * x)
    assert observer.calls[0] == 'before_module' and observer.calls[-1] == 'after_module'
    assert observe_forward(nn.Linear(3, 3), (x,), lambda original_of: Observer())[2]


def test_a_model_that_cannot_be_copied_runs_on_its_own_device() -> None:
    model: Any = nn.Linear(3, 3)
    model.result = model.weight * 2  # deepcopy takes leaves only
    model.generator = (character for character in 'abc')  # neither does it take generators
    assert not observe_forward(model, (torch.ones(2, 3),), lambda original_of: Observer())[2]


def test_an_exception_of_the_model_is_the_cause() -> None:
    with pytest.raises(ForwardError, match=r'Linear does not run on \(\(2, 4\),\): RuntimeError') as caught:
        observe_forward(nn.Linear(3, 3), (torch.ones(2, 4),), lambda original_of: Observer())
    assert type(caught.value.__cause__) is RuntimeError

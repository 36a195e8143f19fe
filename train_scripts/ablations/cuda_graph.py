"""Loss and gradients of a network as one CUDA graph."""

from collections.abc import Callable

import torch
import torch.nn as nn

WARM_UP = 3  # passes before the capture, in which libraries choose their kernels and allocate their workspaces


class GradientGraph:
    """Computes the loss of a batch and the gradients of all parameters with one launch.

    A small network has hundreds of short kernels in a training step, and the CPU takes longer to launch them than the
    GPU to run them. The graph is captured at the first call. All calls compute the same kernels on the same memory, so
    that the numbers are those of the eager network.

    Args:
        network: The network, on a GPU and in training mode.
        loss: Function of images and labels. It runs the network and returns the loss, a scalar.
    """

    def __init__(self, network: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._network, self._loss_of = network, loss
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Set the gradients of the network's parameters, and return the loss.

        The next call overwrites both. The gradients must not be set to None in between.

        Args:
            images: Batch (B, C, H, W). Shape and memory layout are those of the first call.
            labels: Labels (B,).
        """
        if self._graph is None:
            self._capture(images, labels)
        assert self._graph is not None
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss

    def _capture(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self._images, self._labels = images.clone(), labels.clone()  # the layout is kept
        saved = [buffer.clone() for buffer in self._network.buffers()]  # the warm-up changes the running statistics
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._compute()
        with torch.no_grad():
            for buffer, before in zip(self._network.buffers(), saved, strict=True):
                buffer.copy_(before)
        self._graph = graph

    def _compute(self) -> torch.Tensor:
        self._network.zero_grad()  # sets the gradients to None: those of the capture are allocated in the graph
        loss = self._loss_of(self._images, self._labels)
        loss.backward()
        return loss.detach()

"""A BatchNorm as two functions, forward and backward, with what the one has to know of the other in between.

Autograd's BatchNorm keeps its input. Here a caller keeps what it likes, and computes the rest again by the statistics
of the first time.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.norm_act import FrozenBatchNorm2d  # of torchvision; timm's `freeze` puts it in

__all__ = ['BatchNorm', 'Statistics']

_aten = torch.ops.aten


class Statistics(NamedTuple):
    """What a map was normalised by."""

    mean: torch.Tensor  # (C,)
    spread: torch.Tensor  # (C,): 1 / standard deviation of a batch, or a running variance
    values: torch.Tensor | None = None  # (1,): how many a channel, where processes share their statistics


class BatchNorm(NamedTuple):
    """What a layer does in this pass; the functions take its weight and bias, so that autograd sees them as inputs."""

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    by_batch: bool
    momentum: float
    eps: float
    group: Any  # the processes that share statistics, None for this one alone

    @staticmethod
    def knows(norm: Any, dtype: torch.dtype) -> bool:
        """Whether a layer is one of PyTorch's, with parameters that keep the precision of statistics of a map."""
        if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d):
            return False
        if type(norm) is FrozenBatchNorm2d and norm.weight.dtype != dtype:
            return False  # unlike the others, it would return the wider type of both
        return norm.weight is None or norm.weight.dtype in (torch.float32, torch.float64)

    @classmethod
    def of(cls, norm: Any) -> 'BatchNorm':
        """Read a layer's state, and count the batch as its forward pass does."""
        if type(norm) is FrozenBatchNorm2d:
            return cls(norm.running_mean, norm.running_var, False, 0.0, norm.eps, None)
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        tracked = not norm.training or norm.track_running_stats
        running = (norm.running_mean, norm.running_var) if tracked else (None, None)
        by_batch = norm.training or norm.running_mean is None
        return cls(running[0], running[1], by_batch, momentum, norm.eps, cls.group_of(norm))

    @staticmethod
    def group_of(norm: Any) -> Any:
        """The processes that share a layer's statistics in this pass, None for this one alone."""
        if type(norm) is not nn.SyncBatchNorm or not norm.training or not dist.is_available():
            return None
        if not dist.is_initialized():
            return None
        group = norm.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def forward(self, h: torch.Tensor, weight: Any, bias: Any) -> tuple[torch.Tensor, Statistics]:
        """Normalise (B, C, H, W), and update the running statistics."""
        if self.by_batch and self.group is None:
            args = (weight, bias, self.running_mean, self.running_var, True, self.momentum, self.eps)
            y, mean, invstd = torch.native_batch_norm(h, *args)
            return y, Statistics(mean, invstd)
        statistics = self.statistics(h)
        return self.again(h, weight, bias, statistics), statistics

    def statistics(self, h: torch.Tensor) -> Statistics:
        """What (B, C, H, W) is normalised by, for one who does that; updates the running statistics."""
        if self.group is not None:
            return self._shared(h)
        if not self.by_batch:
            assert self.running_mean is not None and self.running_var is not None
            return Statistics(self.running_mean.clone(), self.running_var.clone())  # others may update them
        if self.running_mean is not None and self.running_mean.dtype == torch.float32:
            mean, var = _aten.batch_norm_update_stats.default(h, self.running_mean, self.running_var, self.momentum)
        else:  # on a CPU, it would return the narrower type
            var, mean = torch.var_mean(h.to(_precise(h)), (0, 2, 3), correction=0)
            self._update(mean, var, h.numel() // h.shape[1])
        return Statistics(mean, (var + self.eps).rsqrt())

    def scales(self, statistics: Statistics, weight: Any, bias: Any) -> tuple[torch.Tensor, ...]:
        """Mean, 1 / standard deviation, weight and bias, (C,) each, also of a norm without the last two."""
        mean, spread, _ = statistics
        invstd = spread if self.by_batch else (spread + self.eps).rsqrt()
        weight = torch.ones_like(mean) if weight is None else weight
        return mean, invstd, weight, torch.zeros_like(mean) if bias is None else bias

    def again(self, h: torch.Tensor, weight: Any, bias: Any, statistics: Statistics) -> torch.Tensor:
        """Normalise by known statistics."""
        mean, spread, _ = statistics
        if not self.by_batch:
            return F.batch_norm(h, mean, spread, weight, bias, False, 0.0, self.eps)
        # PyTorch 2.11 refuses an epsilon of 0 in `F.batch_norm`, also where no statistics are taken
        is_enabled = torch.backends.cudnn.enabled
        return torch.batch_norm(h, weight, bias, mean, spread.pow(-2), False, 0.0, 0.0, is_enabled)

    def backward(
        self, grad: torch.Tensor, h: torch.Tensor, weight: Any, statistics: Statistics, needed: list[bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of input, weight and bias, those that are needed."""
        if self.group is not None:
            return self._shared_backward(grad, h, weight, statistics, needed)
        mean, spread, _ = statistics
        none = mean.new_empty(0)  # CUDA wants tensors
        known = (None, None, mean, spread) if self.by_batch else (mean, spread, none, none)
        return _aten.native_batch_norm_backward.default(grad, h, weight, *known, self.by_batch, self.eps, needed)

    def means(self, sums: torch.Tensor, h: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """Over all that a batch's statistics are of: of the gradient of the norm's output, and times the normalised h.

        Args:
            sums: (2, C), of both over h.
            h: The norm's input.
            statistics: Of h.

        Returns:
            (2, C).
        """
        if self.group is None:
            return sums / (h.numel() // h.shape[1])
        _, invstd, values = statistics
        assert values is not None
        sent = torch.cat((sums[0], sums[1] / invstd))  # of gradients, and of those times h - mean: as SyncBatchNorm
        dist.all_reduce(sent, group=self.group)
        by_one, by_input = sent.split(len(invstd))
        return torch.stack((by_one, by_input * invstd)) / values

    def by_autograd(self, h: torch.Tensor, weight: Any, bias: Any, statistics: Statistics) -> torch.Tensor:
        """Normalise as PyTorch does, leaving the running statistics alone.

        Raises:
            RuntimeError: Processes share the statistics.
        """
        if self.group is not None:
            raise RuntimeError(
                'A SyncBatchNorm has no second derivative, nor the first with create_graph=True: take BatchNorm2d, or '
                'set the norms to eval().'
            )
        if self.by_batch:
            return F.batch_norm(h, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(h, statistics.mean, statistics.spread, weight, bias, False, 0.0, self.eps)

    def _shared(self, h: torch.Tensor) -> Statistics:
        """Mean and deviation over the batches of all processes, which may have different sizes, or none.

        Sends what `SyncBatchNorm` sends, so that a process may use the one while another uses the other.
        """
        dtype = _precise(h)
        count = torch.full((1,), h.numel() // h.shape[1], dtype=dtype, device=h.device)
        if h.numel() > 0:
            var, mean = torch.var_mean(h.to(dtype), (0, 2, 3), correction=0)
            mine = torch.cat((mean, (var + self.eps).rsqrt(), count))
        else:
            mine = torch.zeros(2 * h.shape[1] + 1, dtype=dtype, device=h.device)
        everyone = mine.new_empty(dist.get_world_size(self.group), len(mine))
        if dist.get_backend(self.group) == 'gloo':
            dist.all_gather(list(everyone), mine, group=self.group)
        else:
            dist.all_gather_into_tensor(everyone, mine, group=self.group)
        means, invstds, counts = everyone.split((h.shape[1], h.shape[1], 1), dim=1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        variances = torch.where(counts > 0, invstds.pow(-2) - self.eps, 0)
        var = ((variances + (means - mean) ** 2) * counts).sum(0) / count
        self._update(mean, var, count)
        return Statistics(mean, (var + self.eps).rsqrt(), count)

    def _update(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor | int) -> None:
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)

    def _shared_backward(
        self, grad: torch.Tensor, h: torch.Tensor, weight: Any, statistics: Statistics, needed: list[bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As `backward`; gradients of weight and bias are of this process's batch, for DDP to average."""
        mean, invstd, _ = statistics
        scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
        if h.numel() > 0:
            known = (torch.ones_like(mean), None, None, mean, invstd)
            mask = [False, True, True]
            _, grad_weight, grad_bias = _aten.native_batch_norm_backward.default(grad, h, *known, True, self.eps, mask)
        else:  # which PyTorch divides by
            grad_weight = grad_bias = torch.zeros_like(mean)
        grad_h = None
        if needed[0]:
            by_one, by_x = self.means(torch.stack((grad_bias, grad_weight)), h, statistics)
            by_x = -scale * invstd * by_x
            by_one = -scale * by_one - by_x * mean
            # in the statistics' precision: rounded, the same error at every position would add up in sums over them
            by_one, by_x, by_grad = (v.view(1, -1, 1, 1) for v in (by_one, by_x, scale))
            grad_h = torch.addcmul(by_one, h, by_x).addcmul_(grad, by_grad).to(h.dtype)
        return grad_h, grad_weight if needed[1] else None, grad_bias if needed[2] else None


def _precise(h: torch.Tensor) -> torch.dtype:
    """What statistics of h are computed in."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32

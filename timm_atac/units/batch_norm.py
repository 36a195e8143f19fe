"""A BatchNorm as separate functions for the forward and the backward pass.

Autograd's BatchNorm stores its input for the backward pass. With these functions the caller chooses what to store, and
recomputes the rest with the statistics of the forward pass.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.norm_act import FrozenBatchNorm2d  # timm's `freeze` replaces norms by it

__all__ = ['BatchNorm', 'Statistics']

_aten = torch.ops.aten
_WEIGHT_DTYPES = (torch.float32, torch.float64)


class Statistics(NamedTuple):
    """The values that a map was normalised with: the mean, and either `invstd` or `var`."""

    mean: torch.Tensor  # (C,)
    invstd: Any = None  # (C,): 1 / standard deviation of a batch, computed with epsilon
    var: Any = None  # (C,): a running variance, without epsilon
    count: Any = None  # (1,): number of values per channel in all processes, if they share statistics


class BatchNorm(NamedTuple):
    """State of a layer in one pass. Its functions take weight and bias as arguments, as inputs for autograd."""

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    use_batch_stats: bool
    momentum: float
    eps: float
    process_group: Any  # processes that share statistics, None if only this process is used

    @staticmethod
    def supports(norm: Any, dtype: torch.dtype) -> bool:
        """True if a layer is one of the three BatchNorms and its weight, if any, is float32 or float64.

        Args:
            norm: Layer.
            dtype: Type of the layer's input.
        """
        if type(norm) is FrozenBatchNorm2d:  # it returns the wider of both types, the others return the input's type
            return norm.weight.dtype == dtype and dtype in _WEIGHT_DTYPES
        is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        return is_batch_norm and (norm.weight is None or norm.weight.dtype in _WEIGHT_DTYPES)

    @classmethod
    def from_module(cls, norm: Any) -> 'BatchNorm':
        """Read a layer's state, and increase `num_batches_tracked` as its forward pass does."""
        if type(norm) is FrozenBatchNorm2d:
            return cls(norm.running_mean, norm.running_var, False, 0.0, norm.eps, None)
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        tracked = not norm.training or norm.track_running_stats
        running_mean, running_var = (norm.running_mean, norm.running_var) if tracked else (None, None)
        use_batch_stats = norm.training or norm.running_mean is None
        return cls(running_mean, running_var, use_batch_stats, momentum, norm.eps, cls.sync_group(norm))

    @staticmethod
    def sync_group(norm: Any) -> Any:
        """Return the processes that share a layer's statistics in this pass, None if only this process is used."""
        is_synced = type(norm) is nn.SyncBatchNorm and norm.training
        if not is_synced or not dist.is_available() or not dist.is_initialized():
            return None
        group = norm.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def forward(self, h: torch.Tensor, weight: Any, bias: Any) -> tuple[torch.Tensor, Statistics]:
        """Normalise h, (B, C, H, W), and update the running statistics."""
        if self.use_batch_stats and self.process_group is None:
            args = (weight, bias, self.running_mean, self.running_var, True, self.momentum, self.eps)
            y, mean, invstd = torch.native_batch_norm(h, *args)
            return y, Statistics(mean, invstd)
        statistics = self.statistics(h)
        return self.normalize(h, weight, bias, statistics), statistics

    def statistics(self, h: torch.Tensor) -> Statistics:
        """Return the statistics for h, (B, C, H, W), without normalising it, and update the running statistics."""
        if self.process_group is not None:
            return self._sync_statistics(h)
        if not self.use_batch_stats:
            assert self.running_mean is not None and self.running_var is not None
            # copies, because a training pass may update the running statistics before the backward pass
            return Statistics(self.running_mean.clone(), var=self.running_var.clone())
        if self.running_mean is not None and self.running_mean.dtype == torch.float32:
            mean, var = _aten.batch_norm_update_stats.default(h, self.running_mean, self.running_var, self.momentum)
        else:  # on a CPU, batch_norm_update_stats would return the narrower type
            var, mean = torch.var_mean(h.to(_statistics_dtype(h)), (0, 2, 3), correction=0)
            self._update_running(mean, var, h.numel() // h.shape[1])
        return Statistics(mean, (var + self.eps).rsqrt())

    def rows(self, statistics: Statistics, weight: Any, bias: Any) -> tuple[torch.Tensor, ...]:
        """Return mean, 1 / standard deviation, weight and bias, (C,) each. Without weight and bias, ones and zeros."""
        mean, invstd, var, _ = statistics
        invstd = (var + self.eps).rsqrt() if invstd is None else invstd
        weight = torch.ones_like(mean) if weight is None else weight
        return mean, invstd, weight, torch.zeros_like(mean) if bias is None else bias

    def normalize(self, h: torch.Tensor, weight: Any, bias: Any, statistics: Statistics) -> torch.Tensor:
        """Normalise h, (B, C, H, W), with known statistics."""
        mean, invstd, var, _ = statistics
        if invstd is None:
            return F.batch_norm(h, mean, var, weight, bias, False, 0.0, self.eps)
        # PyTorch 2.11 raises an error for an epsilon of 0 in `F.batch_norm`, also when no statistics are computed
        is_enabled = torch.backends.cudnn.enabled
        return torch.batch_norm(h, weight, bias, mean, invstd.pow(-2), False, 0.0, 0.0, is_enabled)

    def backward(
        self, grad: torch.Tensor, h: torch.Tensor, weight: Any, statistics: Statistics, needed: list[bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of h, weight and bias, None for those that are not needed."""
        if self.process_group is not None:
            return self._sync_backward(grad, h, weight, statistics, needed)
        mean, invstd, var, _ = statistics
        empty = mean.new_empty(0)  # CUDA does not accept None here
        known = (mean, var, empty, empty) if invstd is None else (None, None, mean, invstd)
        function = _aten.native_batch_norm_backward.default
        grads = function(grad, h, weight, *known, self.use_batch_stats, self.eps, needed)
        # for channels_last on CUDA, PyTorch 2.11 returns gradients of weight and bias also if they are not needed
        grad_h, grad_weight, grad_bias = (g if wanted else None for g, wanted in zip(grads, needed, strict=True))
        return grad_h, grad_weight, grad_bias

    def mean_gradients(self, sums: torch.Tensor, h: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """Turn sums over the positions of h into means over all values of the statistics, in every process.

        Args:
            sums: (2, C): sums of the gradient of the norm's output, and of that gradient times the normalised h.
            h: Input of the norm.
            statistics: Statistics of h.

        Returns:
            (2, C).
        """
        if self.process_group is None:
            return sums / (h.numel() // h.shape[1])
        _, invstd, _, count = statistics
        sent = torch.cat((sums[0], sums[1] / invstd))  # the same two sums that SyncBatchNorm sends
        dist.all_reduce(sent, group=self.process_group)
        by_one, by_input = sent.split(len(invstd))
        return torch.stack((by_one, by_input * invstd)) / count

    def differentiable(self, h: torch.Tensor, weight: Any, bias: Any, statistics: Statistics) -> torch.Tensor:
        """Normalise h so that autograd can differentiate it, without updating the running statistics.

        Raises:
            RuntimeError: Processes share the statistics.
        """
        if self.process_group is not None:
            raise RuntimeError(
                'SyncBatchNorm has no second derivative, and no first derivative with create_graph=True. Use '
                'BatchNorm2d, or set the norms to eval().'
            )
        mean, var = (None, None) if self.use_batch_stats else (statistics.mean, statistics.var)
        return F.batch_norm(h, mean, var, weight, bias, self.use_batch_stats, 0.0, self.eps)

    def _sync_statistics(self, h: torch.Tensor) -> Statistics:
        """Return the statistics of the batches of all processes, whose batches may have different sizes or be empty.

        Sends the values that `SyncBatchNorm` sends, so that other processes may use `SyncBatchNorm` itself.
        """
        dtype = _statistics_dtype(h)
        count = torch.full((1,), h.numel() // h.shape[1], dtype=dtype, device=h.device)
        if h.numel() > 0:
            var, mean = torch.var_mean(h.to(dtype), (0, 2, 3), correction=0)
            mine = torch.cat((mean, (var + self.eps).rsqrt(), count))
        else:
            mine = torch.zeros(2 * h.shape[1] + 1, dtype=dtype, device=h.device)
        gathered = mine.new_empty(dist.get_world_size(self.process_group), len(mine))
        if dist.get_backend(self.process_group) == 'gloo':
            dist.all_gather(list(gathered), mine, group=self.process_group)
        else:
            dist.all_gather_into_tensor(gathered, mine, group=self.process_group)
        means, invstds, counts = gathered.split((h.shape[1], h.shape[1], 1), dim=1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        variances = torch.where(counts > 0, invstds.pow(-2) - self.eps, 0)
        var = ((variances + (means - mean) ** 2) * counts).sum(0) / count
        self._update_running(mean, var, count)
        return Statistics(mean, (var + self.eps).rsqrt(), count=count)

    def _update_running(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor | int) -> None:
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)

    def _sync_backward(
        self, grad: torch.Tensor, h: torch.Tensor, weight: Any, statistics: Statistics, needed: list[bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As `backward`. Gradients of weight and bias are those of this process's batch. DDP averages them."""
        mean, invstd, *_ = statistics
        scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
        if h.numel() > 0:
            known = (torch.ones_like(mean), None, None, mean, invstd)
            mask = [False, True, True]
            _, grad_weight, grad_bias = _aten.native_batch_norm_backward.default(grad, h, *known, True, self.eps, mask)
        else:  # PyTorch would divide by zero
            grad_weight = grad_bias = torch.zeros_like(mean)
        grad_h = None
        if needed[0]:
            by_one, by_x = self.mean_gradients(torch.stack((grad_bias, grad_weight)), h, statistics)
            by_x = -scale * invstd * by_x
            by_one = -scale * by_one - by_x * mean
            # in the precision of the statistics: equal rounding errors at all positions would add up in later sums
            by_one, by_x, by_grad = (v.view(1, -1, 1, 1) for v in (by_one, by_x, scale))
            grad_h = torch.addcmul(by_one, h, by_x).addcmul_(grad, by_grad).to(h.dtype)
        return grad_h, grad_weight if needed[1] else None, grad_bias if needed[2] else None


def _statistics_dtype(h: torch.Tensor) -> torch.dtype:
    """Return the type in which statistics of h are computed."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32

"""Batch normalization over the batches of all ranks."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _native
from .._sets import ProcessSet, global_process_set
from .asynchronous import allgather_async, allreduce_async_, synchronize
from .ops import Sum


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _statistics(tensor: torch.Tensor, process_set: ProcessSet) -> Tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and biased variance per channel over all ranks, and how many values each is made of."""
    channels = tensor.shape[1]
    dimensions = [d for d in range(tensor.dim()) if d != 1]
    values = tensor.to(_wide(tensor.dtype))
    count = tensor.numel() // channels
    if count:
        mean = values.mean(dimensions)
        squares = (values - mean.reshape(_shape(tensor))).pow(2).sum(dimensions)
    else:
        mean = squares = values.new_zeros(channels)
    row = torch.cat([mean, squares, values.new_tensor([float(count)])]).reshape(1, -1)
    rows = synchronize(allgather_async(row, None, process_set))
    means, squares, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    total = float(counts.sum())
    if total == 0:
        raise ValueError("SyncBatchNorm got no values on any rank")
    mean = (means * counts).sum(0) / total
    # By the parts' own squares and how far their means lie apart, which does not cancel as E[x^2] - E[x]^2 does.
    variance = (squares.sum(0) + (counts * (means - mean).pow(2)).sum(0)) / total
    return mean, variance, total


def _shape(tensor: torch.Tensor) -> Tuple[int, ...]:
    return (1, tensor.shape[1]) + (1,) * (tensor.dim() - 2)


class _SyncBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor, weight, bias, mean, variance, total, eps, process_set):
        shape = _shape(tensor)
        inverse = torch.rsqrt(variance + eps)
        normal = (tensor.to(mean.dtype) - mean.reshape(shape)) * inverse.reshape(shape)
        ctx.save_for_backward(normal, weight, inverse)
        ctx.total, ctx.process_set = total, process_set
        output = normal
        if weight is not None:
            output = output * weight.to(mean.dtype).reshape(shape) + bias.to(mean.dtype).reshape(shape)
        return output.to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, grad):
        normal, weight, inverse = ctx.saved_tensors
        dimensions = [d for d in range(grad.dim()) if d != 1]
        shape = _shape(grad)
        wide = grad.to(normal.dtype)
        sums = torch.cat([wide.sum(dimensions), (wide * normal).sum(dimensions)])
        channels = grad.shape[1]
        grad_bias, grad_weight = sums[:channels].clone(), sums[channels:].clone()
        # Every rank's values depend on the statistics, so their gradient is that of all ranks' losses.
        synchronize(allreduce_async_(sums, op=Sum, process_set=ctx.process_set))
        sums /= ctx.total
        through = wide - sums[:channels].reshape(shape) - normal * sums[channels:].reshape(shape)
        factor = inverse if weight is None else inverse * weight.to(normal.dtype)
        grad_input = (through * factor.reshape(shape)).to(grad.dtype)
        if weight is None:
            return (grad_input,) + (None,) * 7
        return (grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)) + (None,) * 5


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm*d` whose statistics are those of all ranks' batches, which may differ in size.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as for `torch.nn.BatchNorm2d`.
        process_set: the ranks that normalize together.

    Input is (N, C) or (N, C, ...). In training all ranks must call it, equally often. In evaluation, or alone, it
    is an ordinary batch normalization.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_set = process_set

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 (torch's name)
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes tensors of at least 2 dimensions; this one has {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """Normalizes a batch."""
        self._check_input_dim(input)
        batch = self.training or (self.running_mean is None and self.running_var is None)
        if not batch or not _native.is_initialized() or self.process_set.size() == 1:
            return super().forward(input)
        with torch.no_grad():
            mean, variance, total = _statistics(input, self.process_set)
            if self.training and self.track_running_stats:
                self._track(mean, variance, total)
        return _SyncBatchNormFunction.apply(
            input, self.weight, self.bias, mean, variance, total, self.eps, self.process_set
        )

    def _track(self, mean: torch.Tensor, variance: torch.Tensor, total: float) -> None:
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (total / max(total - 1.0, 1.0))
        self.running_mean.mul_(1 - factor).add_(mean.to(self.running_mean.dtype), alpha=factor)
        self.running_var.mul_(1 - factor).add_(unbiased.to(self.running_var.dtype), alpha=factor)

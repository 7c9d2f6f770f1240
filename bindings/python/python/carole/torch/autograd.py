"""Gradients of the collectives, for torch's autograd."""

from __future__ import annotations

import torch

from .. import _native
from .._sets import ProcessSet
from .._submit import Average, Sum
from .asynchronous import (
    grouped_allgather_async,
    grouped_reducescatter_async,
    handle_average_backwards_compatibility,
    start_allgather,
    start_allreduce,
    start_alltoall,
    start_broadcast,
    start_grouped_allreduce,
    start_reducescatter,
    synchronize,
)


class HorovodAllreduce(torch.autograd.Function):
    """`allreduce` with a gradient: the allreduce of the gradients, with the same operation and factors, as in Horovod.
    (For Sum that is the derivative of the sum of all ranks' losses; for Min, Max and Product it is none.)"""

    @staticmethod
    def forward(ctx, tensor, average, name, op, prescale_factor, postscale_factor, process_set):
        op = handle_average_backwards_compatibility(op, average)
        ctx.arguments = (op, prescale_factor, postscale_factor, process_set)
        handle = start_allreduce(tensor, False, name, op, prescale_factor, postscale_factor, process_set, True)
        return synchronize(handle)

    @staticmethod
    def backward(ctx, grad_output):
        op, prescale_factor, postscale_factor, process_set = ctx.arguments
        handle = start_allreduce(
            grad_output.contiguous(), False, None, op, prescale_factor, postscale_factor, process_set, True
        )
        return (synchronize(handle),) + (None,) * 6


class HorovodGroupedAllreduce(torch.autograd.Function):
    """`grouped_allreduce` with gradients."""

    @staticmethod
    def forward(ctx, name, op, prescale_factor, postscale_factor, process_set, *tensors):
        ctx.arguments = (op, prescale_factor, postscale_factor, process_set)
        handle = start_grouped_allreduce(tensors, False, name, op, prescale_factor, postscale_factor, process_set)
        return tuple(synchronize(handle))

    @staticmethod
    def backward(ctx, *grad_output):
        grads = [grad.contiguous() for grad in grad_output]
        handle = start_grouped_allreduce(grads, False, None, *ctx.arguments)
        return (None,) * 5 + tuple(synchronize(handle))


def _gathered_gradient(grad: torch.Tensor, rows: int, process_set: ProcessSet) -> torch.Tensor:
    """This rank's rows of the averaged gradient. (Average, not the sum, is what Horovod's users are used to.)"""
    reduced = synchronize(start_allreduce(grad.contiguous(), False, None, Average, 1.0, 1.0, process_set, True))
    counts = synchronize(start_allgather(torch.tensor([rows]), None, process_set, True)).tolist()
    start = sum(counts[: process_set.rank()])
    return reduced.narrow(0, start, rows)


class HorovodAllgather(torch.autograd.Function):
    """`allgather` with a gradient: this rank's rows of the gradients' average."""

    @staticmethod
    def forward(ctx, tensor, name, process_set):
        ctx.shape, ctx.process_set = tensor.shape, process_set
        return synchronize(start_allgather(tensor, name, process_set, True))

    @staticmethod
    def backward(ctx, grad_output):
        rows = ctx.shape[0] if ctx.shape else 1
        grad = _gathered_gradient(grad_output, rows, ctx.process_set)
        return grad.reshape(ctx.shape), None, None


class HorovodGroupedAllgather(torch.autograd.Function):
    """`grouped_allgather` with gradients."""

    @staticmethod
    def forward(ctx, name, process_set, *tensors):
        ctx.shapes, ctx.process_set = [tensor.shape for tensor in tensors], process_set
        return tuple(synchronize(grouped_allgather_async(list(tensors), name, process_set)))

    @staticmethod
    def backward(ctx, *grad_output):
        grads = [
            _gathered_gradient(grad, shape[0] if shape else 1, ctx.process_set).reshape(shape)
            for grad, shape in zip(grad_output, ctx.shapes)
        ]
        return (None, None, *grads)


class HorovodBroadcast(torch.autograd.Function):
    """`broadcast` with a gradient: the gradients' average on the root, zeros elsewhere."""

    @staticmethod
    def forward(ctx, tensor, root_rank, name, process_set):
        ctx.root_rank, ctx.process_set = root_rank, process_set
        return synchronize(start_broadcast(tensor, False, root_rank, name, process_set, True))

    @staticmethod
    def backward(ctx, grad_output):
        handle = start_allreduce(grad_output.contiguous(), False, None, Average, 1.0, 1.0, ctx.process_set, True)
        grad = synchronize(handle)
        if _native.world()["rank"] != ctx.root_rank:
            grad.zero_()
        return grad, None, None, None


class HorovodAlltoall(torch.autograd.Function):
    """`alltoall` with a gradient: the gradients go back the way the rows came."""

    @staticmethod
    def forward(ctx, tensor, splits, name, process_set):
        ctx.process_set = process_set
        output, received = synchronize(start_alltoall(tensor, splits, name, process_set, True, True))
        ctx.received = received
        ctx.mark_non_differentiable(received)
        return output, received

    @staticmethod
    def backward(ctx, grad_output, _):
        handle = start_alltoall(grad_output.contiguous(), ctx.received, None, ctx.process_set, True, True)
        grad, _ = synchronize(handle)
        return grad, None, None, None


def _scattered_gradient(grad: torch.Tensor, op: int, factor: float, process_set: ProcessSet) -> torch.Tensor:
    # Horovod's convention: the gradient of the average is the gathered gradient, that of the sum `size` times it.
    if op == Sum:
        factor *= process_set.size()
    grad = grad.contiguous() if factor == 1.0 else grad * factor
    return synchronize(start_allgather(grad, None, process_set, True))


class HorovodReducescatter(torch.autograd.Function):
    """`reducescatter` with a gradient: the allgather of the gradients."""

    @staticmethod
    def forward(ctx, tensor, name, op, process_set, prescale_factor, postscale_factor):
        ctx.arguments = (op, prescale_factor * postscale_factor, process_set)
        handle = start_reducescatter(tensor, name, op, prescale_factor, postscale_factor, process_set, True)
        return synchronize(handle)

    @staticmethod
    def backward(ctx, grad_output):
        return (_scattered_gradient(grad_output, *ctx.arguments),) + (None,) * 5


class HorovodGroupedReducescatter(torch.autograd.Function):
    """`grouped_reducescatter` with gradients."""

    @staticmethod
    def forward(ctx, name, op, process_set, prescale_factor, postscale_factor, *tensors):
        ctx.arguments = (op, prescale_factor * postscale_factor, process_set)
        handle = grouped_reducescatter_async(list(tensors), name, op, process_set, prescale_factor, postscale_factor)
        return tuple(synchronize(handle))

    @staticmethod
    def backward(ctx, *grad_output):
        return (None,) * 5 + tuple(_scattered_gradient(grad, *ctx.arguments) for grad in grad_output)

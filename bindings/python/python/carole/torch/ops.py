"""The collectives on torch tensors, with Horovod's names, signatures and defaults.

Tensors are dense and contiguous, in host memory or on a CUDA device. Results are new tensors of the same type, or
(functions whose name ends with an underscore) replace the contents of the tensor given. `op` and `average` exclude each
other.
Errors: a wrong call is a `carole.UsageError` (a ValueError); what fails in flight is a `HorovodInternalError`.
"""

from __future__ import annotations

from typing import Any, List

import torch

from .. import _native
from .._sets import global_process_set
from .._submit import (
    ALLGATHER,
    ALLREDUCE,
    ALLTOALL,
    BARRIER,
    BROADCAST,
    JOIN,
    REDUCESCATTER,
    Adasum,
    Average,
    Max,
    Min,
    Product,
    Sum,
)
from .asynchronous import (
    Handle,
    allgather_async,
    allreduce_async,
    allreduce_async_,
    alltoall_async,
    broadcast_async,
    broadcast_async_,
    detect_mutation,
    grouped_allgather_async,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter_async,
    handle_average_backwards_compatibility,
    note_write,
    poll,
    reducescatter_async,
    sparse_allreduce_async,
    start_allgather,
    start_allreduce,
    start_alltoall,
    start_broadcast,
    start_reducescatter,
    submit,
    synchronize,
)
from .autograd import (
    HorovodAllgather,
    HorovodAllreduce,
    HorovodAlltoall,
    HorovodBroadcast,
    HorovodGroupedAllgather,
    HorovodGroupedAllreduce,
    HorovodGroupedReducescatter,
    HorovodReducescatter,
)
from .compression import Compression

__all__ = [
    "Adasum", "Average", "Handle", "Max", "Min", "Product", "Sum", "allgather", "allgather_async",
    "allreduce", "allreduce_", "allreduce_async", "allreduce_async_", "alltoall", "alltoall_async",
    "barrier", "broadcast", "broadcast_", "broadcast_async", "broadcast_async_", "detect_mutation", "grouped_allgather",
    "grouped_allgather_async", "grouped_allreduce", "grouped_allreduce_", "grouped_allreduce_async",
    "grouped_allreduce_async_", "grouped_reducescatter", "grouped_reducescatter_async",
    "handle_average_backwards_compatibility", "join", "poll", "reducescatter", "reducescatter_async",
    "sparse_allreduce_async", "synchronize",
]  # fmt: skip


# The short way, which starts a collective and waits: None where the general way is to be taken.
_run = _native.run


def _is_recorded(tensor: Any) -> bool:
    # Where it is not, autograd's detour would cost more than a small collective does.
    return getattr(tensor, "requires_grad", False) and torch.is_grad_enabled()


def allreduce(tensor, average=None, name=None, compression=Compression.none, op=None, prescale_factor=1.0,
              postscale_factor=1.0, process_set=global_process_set) -> torch.Tensor:  # fmt: skip
    """The reduction of all ranks' tensors, on every rank. Differentiable: gradients are reduced alike."""
    if op is None or average is not None:
        op = handle_average_backwards_compatibility(op, average)
    if compression is Compression.none and not _is_recorded(tensor):
        result = _run(
            ALLREDUCE, tensor, False, "allreduce", name, process_set, op, prescale_factor, postscale_factor, 0, True
        )
        if result is not None:
            return result
        handle = start_allreduce(tensor, False, name, op, prescale_factor, postscale_factor, process_set, True)
        return synchronize(handle)
    compressed, ctx = compression.compress(tensor)
    reduced = HorovodAllreduce.apply(compressed, None, name, op, prescale_factor, postscale_factor, process_set)
    return compression.decompress(reduced, ctx)


def allreduce_(tensor, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
               process_set=global_process_set) -> torch.Tensor:  # fmt: skip
    """The reduction of all ranks' tensors, in place."""
    if op is None or average is not None:
        op = handle_average_backwards_compatibility(op, average)
    note_write(tensor)
    result = _run(
        ALLREDUCE, tensor, True, "allreduce", name, process_set, op, prescale_factor, postscale_factor, 0, True
    )
    if result is not None:
        return result
    return synchronize(start_allreduce(tensor, True, name, op, prescale_factor, postscale_factor, process_set, True))


def grouped_allreduce(tensors, average=None, name=None, compression=Compression.none, op=None,
                      prescale_factor=1.0, postscale_factor=1.0,
                      process_set=global_process_set) -> List[torch.Tensor]:  # fmt: skip
    """The reductions of several tensors: all of them succeed, or none. Differentiable."""
    op = handle_average_backwards_compatibility(op, average)
    pairs = [compression.compress(tensor) for tensor in tensors]
    reduced = HorovodGroupedAllreduce.apply(
        name, op, prescale_factor, postscale_factor, process_set, *[pair[0] for pair in pairs]
    )
    return [compression.decompress(tensor, pair[1]) for tensor, pair in zip(reduced, pairs)]


def grouped_allreduce_(tensors, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
                       process_set=global_process_set) -> List[torch.Tensor]:  # fmt: skip
    """The reductions of several tensors, in place."""
    return synchronize(
        grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    )


def allgather(tensor, name=None, process_set=global_process_set) -> torch.Tensor:
    """All ranks' tensors joined along the first dimension, which may differ. Differentiable."""
    if not _is_recorded(tensor):
        result = _run(ALLGATHER, tensor, None, "allgather", name, process_set, Sum, 1.0, 1.0, 0, True)
        if result is not None:
            return result
        return synchronize(start_allgather(tensor, name, process_set, True))
    return HorovodAllgather.apply(tensor, name, process_set)


def grouped_allgather(tensors, name=None, process_set=global_process_set) -> List[torch.Tensor]:
    """`allgather` of several tensors: all of them succeed, or none. Differentiable."""
    return list(HorovodGroupedAllgather.apply(name, process_set, *tensors))


def broadcast(tensor, root_rank, name=None, process_set=global_process_set) -> torch.Tensor:
    """The root's tensor, on every rank; `root_rank` counts in the whole job. Differentiable."""
    if not _is_recorded(tensor):
        result = _run(BROADCAST, tensor, False, "broadcast", name, process_set, Sum, 1.0, 1.0, root_rank, True)
        if result is not None:
            return result
        return synchronize(start_broadcast(tensor, False, root_rank, name, process_set, True))
    return HorovodBroadcast.apply(tensor, root_rank, name, process_set)


def broadcast_(tensor, root_rank, name=None, process_set=global_process_set) -> torch.Tensor:
    """The root's tensor, in place."""
    note_write(tensor)
    result = _run(BROADCAST, tensor, True, "broadcast", name, process_set, Sum, 1.0, 1.0, root_rank, True)
    if result is not None:
        return result
    return synchronize(start_broadcast(tensor, True, root_rank, name, process_set, True))


def alltoall(tensor, splits=None, name=None, process_set=global_process_set) -> Any:
    """Rank j gets the j-th split of every rank's rows. Returns the rows, and with `splits` also how many came
    from each rank. Differentiable."""
    if not _is_recorded(tensor):
        if splits is None:
            result = _run(ALLTOALL, tensor, None, "alltoall", name, process_set, Sum, 1.0, 1.0, 0, True)
            if result is not None:
                return result
        return synchronize(start_alltoall(tensor, splits, name, process_set, splits is not None, True))
    output, received = HorovodAlltoall.apply(tensor, splits, name, process_set)
    return output if splits is None else (output, received)


def reducescatter(tensor, name=None, compression=Compression.none, op=Average, process_set=global_process_set,
                  prescale_factor=1.0, postscale_factor=1.0) -> torch.Tensor:  # fmt: skip
    """This rank's rows of the reduction; the lower ranks get one row more where they do not divide evenly.
    Average and Sum only. Differentiable."""
    if compression is Compression.none and not _is_recorded(tensor):
        if op in (Average, Sum):
            result = _run(
                REDUCESCATTER, tensor, None, "reducescatter", name, process_set, op, prescale_factor,
                postscale_factor, 0, True,
            )  # fmt: skip
            if result is not None:
                return result
        handle = start_reducescatter(tensor, name, op, prescale_factor, postscale_factor, process_set, True)
        return synchronize(handle)
    compressed, ctx = compression.compress(tensor)
    reduced = HorovodReducescatter.apply(compressed, name, op, process_set, prescale_factor, postscale_factor)
    return compression.decompress(reduced, ctx)


def grouped_reducescatter(tensors, name=None, compression=Compression.none, op=Average,
                          process_set=global_process_set, prescale_factor=1.0,
                          postscale_factor=1.0) -> List[torch.Tensor]:  # fmt: skip
    """`reducescatter` of several tensors: all of them succeed, or none. Differentiable."""
    pairs = [compression.compress(tensor) for tensor in tensors]
    reduced = HorovodGroupedReducescatter.apply(
        name, op, process_set, prescale_factor, postscale_factor, *[pair[0] for pair in pairs]
    )
    return [compression.decompress(tensor, pair[1]) for tensor, pair in zip(reduced, pairs)]


def barrier(process_set=global_process_set) -> None:
    """Returns when all ranks have entered."""
    synchronize(submit(BARRIER, [], None, lambda _: None, None, process_set, waits=True))


def join(device=-1) -> int:
    """Says that this rank has no more data and waits until all ranks have said so; returns the last to do so.

    `device` is accepted for Horovod's sake: what a joined rank contributes needs no device.
    """
    del device
    finish = lambda outcome: outcome[2]  # noqa: E731
    return synchronize(submit(JOIN, [], None, finish, None, global_process_set, waits=True))

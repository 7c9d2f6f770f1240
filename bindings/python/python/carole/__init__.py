"""Carole: collective communication for distributed training.

    import carole, numpy as np
    carole.init()
    total = carole.allreduce(np.ones(4, np.float32), op=carole.Sum)

Started as `carolerun -np 4 python script.py`, the four processes each get an array of fours.
Every collective has an `_async` form that returns a handle for `poll` and `wait`; `carole.torch` has the same for
PyTorch with Horovod's names, and `DistributedOptimizer`.

What all collectives share:

Arrays may be anything in host memory with the buffer protocol (NumPy arrays, memoryview, bytearray,
array.array), with `__array_interface__` (NumPy arrays of ml_dtypes.bfloat16) or with DLPack (torch and JAX).
They must be C-contiguous, and are read where they are, without a copy. Until an operation is over its inputs
must not be written, nor its outputs touched.

Arrays may also be on a CUDA device: anything with `__cuda_array_interface__` (CuPy, Numba) or with DLPack (torch,
JAX). All arrays of an operation are then on one device. An operation waits for the stream that makes its inputs: torch's
current one, that of the interface's version 3, else the legacy default stream, with which DLPack's producers are asked
to order themselves. `wait` lets the stream that torch or the interface then names wait for the results, and returns at
once; where nobody names one, it returns when they are there. They go through pinned memory of the host.

Results are new NumPy arrays (torch tensors for torch tensors; memoryviews where NumPy is not installed), or the
caller's array where one is given: `out=`, and every function whose name ends with an underscore. On a device they are
arrays of the inputs' library (CuPy, JAX, Numba, torch, or another with `from_dlpack`); where it has none, a
`DeviceOutput`, which has both protocols: `cupy.asarray`, `torch.from_dlpack`.

Names: an operation meets those of the other ranks that have the same name and process set. Without a name,
operations meet in their order of submission per process set and collective, which is safe only from one thread.
A name can be used again once its operation is over.

Errors, in every function here: `UsageError` (a ValueError) for a call that can never work; where it concerns
an array or an option, the other ranks get `MismatchError` for this operation, with the reason. `MismatchError`
on all ranks where they disagree; `BrokenError` when a process is lost (`reform` goes on with the others);
`ShutdownError` after a shutdown. `carole.elastic` trains on through such losses.
"""

from ._errors import (
    BrokenError,
    Error,
    HorovodInternalError,
    MismatchError,
    ShutdownError,
    TimeoutError,
    UsageError,
)
from ._life import (
    cross_rank,
    cross_size,
    epoch,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    rank,
    reform,
    shutdown,
    size,
)
from ._movements import (
    allgather,
    allgather_async,
    alltoall,
    alltoall_async,
    barrier,
    barrier_async,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    gather,
    gather_async,
    grouped_allgather,
    grouped_allgather_async,
    join,
    join_async,
    recv,
    recv_any,
    recv_any_async,
    recv_async,
    scatter,
    scatter_async,
    send,
    send_async,
)
from ._native import DeviceOutput, Handle, Output, Persistent, __version__
from ._persistent import (
    allgather_init,
    allreduce_init,
    alltoall_init,
    broadcast_init,
    grouped_allreduce_init,
    reduce_init,
    reducescatter_init,
)
from ._reductions import (
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    reduce,
    reduce_async,
    reducescatter,
    reducescatter_async,
)
from ._run import run
from ._sets import ProcessSet, add_process_set, global_process_set, remove_process_set
from ._shared import shared_zeros
from ._submit import (
    Adasum,
    Average,
    BitAnd,
    BitOr,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
    poll,
    synchronize,
    wait,
)

# Tracebacks name the exceptions as users import them.
for _one in (BrokenError, Error, HorovodInternalError, MismatchError, ShutdownError, TimeoutError, UsageError):
    _one.__module__ = __name__
del _one

__all__ = [
    "__version__",
    "Adasum",
    "Average",
    "BitAnd",
    "BitOr",
    "BrokenError",
    "DeviceOutput",
    "Error",
    "Handle",
    "HorovodInternalError",
    "Max",
    "Min",
    "MismatchError",
    "Output",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "ShutdownError",
    "Sum",
    "TimeoutError",
    "UsageError",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "barrier_async",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "cross_rank",
    "cross_size",
    "epoch",
    "gather",
    "gather_async",
    "global_process_set",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "join_async",
    "local_rank",
    "local_size",
    "poll",
    "rank",
    "recv",
    "recv_any",
    "recv_any_async",
    "recv_async",
    "reduce",
    "reduce_async",
    "reducescatter",
    "reducescatter_async",
    "reform",
    "remove_process_set",
    "run",
    "scatter",
    "scatter_async",
    "send",
    "send_async",
    "shared_zeros",
    "shutdown",
    "size",
    "synchronize",
    "wait",
]

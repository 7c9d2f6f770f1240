"""Carole: collective communication for distributed training.

    import carole, numpy as np
    carole.init()
    total = carole.allreduce(np.ones(4, np.float32), op=carole.Sum)

Started as `carolerun -np 4 python script.py`, the four processes each get an array of fours.
Every collective has an `_async` form that returns a handle for `poll` and `wait`; `carole.torch` has the same for
PyTorch with Horovod's names, and `DistributedOptimizer`. See `help(carole._ops)` for what all of them share.
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
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)
from ._native import Handle, Output, __version__
from ._ops import (
    Adasum,
    Average,
    BitAnd,
    BitOr,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
    allgather,
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
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
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    join,
    join_async,
    poll,
    recv,
    recv_async,
    reduce,
    reduce_async,
    reducescatter,
    reducescatter_async,
    scatter,
    scatter_async,
    send,
    send_async,
    synchronize,
    wait,
)
from ._sets import ProcessSet, add_process_set, global_process_set, remove_process_set

__all__ = [name for name in dir() if not name.startswith("_")]

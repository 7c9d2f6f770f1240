"""Carole for PyTorch, with Horovod's names: `import carole.torch as hvd`."""

from .. import cross_rank, cross_size, is_homogeneous, is_initialized, local_rank, local_size, rank, shutdown
from .. import size
from .._errors import HorovodInternalError
from .._sets import ProcessSet, add_process_set, global_process_set, remove_process_set
from .compression import Compression
from .functions import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from .life import init
from .ops import *  # noqa: F403 (its __all__ is the list)
from .ops import __all__ as _operations
from .ops import (
    HorovodAllgather,
    HorovodAllreduce,
    HorovodAlltoall,
    HorovodBroadcast,
    HorovodGroupedAllgather,
    HorovodGroupedAllreduce,
    HorovodGroupedReducescatter,
    HorovodReducescatter,
)
from .optimizer import DistributedOptimizer

__all__ = [
    "Compression",
    "DistributedOptimizer",
    "HorovodAllgather",
    "HorovodAllreduce",
    "HorovodAlltoall",
    "HorovodBroadcast",
    "HorovodGroupedAllgather",
    "HorovodGroupedAllreduce",
    "HorovodGroupedReducescatter",
    "HorovodInternalError",
    "HorovodReducescatter",
    "ProcessSet",
    "add_process_set",
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "cross_rank",
    "cross_size",
    "global_process_set",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "remove_process_set",
    "shutdown",
    "size",
]
__all__ += _operations

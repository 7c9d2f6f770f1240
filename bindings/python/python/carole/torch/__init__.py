"""Carole for PyTorch, with Horovod's names: `import carole.torch as hvd`."""

from .. import cross_rank, cross_size, is_homogeneous, is_initialized, local_rank, local_size, rank, shutdown
from .. import size
from .._basics import (
    ccl_built,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rocm_built,
    start_timeline,
    stop_timeline,
)
from .._errors import HorovodInternalError, HostsUpdatedInterrupt
from .._persistent import (
    allgather_init,
    allreduce_init,
    alltoall_init,
    broadcast_init,
    grouped_allreduce_init,
    reduce_init,
    reducescatter_init,
)
from .._sets import ProcessSet, add_process_set, global_process_set, remove_process_set
from . import elastic
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
from .memory import shared_zeros
from .optimizer import DistributedOptimizer
from .sync_batch_norm import SyncBatchNorm

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
    "HostsUpdatedInterrupt",
    "ProcessSet",
    "SyncBatchNorm",
    "add_process_set",
    "allgather_init",
    "allgather_object",
    "allreduce_init",
    "alltoall_init",
    "broadcast_init",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allreduce_init",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "reduce_init",
    "reducescatter_init",
    "remove_process_set",
    "rocm_built",
    "shared_zeros",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]
__all__ += _operations

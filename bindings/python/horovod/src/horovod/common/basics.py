"""`HorovodBasics`: the job, as methods of an object."""

import carole
from carole import _basics


class HorovodBasics:
    """What `horovod.torch` has as functions."""

    Average, Sum, Adasum = carole.Average, carole.Sum, carole.Adasum
    Min, Max, Product = carole.Min, carole.Max, carole.Product

    def __init__(self, pkg_path=None, *args):
        del pkg_path, args

    def init(self, comm=None, process_sets=None):
        """Joins the job."""
        if comm is not None:
            raise carole.UsageError("init(comm=...) is not supported; for some of the ranks use process_sets=[...]")
        carole.init(process_sets=None if process_sets == "dynamic" else process_sets)

    shutdown = staticmethod(carole.shutdown)
    is_initialized = staticmethod(carole.is_initialized)
    rank = staticmethod(carole.rank)
    size = staticmethod(carole.size)
    local_rank = staticmethod(carole.local_rank)
    local_size = staticmethod(carole.local_size)
    cross_rank = staticmethod(carole.cross_rank)
    cross_size = staticmethod(carole.cross_size)
    is_homogeneous = staticmethod(carole.is_homogeneous)
    mpi_threads_supported = staticmethod(_basics.mpi_threads_supported)
    mpi_enabled = staticmethod(_basics.mpi_enabled)
    mpi_built = staticmethod(_basics.mpi_built)
    gloo_enabled = staticmethod(_basics.gloo_enabled)
    gloo_built = staticmethod(_basics.gloo_built)
    nccl_built = staticmethod(_basics.nccl_built)
    ddl_built = staticmethod(_basics.ddl_built)
    ccl_built = staticmethod(_basics.ccl_built)
    cuda_built = staticmethod(_basics.cuda_built)
    rocm_built = staticmethod(_basics.rocm_built)
    start_timeline = staticmethod(_basics.start_timeline)
    stop_timeline = staticmethod(_basics.stop_timeline)

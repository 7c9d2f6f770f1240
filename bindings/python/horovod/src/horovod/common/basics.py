"""`HorovodBasics`: the job, as methods of an object."""

import carole
from carole import _timeline


def _no():
    return False


def _yes():
    return True


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

    # What follows is repeated from carole.torch, which cannot be imported where torch is missing.
    def mpi_threads_supported(self):
        """Whether MPI may be called from several threads: no, since there is none."""
        carole.rank()
        return False

    mpi_enabled = mpi_built = ddl_built = ccl_built = rocm_built = staticmethod(_no)
    gloo_enabled = gloo_built = cuda_built = staticmethod(_yes)

    def nccl_built(self):
        """NCCL's version, or 0 where it is not used."""
        return 0

    def start_timeline(self, file_path, mark_cycles=False):
        """Writes a Chrome trace of this rank's operations from now on. There are no cycles to mark."""
        del mark_cycles
        _timeline.start(file_path, carole.rank())

    def stop_timeline(self):
        """Ends the timeline that `start_timeline` began."""
        carole.rank()
        _timeline.stop()

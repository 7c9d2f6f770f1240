"""What Horovod's modules say about how they were built, and the timeline."""

from __future__ import annotations

from . import _life, _timeline


def mpi_threads_supported() -> bool:
    """Whether MPI may be called from several threads: no, since this build uses no MPI."""
    _life.rank()
    return False


def mpi_enabled() -> bool:
    """Whether MPI is in use: no."""
    return False


def mpi_built() -> bool:
    """Whether the wheel was built with MPI: no. Under mpirun it takes its rank from there, and uses its own links."""
    return False


def gloo_enabled() -> bool:
    """Whether links that need no MPI are in use: yes. They are Carole's own and stand in Gloo's place."""
    return True


def gloo_built() -> bool:
    """Whether links that need no MPI are built in: yes. They are Carole's own and stand in Gloo's place."""
    return True


def nccl_built() -> int:
    """NCCL's version, or 0: this build does not use it."""
    return 0


def ddl_built() -> bool:
    """Whether IBM's DDL is built in: no."""
    return False


def ccl_built() -> bool:
    """Whether Intel's oneCCL is built in: no."""
    return False


def cuda_built() -> bool:
    """Whether tensors on NVIDIA's GPUs are taken: yes. The driver is looked for when the first one comes."""
    return True


def rocm_built() -> bool:
    """Whether tensors on AMD's GPUs are taken: not by this build."""
    return False


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Writes a Chrome trace of this rank's operations from now on.

    Args:
        file_path: rank 0 writes this file; rank 3 writes `timeline.3.json` where it is `timeline.json`.
        mark_cycles: accepted for Horovod's sake; there are no cycles.

    Each operation is one span, from its submission to the taking of its result. The file is valid JSON at any
    moment.
    """
    del mark_cycles
    _timeline.start(file_path, _life.rank())


def stop_timeline() -> None:
    """Ends the timeline that `start_timeline` began."""
    _life.rank()
    _timeline.stop()

"""Open MPI and MPICH, through mpi4py, on views of the tensors that are made beforehand."""

from __future__ import annotations

from typing import Dict

from mpi4py import MPI

from . import Library, Tensors, Way


class Mpi(Library):
    def __init__(self) -> None:
        self._world = MPI.COMM_WORLD
        self.rank, self.ranks = self._world.rank, self._world.size
        self.version = MPI.Get_library_version().split(",")[0].split("\n")[0].replace("\t", " ").strip("\0 ")

    def ways(self, kind: str, inputs: Tensors, outputs: Tensors) -> Dict[str, Way]:
        world = self._world
        sent = [[tensor.numpy(), MPI.FLOAT] for tensor in inputs]
        received = [[tensor.numpy(), MPI.FLOAT] for tensor in outputs]
        if kind == "set":
            return self._set(sent)
        return {
            "allreduce": {"blocking": lambda: world.Allreduce(MPI.IN_PLACE, sent[0], MPI.SUM)},
            "allgather": {"blocking": lambda: world.Allgather(sent[0], received[0])},
            "reducescatter": {"blocking": lambda: world.Reduce_scatter_block(sent[0], received[0], MPI.SUM)},
            "broadcast": {"blocking": lambda: world.Bcast(sent[0], 0)},
            "alltoall": {"blocking": lambda: world.Alltoall(sent[0], received[0])},
        }[kind]

    def _set(self, tensors: list) -> Dict[str, Way]:
        world = self._world

        def blocking() -> None:
            for tensor in tensors:
                world.Allreduce(MPI.IN_PLACE, tensor, MPI.SUM)

        def nonblocking() -> None:
            MPI.Request.Waitall([world.Iallreduce(MPI.IN_PLACE, tensor, MPI.SUM) for tensor in tensors])

        return {"blocking": blocking, "nonblocking": nonblocking}

    def leave(self) -> None:
        MPI.Finalize()

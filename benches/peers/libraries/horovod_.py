"""Horovod, on Gloo or on MPI: its launcher's environment decides."""

from __future__ import annotations

from typing import Dict

import horovod
import horovod.torch as hvd

from . import Cannot, Library, Tensors, Way


class Horovod(Library):
    def __init__(self) -> None:
        hvd.init()
        self.rank, self.ranks = hvd.rank(), hvd.size()
        self.version = f"Horovod {horovod.__version__}"

    def ways(self, kind: str, inputs: Tensors, outputs: Tensors) -> Dict[str, Way]:
        tensor = inputs[0]
        if kind == "set":
            return self._set(inputs)
        if kind == "reducescatter" and not hasattr(hvd, "reducescatter"):
            raise Cannot("this Horovod has no reducescatter")

        def allreduce() -> None:
            hvd.allreduce_(tensor, op=hvd.Sum, name=f"one.{tensor.numel()}")

        def broadcast() -> None:
            hvd.broadcast_(tensor, 0, name=f"root.{tensor.numel()}")

        return {
            "allreduce": {"by name": allreduce},
            "allgather": {"new output": lambda: [hvd.allgather(tensor, name=f"all.{tensor.numel()}")]},
            "reducescatter": {
                "new output": lambda: [hvd.reducescatter(tensor, op=hvd.Sum, name=f"part.{tensor.numel()}")]
            },
            "broadcast": {"by name": broadcast},
            "alltoall": {"new output": lambda: [hvd.alltoall(tensor, name=f"each.{tensor.numel()}")]},
        }[kind]

    def _set(self, inputs: Tensors) -> Dict[str, Way]:
        names = [f"{len(inputs)}.{i}" for i in range(len(inputs))]

        def each() -> None:
            handles = [hvd.allreduce_async_(tensor, op=hvd.Sum, name=name) for tensor, name in zip(inputs, names)]
            for handle in handles:
                hvd.synchronize(handle)

        return {"each": each}

    def leave(self) -> None:
        hvd.shutdown()

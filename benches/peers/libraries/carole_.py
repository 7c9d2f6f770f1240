"""Carole, through the face for PyTorch that has Horovod's names."""

from __future__ import annotations

from typing import Dict

import carole
import carole.torch as hvd
import torch

from . import Cannot, Library, Tensors, Way


class Carole(Library):
    def __init__(self) -> None:
        hvd.init()
        self.rank, self.ranks = hvd.rank(), hvd.size()
        self.version = carole.__version__

    def ways(self, kind: str, inputs: Tensors, outputs: Tensors) -> Dict[str, Way]:
        return {
            "allreduce": self._allreduce,
            "set": self._set,
            "allgather": self._allgather,
            "reducescatter": self._reducescatter,
            "broadcast": self._broadcast,
            "alltoall": self._alltoall,
        }[kind](inputs, outputs)

    def _allreduce(self, inputs: Tensors, _: Tensors) -> Dict[str, Way]:
        tensor = inputs[0]

        def by_name() -> None:
            hvd.allreduce_(tensor, op=hvd.Sum, name="one")

        planned = hvd.allreduce_init(tensor, op=hvd.Sum, out=tensor)
        return {"by name": by_name, "planned": lambda: _nothing(planned())}

    def _set(self, inputs: Tensors, _: Tensors) -> Dict[str, Way]:
        names = [f"gradient.{i}" for i in range(len(inputs))]

        def each() -> None:
            handles = [hvd.allreduce_async_(tensor, op=hvd.Sum, name=name) for tensor, name in zip(inputs, names)]
            for handle in handles:
                hvd.synchronize(handle)

        def blocking() -> None:
            for tensor, name in zip(inputs, names):
                hvd.allreduce_(tensor, op=hvd.Sum, name=name)

        def grouped() -> None:
            hvd.grouped_allreduce_(inputs, op=hvd.Sum, name="all")

        planned = hvd.grouped_allreduce_init(inputs, op=hvd.Sum, out=inputs)
        return {"each": each, "blocking": blocking, "grouped": grouped, "planned": lambda: _nothing(planned())}

    def _allgather(self, inputs: Tensors, _: Tensors) -> Dict[str, Way]:
        # There is no out= for an allgather: the output is new memory each time, and what its pages cost counts.
        return {"new output": lambda: [hvd.allgather(inputs[0], name="one")]}

    def _reducescatter(self, inputs: Tensors, outputs: Tensors) -> Dict[str, Way]:
        def into_output() -> None:
            carole.reducescatter(inputs[0], carole.Sum, name="one", out=outputs[0])

        def new_output() -> Tensors:
            return [hvd.reducescatter(inputs[0], op=hvd.Sum, name="one")]

        # To look at a tensor through DLPack takes longer than a small reducescatter does.
        is_small = inputs[0].numel() <= 16 << 10
        return {"new output": new_output} if is_small else {"into output": into_output}

    def _broadcast(self, inputs: Tensors, _: Tensors) -> Dict[str, Way]:
        def by_name() -> None:
            hvd.broadcast_(inputs[0], 0, name="one")

        return {"by name": by_name}

    def _alltoall(self, inputs: Tensors, _: Tensors) -> Dict[str, Way]:
        return {"new output": lambda: [hvd.alltoall(inputs[0], name="one")]}

    def leave(self) -> None:
        hvd.shutdown()


class Shared(Carole):
    """Its tensors live in memory that the ranks share, which only an allreduce makes use of."""

    def ways(self, kind: str, inputs: Tensors, outputs: Tensors) -> Dict[str, Way]:
        if kind not in ("allreduce", "set"):
            raise Cannot("tensors in shared memory are as any others there")
        return super().ways(kind, inputs, outputs)

    def empty(self, count: int) -> torch.Tensor:
        return hvd.shared_zeros(count)


def _nothing(_: object) -> None:
    """In place: there are no outputs to look at."""

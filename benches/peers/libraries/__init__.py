"""The libraries, each behind the same face. A rank's process makes exactly one of them."""

from __future__ import annotations

import importlib
from typing import Any, Callable, Dict, List, Optional

import torch

Tensors = List[torch.Tensor]
# Does the work once. Returns the outputs where the library insists on making them itself, else None.
Way = Callable[[], Optional[Tensors]]


class Cannot(Exception):
    """The library has no such collective."""


class Library:
    """One library in one rank; making it joins the job."""

    rank: int
    ranks: int
    version: str

    def ways(self, kind: str, inputs: Tensors, outputs: Tensors) -> Dict[str, Way]:
        """The ways in which this library can do it, the most promising first. Inputs and outputs of allreduce, set and
        broadcast are the same tensors. Raises `Cannot`."""
        raise NotImplementedError

    def empty(self, count: int) -> torch.Tensor:
        """Memory for a tensor: the common kind, so that all libraries work on the same."""
        return torch.empty(count, dtype=torch.float32)

    def leave(self) -> None:
        """Leaves the job."""


_PLACES = {
    "carole": ("carole_", "Carole"),
    "shared": ("carole_", "Shared"),
    "mpi": ("mpi", "Mpi"),
    "gloo": ("gloo", "Gloo"),
    "horovod": ("horovod_", "Horovod"),
    "copy": ("limits", "Copy"),
    "stream": ("limits", "Stream"),
}


def join(name: str) -> Library:
    """Joins the job as a rank of the library with this name."""
    module, kind = _PLACES[name]
    made: Any = getattr(importlib.import_module(f".{module}", __name__), kind)
    return made()

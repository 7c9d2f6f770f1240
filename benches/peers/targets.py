"""How fast Carole is meant to be beside the others, as data.

Machines like these drift by a factor of 2 within minutes, so nothing absolute is asked for: each target is a ratio
of two medians of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List

from .workloads import MIB, Work

MPI = ("openmpi", "mpich")
HOROVOD_GLOO = ("horovod-gloo",)
HOROVOD_MPI = ("horovod-mpi",)
GLOO = ("gloo",)
COPY = ("copy",)
STREAM = ("stream",)
BEST = ()  # the fastest of the peers


@dataclass(frozen=True)
class Target:
    """Carole shall be at least `least` times as fast as the fastest of `against` (all peers if empty)."""

    against: tuple
    least: float
    words: str


# Two ranks, over shared memory.
PAIR = {
    "allreduce 4 B": Target(MPI, 0.25, "MPI"),
    "allreduce 1 KiB": Target(BEST, 0.4, "best"),
    "allreduce 64 KiB": Target(BEST, 2.0, "best"),
    "allreduce 1 MiB": Target(BEST, 1.7, "best"),
    "allreduce 16 MiB": Target(BEST, 1.4, "best"),
    "allreduce 64 MiB": Target(BEST, 3.0, "best"),
    "allreduce 256 MiB": Target(BEST, 3.0, "best"),
    "ResNet-50": Target(BEST, 1.6, "best"),
    "GPT-2 small": Target(BEST, 1.8, "best"),
    "1000 x 256 B": Target(BEST, 0.8, "best"),
}


def targets(work: Work, ranks: int, transport: str) -> List[Target]:
    """What is asked for here; nothing for the collectives that have no number in the plan."""
    if work.kind not in ("allreduce", "set"):
        return []
    if transport == "tcp":
        if work.name != "allreduce 64 MiB" or ranks != 2:
            return []
        return [Target(GLOO, 1.5, "Gloo"), Target(STREAM, 0.8, "stream")]
    asked = []
    if ranks == 2:
        asked.append(PAIR[work.name])
        if work.kind == "allreduce" and work.size >= 64 * MIB:
            asked.append(Target(COPY, 1 / 1.2, "copy"))
    elif work.size > 4:
        asked.append(Target(BEST, 1.0, "best"))
    elif ranks == 4:
        asked.append(Target(("openmpi",), 0.5, "Open MPI"))
    return [*asked, Target(HOROVOD_GLOO, 4.0, "Horovod/Gloo"), Target(HOROVOD_MPI, 1.0, "Horovod/MPI")]

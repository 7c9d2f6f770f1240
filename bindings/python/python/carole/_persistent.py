"""Collectives that are planned once and started many times, as MPI 4.0 has them.

    mean = carole.allreduce_init(gradient, out=gradient)     # on all ranks; agreed once
    for batch in data:
        ...                                                  # fill gradient
        mean()                                               # or mean.start(), other work, mean.wait()

A plan is matched with the other ranks' as an operation is: by its name, or by order. It reads the arrays that it was
planned with at every start, and writes its results to the same arrays each time. All members of the process set start
it equally often, and wait for it before they start it again; nothing is agreed on any more, so within a host it is much
faster than an operation by name. `close()` (or the end of a `with` block) gives it up; a rank has to before `join`.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence

from ._native import Persistent
from ._submit import ALLGATHER, ALLREDUCE, ALLTOALL, BROADCAST, REDUCE, REDUCESCATTER, Average, Set, plan


def allreduce_init(
    tensor: Any,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    out: Any = None,
) -> Persistent:
    """Plans an `allreduce`. Arguments are those of `allreduce`; `out=tensor` reduces in place."""
    outs = None if out is None else [out]
    return plan(
        ALLREDUCE,
        [tensor],
        name=name,
        process_set=process_set,
        outs=outs,
        op=op,
        pre=prescale_factor,
        post=postscale_factor,
    )


def grouped_allreduce_init(
    tensors: Sequence[Any],
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    out: Optional[Sequence[Any]] = None,
) -> Persistent:
    """Plans a `grouped_allreduce`; `out=tensors` reduces in place."""
    return plan(
        ALLREDUCE,
        tensors,
        name=name,
        process_set=process_set,
        outs=out,
        single=False,
        op=op,
        pre=prescale_factor,
        post=postscale_factor,
    )


def reducescatter_init(
    tensor: Any,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    out: Any = None,
) -> Persistent:
    """Plans a `reducescatter`."""
    outs = None if out is None else [out]
    return plan(
        REDUCESCATTER,
        [tensor],
        name=name,
        process_set=process_set,
        outs=outs,
        op=op,
        pre=prescale_factor,
        post=postscale_factor,
    )


def reduce_init(
    tensor: Any,
    root: int = 0,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    out: Any = None,
) -> Persistent:
    """Plans a `reduce`; its result is None on all ranks but the root."""
    outs = None if out is None else [out]
    return plan(
        REDUCE,
        [tensor],
        name=name,
        process_set=process_set,
        outs=outs,
        op=op,
        pre=prescale_factor,
        post=postscale_factor,
        root=root,
    )


def broadcast_init(
    tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None, out: Any = None
) -> Persistent:
    """Plans a `broadcast`; `out=tensor` receives in place."""
    outs = None if out is None else [out]
    return plan(BROADCAST, [tensor], name=name, process_set=process_set, outs=outs, root=root)


def allgather_init(tensor: Any, *, name: Optional[str] = None, process_set: Set = None) -> Persistent:
    """Plans an `allgather`. How many rows each rank has is part of the plan."""
    return plan(ALLGATHER, [tensor], name=name, process_set=process_set)


def alltoall_init(
    tensor: Any,
    splits: Optional[Sequence[int]] = None,
    *,
    name: Optional[str] = None,
    process_set: Set = None,
) -> Persistent:
    """Plans an `alltoall`. The splits are part of the plan."""
    return plan(ALLTOALL, [tensor], name=name, process_set=process_set, splits=splits)

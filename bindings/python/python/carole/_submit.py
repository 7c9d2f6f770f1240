"""What all collectives share: operations, handles, and the way into the core."""

from __future__ import annotations

import enum
from typing import Any, Optional, Sequence, Tuple, Union

from . import _native
from ._errors import UsageError
from ._native import Handle, Persistent
from ._sets import ProcessSet, set_id


class ReduceOp(enum.IntEnum):
    """How values of the ranks are combined."""

    Average = 0
    Sum = 1
    Adasum = 2
    Min = 3
    Max = 4
    Product = 5
    BitAnd = 6
    BitOr = 7


Average = ReduceOp.Average
Sum = ReduceOp.Sum
Adasum = ReduceOp.Adasum
Min = ReduceOp.Min
Max = ReduceOp.Max
Product = ReduceOp.Product
BitAnd = ReduceOp.BitAnd
BitOr = ReduceOp.BitOr

Set = Union[ProcessSet, int, None]

# The codes of the collectives, as the core knows them.
ALLREDUCE, ALLGATHER, BROADCAST, REDUCESCATTER, ALLTOALL = 0, 1, 2, 3, 4
REDUCE, GATHER, SCATTER, BARRIER, JOIN = 5, 6, 7, 8, 9


def submit(
    collective: int,
    tensors: Sequence[Any],
    *,
    name: Optional[str],
    process_set: Set,
    outs: Optional[Sequence[Any]] = None,
    single: bool = True,
    op: int = Sum,
    pre: float = 1.0,
    post: float = 1.0,
    root: int = 0,
    join_average: str = "size",
    splits: Optional[Sequence[int]] = None,
    waits: bool = False,
) -> Handle:
    tensors, outs, refused = lists(tensors, outs, single)
    return _native.submit(
        collective, tensors, outs, single, name, set_id(process_set), op, pre, post, root, join_average,
        splits, refused, waits,
    )  # fmt: skip


def plan(
    collective: int,
    tensors: Sequence[Any],
    *,
    name: Optional[str],
    process_set: Set,
    outs: Optional[Sequence[Any]] = None,
    single: bool = True,
    op: int = Sum,
    pre: float = 1.0,
    post: float = 1.0,
    root: int = 0,
    splits: Optional[Sequence[int]] = None,
) -> Persistent:
    tensors, outs, refused = lists(tensors, outs, single)
    return _native.plan(
        collective, tensors, outs, single, name, set_id(process_set), op, pre, post, root, splits, refused
    )


def lists(
    tensors: Sequence[Any], outs: Optional[Sequence[Any]], single: bool
) -> Tuple[Sequence[Any], Optional[Sequence[Any]], Optional[str]]:
    """The arrays of an operation as lists, and why they are none, if so."""
    if single:
        return tensors, outs, None
    try:
        tensors = list(tensors)
        outs = None if outs is None else list(outs)
    except TypeError:
        return [], None, "a grouped operation takes lists of arrays"
    return tensors, outs, None if tensors else "a grouped operation takes at least one array"


def checked(handle: Any, call: str) -> Handle:
    """What a call that takes a handle was given, if it is one."""
    if not isinstance(handle, Handle):
        raise UsageError(f"{handle!r} is no handle: {call}() takes what an _async function returned")
    return handle


def poll(handle: Handle) -> bool:
    """Whether an operation is over (with or without success). Never blocks."""
    return checked(handle, "poll").poll()


def wait(handle: Handle, timeout: Optional[float] = None) -> Any:
    """Waits for an operation and returns its result, once.

    Args:
        handle: what an `_async` function returned.
        timeout: seconds to wait at most; None for no limit.
    Raises:
        TimeoutError: when the time is over; the operation goes on and can be waited for again.
        KeyboardInterrupt: within 0.1 s of Ctrl-C; the same holds.
        Error: what the operation ended with.
    """
    return checked(handle, "wait").wait(timeout)


synchronize = wait

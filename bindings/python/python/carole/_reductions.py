"""The collectives that combine values: allreduce, reducescatter, reduce. What they share is in `carole`."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence

from ._native import Handle
from ._submit import ALLREDUCE, REDUCE, REDUCESCATTER, Average, Set, submit


def allreduce_async(
    tensor: Any,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
    out: Any = None,
) -> Handle:
    """Starts an `allreduce`; `wait` gives its result."""
    return submit(
        ALLREDUCE, [tensor], outs=None if out is None else [out], name=name, process_set=process_set, op=op,
        pre=prescale_factor, post=postscale_factor, join_average=join_average,
    )  # fmt: skip


def allreduce(
    tensor: Any,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
    out: Any = None,
) -> Any:
    """The reduction of all ranks' arrays, on every rank; the same bits everywhere.

    Args:
        tensor: this rank's array; shape and type are the same on all ranks.
        op: Average, Sum, Min, Max, Product, Adasum, BitAnd or BitOr. Integers wrap, and their Average rounds
            down; for bool Sum is *or*, Product *and*.
        name: see the module's text.
        prescale_factor: what every input is multiplied with first (integers are then rounded down one by one).
        postscale_factor: what the result is multiplied with.
        process_set: the ranks that take part; all by default.
        join_average: whether Average divides by the set's "size" or by the ranks still "present" (see `join`).
        out: an array for the result, of the same shape and type; `tensor` itself for in place.
    Returns:
        `out`, or a new array of the same shape and type.
    """
    return submit(
        ALLREDUCE, [tensor], outs=None if out is None else [out], name=name, process_set=process_set, op=op,
        pre=prescale_factor, post=postscale_factor, join_average=join_average, waits=True,
    ).wait()  # fmt: skip


def allreduce_async_(
    tensor: Any,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
) -> Handle:
    """Starts an `allreduce_`; `wait` gives its result."""
    return allreduce_async(
        tensor, op, name=name, prescale_factor=prescale_factor, postscale_factor=postscale_factor,
        process_set=process_set, join_average=join_average, out=tensor,
    )  # fmt: skip


def allreduce_(
    tensor: Any,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
) -> Any:
    """`allreduce` in place: the result replaces the contents of `tensor`, which is returned."""
    return allreduce(
        tensor, op, name=name, prescale_factor=prescale_factor, postscale_factor=postscale_factor,
        process_set=process_set, join_average=join_average, out=tensor,
    )  # fmt: skip


def grouped_allreduce_async(
    tensors: Sequence[Any],
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
    out: Optional[Sequence[Any]] = None,
) -> Handle:
    """Starts a `grouped_allreduce`; `wait` gives its result."""
    return submit(
        ALLREDUCE, tensors, outs=out, single=False, name=name, process_set=process_set, op=op,
        pre=prescale_factor, post=postscale_factor, join_average=join_average,
    )  # fmt: skip


def grouped_allreduce(
    tensors: Sequence[Any],
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
    out: Optional[Sequence[Any]] = None,
) -> List[Any]:
    """`allreduce` of several arrays as one operation: all of them succeed, or none.

    The arrays may differ in shape and type. Returns a list in their order.
    """
    return submit(
        ALLREDUCE, tensors, outs=out, single=False, name=name, process_set=process_set, op=op,
        pre=prescale_factor, post=postscale_factor, join_average=join_average, waits=True,
    ).wait()  # fmt: skip


def grouped_allreduce_async_(
    tensors: Sequence[Any],
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
) -> Handle:
    """Starts a `grouped_allreduce_`; `wait` gives its result."""
    return grouped_allreduce_async(
        tensors, op, name=name, prescale_factor=prescale_factor, postscale_factor=postscale_factor,
        process_set=process_set, join_average=join_average, out=tensors,
    )  # fmt: skip


def grouped_allreduce_(
    tensors: Sequence[Any],
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
) -> List[Any]:
    """`grouped_allreduce` in place."""
    return grouped_allreduce(
        tensors, op, name=name, prescale_factor=prescale_factor, postscale_factor=postscale_factor,
        process_set=process_set, join_average=join_average, out=tensors,
    )  # fmt: skip


def reducescatter_async(
    tensor: Any,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
    out: Any = None,
) -> Handle:
    """Starts a `reducescatter`; `wait` gives its result."""
    return submit(
        REDUCESCATTER, [tensor], outs=None if out is None else [out], name=name, process_set=process_set,
        op=op, pre=prescale_factor, post=postscale_factor, join_average=join_average,
    )  # fmt: skip


def reducescatter(
    tensor: Any,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
    out: Any = None,
) -> Any:
    """This rank's rows of the reduction of all ranks' arrays.

    The rows are dealt in rank order; where they do not divide evenly, the lower ranks get one row more.
    Arguments are those of `allreduce`; `out` has this rank's rows.
    """
    return submit(
        REDUCESCATTER, [tensor], outs=None if out is None else [out], name=name, process_set=process_set,
        op=op, pre=prescale_factor, post=postscale_factor, join_average=join_average, waits=True,
    ).wait()  # fmt: skip


def grouped_reducescatter_async(
    tensors: Sequence[Any],
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
) -> Handle:
    """Starts a `grouped_reducescatter`; `wait` gives its result."""
    return submit(
        REDUCESCATTER, tensors, single=False, name=name, process_set=process_set, op=op,
        pre=prescale_factor, post=postscale_factor, join_average=join_average,
    )  # fmt: skip


def grouped_reducescatter(
    tensors: Sequence[Any],
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
) -> List[Any]:
    """`reducescatter` of several arrays as one operation. Returns a list in their order."""
    return submit(
        REDUCESCATTER, tensors, single=False, name=name, process_set=process_set, op=op,
        pre=prescale_factor, post=postscale_factor, join_average=join_average, waits=True,
    ).wait()  # fmt: skip


def reduce_async(
    tensor: Any,
    root: int = 0,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
    out: Any = None,
) -> Handle:
    """Starts a `reduce`; `wait` gives its result."""
    return submit(
        REDUCE, [tensor], outs=None if out is None else [out], name=name, process_set=process_set, root=root,
        op=op, pre=prescale_factor, post=postscale_factor, join_average=join_average,
    )  # fmt: skip


def reduce(
    tensor: Any,
    root: int = 0,
    op: int = Average,
    *,
    name: Optional[str] = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Set = None,
    join_average: str = "size",
    out: Any = None,
) -> Any:
    """The reduction of all ranks' arrays, on the root; None on the others. Arguments are those of `allreduce`."""
    return submit(
        REDUCE, [tensor], outs=None if out is None else [out], name=name, process_set=process_set, root=root,
        op=op, pre=prescale_factor, post=postscale_factor, join_average=join_average, waits=True,
    ).wait()  # fmt: skip

"""The collectives.

Arrays may be anything in host memory with the buffer protocol (NumPy arrays, memoryview, bytearray,
array.array), with `__array_interface__` (NumPy arrays of ml_dtypes.bfloat16) or with DLPack (torch and JAX).
They must be C-contiguous, and are read where they are, without a copy. Until an operation is over its inputs
must not be written, nor its outputs touched.

Results are new NumPy arrays (torch tensors for torch tensors; memoryviews where NumPy is not installed), or the
caller's array where one is given: `out=`, and every function whose name ends with an underscore.

Names: an operation meets those of the other ranks that have the same name and process set. Without a name,
operations meet in their order of submission per process set and collective, which is safe only from one thread.
A name can be used again once its operation is over.

Errors, in every function here: `UsageError` (a ValueError) for a call that can never work; where it concerns
an array or an option, the other ranks get `MismatchError` for this operation, with the reason. `MismatchError`
on all ranks where they disagree; `BrokenError` when a process is lost; `ShutdownError` after a shutdown.
"""

from __future__ import annotations

import enum
from typing import Any, List, Optional, Sequence, Union

from . import _native
from ._native import Handle
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

_ALLREDUCE, _ALLGATHER, _BROADCAST, _REDUCESCATTER, _ALLTOALL = 0, 1, 2, 3, 4
_REDUCE, _GATHER, _SCATTER, _BARRIER, _JOIN = 5, 6, 7, 8, 9


def _submit(
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
    refused = None
    if not single:
        try:
            tensors = list(tensors)
            outs = None if outs is None else list(outs)
        except TypeError:
            refused, tensors, outs = "a grouped operation takes lists of arrays", [], None
    if not single and not tensors and refused is None:
        refused = "a grouped operation takes at least one array"
    return _native.submit(
        collective, tensors, outs, single, name, set_id(process_set), op, pre, post, root, join_average,
        splits, refused, waits,
    )  # fmt: skip


def poll(handle: Handle) -> bool:
    """Whether an operation is over (with or without success). Never blocks."""
    return handle.poll()


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
    return handle.wait(timeout)


synchronize = wait


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
    return _submit(
        _ALLREDUCE, [tensor], outs=None if out is None else [out], name=name, process_set=process_set, op=op,
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
        prescale_factor: what every input is multiplied with first.
        postscale_factor: what the result is multiplied with.
        process_set: the ranks that take part; all by default.
        join_average: whether Average divides by the set's "size" or by the ranks still "present" (see `join`).
        out: an array for the result, of the same shape and type; `tensor` itself for in place.
    Returns:
        `out`, or a new array of the same shape and type.
    """
    return _submit(
        _ALLREDUCE, [tensor], outs=None if out is None else [out], name=name, process_set=process_set, op=op,
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
    return _submit(
        _ALLREDUCE, tensors, outs=out, single=False, name=name, process_set=process_set, op=op,
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
    return _submit(
        _ALLREDUCE, tensors, outs=out, single=False, name=name, process_set=process_set, op=op,
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


def allgather_async(tensor: Any, *, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts an `allgather`; `wait` gives its result."""
    return _submit(_ALLGATHER, [tensor], name=name, process_set=process_set)


def allgather(tensor: Any, *, name: Optional[str] = None, process_set: Set = None) -> Any:
    """All ranks' arrays joined along the first dimension, in rank order, on every rank.

    Args:
        tensor: this rank's array. The first dimension may differ between ranks (and be 0); the others and
            the type are the same. A scalar counts as one row.
        name, process_set: as for `allreduce`.
    Returns:
        A new array, whose first dimension is the sum of all ranks' first dimensions.
    """
    return _submit(_ALLGATHER, [tensor], name=name, process_set=process_set, waits=True).wait()


def grouped_allgather_async(tensors: Sequence[Any], *, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts a `grouped_allgather`; `wait` gives its result."""
    return _submit(_ALLGATHER, tensors, single=False, name=name, process_set=process_set)


def grouped_allgather(tensors: Sequence[Any], *, name: Optional[str] = None, process_set: Set = None) -> List[Any]:
    """`allgather` of several arrays as one operation. Returns a list in their order."""
    return _submit(_ALLGATHER, tensors, single=False, name=name, process_set=process_set, waits=True).wait()


def broadcast_async(
    tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None, out: Any = None
) -> Handle:
    """Starts a `broadcast`; `wait` gives its result."""
    outs = None if out is None else [out]
    return _submit(_BROADCAST, [tensor], outs=outs, root=root, name=name, process_set=process_set)


def broadcast(
    tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None, out: Any = None
) -> Any:
    """The root's array, on every rank.

    Args:
        tensor: this rank's array; shape and type are the same on all ranks, values matter on the root only.
        root: the rank whose values are sent: a rank of the whole job, in every process set.
        name, process_set, out: as for `allreduce`.
    """
    outs = None if out is None else [out]
    return _submit(_BROADCAST, [tensor], outs=outs, root=root, name=name, process_set=process_set, waits=True).wait()


def broadcast_async_(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts a `broadcast_`; `wait` gives its result."""
    return broadcast_async(tensor, root, name=name, process_set=process_set, out=tensor)


def broadcast_(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None) -> Any:
    """`broadcast` in place: the root's values replace the contents of `tensor`, which is returned."""
    return broadcast(tensor, root, name=name, process_set=process_set, out=tensor)


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
    return _submit(
        _REDUCESCATTER, [tensor], outs=None if out is None else [out], name=name, process_set=process_set,
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
    return _submit(
        _REDUCESCATTER, [tensor], outs=None if out is None else [out], name=name, process_set=process_set,
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
    return _submit(
        _REDUCESCATTER, tensors, single=False, name=name, process_set=process_set, op=op,
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
    return _submit(
        _REDUCESCATTER, tensors, single=False, name=name, process_set=process_set, op=op,
        pre=prescale_factor, post=postscale_factor, join_average=join_average, waits=True,
    ).wait()  # fmt: skip


def alltoall_async(
    tensor: Any,
    splits: Optional[Sequence[int]] = None,
    *,
    name: Optional[str] = None,
    process_set: Set = None,
) -> Handle:
    """Starts an `alltoall`; `wait` gives its result."""
    return _submit(_ALLTOALL, [tensor], splits=splits, name=name, process_set=process_set)


def alltoall(
    tensor: Any,
    splits: Optional[Sequence[int]] = None,
    *,
    name: Optional[str] = None,
    process_set: Set = None,
) -> Any:
    """Every rank sends rows to every rank.

    Args:
        tensor: this rank's rows, those for the first member first. All but the first dimension are the same on
            all ranks, and so is the type.
        splits: how many rows each member gets; they add up to the first dimension. By default as many each.
        name, process_set: as for `allreduce`.
    Returns:
        The rows received, in rank order; with `splits`, a tuple of them and of how many rows came from each
        member (a list).
    """
    return _submit(_ALLTOALL, [tensor], splits=splits, name=name, process_set=process_set, waits=True).wait()


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
    return _submit(
        _REDUCE, [tensor], outs=None if out is None else [out], name=name, process_set=process_set, root=root,
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
    return _submit(
        _REDUCE, [tensor], outs=None if out is None else [out], name=name, process_set=process_set, root=root,
        op=op, pre=prescale_factor, post=postscale_factor, join_average=join_average, waits=True,
    ).wait()  # fmt: skip


def gather_async(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts a `gather`; `wait` gives its result."""
    return _submit(_GATHER, [tensor], root=root, name=name, process_set=process_set)


def gather(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None) -> Any:
    """All ranks' arrays joined along the first dimension, as by `allgather`, on the root; None on the others."""
    return _submit(_GATHER, [tensor], root=root, name=name, process_set=process_set, waits=True).wait()


def scatter_async(
    tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None, out: Any = None
) -> Handle:
    """Starts a `scatter`; `wait` gives its result."""
    outs = None if out is None else [out]
    return _submit(_SCATTER, [tensor], outs=outs, root=root, name=name, process_set=process_set)


def scatter(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None, out: Any = None) -> Any:
    """This rank's rows of the root's array; the lower ranks get one row more where they do not divide evenly.

    Args:
        tensor: an array of the root's shape and type on all ranks; its values matter on the root only, so that
            `numpy.empty` (memory that is never touched) will do on the others.
        root, name, process_set: as for `broadcast`.
        out: an array for this rank's rows.
    """
    outs = None if out is None else [out]
    return _submit(_SCATTER, [tensor], outs=outs, root=root, name=name, process_set=process_set, waits=True).wait()


def barrier_async(*, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts a `barrier`: its `wait` returns when all ranks have entered."""
    return _submit(_BARRIER, [], name=name, process_set=process_set)


def barrier(*, name: Optional[str] = None, process_set: Set = None) -> None:
    """Returns when all ranks have entered."""
    _submit(_BARRIER, [], name=name, process_set=process_set, waits=True).wait()


def join_async(*, process_set: Set = None) -> Handle:
    """Starts a `join`; `wait` gives its result."""
    return _submit(_JOIN, [], name=None, process_set=process_set)


def join(*, process_set: Set = None) -> int:
    """Says that this rank has no more data, and waits until all ranks have said so.

    Meanwhile it takes part in what the others run, with values that change no result.

    Returns:
        The last rank that joined.
    """
    return _submit(_JOIN, [], name=None, process_set=process_set, waits=True).wait()


def send_async(tensor: Any, dest: int, tag: int = 0, *, process_set: Set = None) -> Handle:
    """Starts a `send`; after `wait` the array may be written again."""
    return _native.transfer(True, tensor, dest, tag, set_id(process_set))


def send(tensor: Any, dest: int, tag: int = 0, *, process_set: Set = None) -> None:
    """Sends an array to one rank, which takes it with `recv` and the same tag, type and size.

    Args:
        tensor: the array.
        dest: the rank, of the whole job.
        tag: a number that tells messages between the same two ranks apart, from 0 to 2**32 - 1.
        process_set: a set that has both ranks.
    """
    send_async(tensor, dest, tag, process_set=process_set).wait()


def recv_async(out: Any, source: int, tag: int = 0, *, process_set: Set = None) -> Handle:
    """Starts a `recv`; `wait` gives the array."""
    return _native.transfer(False, out, source, tag, set_id(process_set))


def recv(out: Any, source: int, tag: int = 0, *, process_set: Set = None) -> Any:
    """Receives into `out` what rank `source` sends with this tag, and returns `out`."""
    return recv_async(out, source, tag, process_set=process_set).wait()

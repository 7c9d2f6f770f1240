"""The collectives that move values as they are, barrier, join, and messages. What they share is in `carole`."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence

from . import _native
from ._errors import UsageError
from ._native import Handle
from ._sets import set_id
from ._submit import ALLGATHER, ALLTOALL, BARRIER, BROADCAST, GATHER, JOIN, SCATTER, Set, submit


def allgather_async(tensor: Any, *, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts an `allgather`; `wait` gives its result."""
    return submit(ALLGATHER, [tensor], name=name, process_set=process_set)


def allgather(tensor: Any, *, name: Optional[str] = None, process_set: Set = None) -> Any:
    """All ranks' arrays joined along the first dimension, in rank order, on every rank.

    Args:
        tensor: this rank's array. The first dimension may differ between ranks (and be 0); the others and
            the type are the same. A scalar counts as one row.
        name, process_set: as for `allreduce`.
    Returns:
        A new array, whose first dimension is the sum of all ranks' first dimensions.
    """
    return submit(ALLGATHER, [tensor], name=name, process_set=process_set, waits=True).wait()


def grouped_allgather_async(tensors: Sequence[Any], *, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts a `grouped_allgather`; `wait` gives its result."""
    return submit(ALLGATHER, tensors, single=False, name=name, process_set=process_set)


def grouped_allgather(tensors: Sequence[Any], *, name: Optional[str] = None, process_set: Set = None) -> List[Any]:
    """`allgather` of several arrays as one operation. Returns a list in their order."""
    return submit(ALLGATHER, tensors, single=False, name=name, process_set=process_set, waits=True).wait()


def broadcast_async(
    tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None, out: Any = None
) -> Handle:
    """Starts a `broadcast`; `wait` gives its result."""
    outs = None if out is None else [out]
    return submit(BROADCAST, [tensor], outs=outs, root=root, name=name, process_set=process_set)


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
    return submit(BROADCAST, [tensor], outs=outs, root=root, name=name, process_set=process_set, waits=True).wait()


def broadcast_async_(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts a `broadcast_`; `wait` gives its result."""
    return broadcast_async(tensor, root, name=name, process_set=process_set, out=tensor)


def broadcast_(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None) -> Any:
    """`broadcast` in place: the root's values replace the contents of `tensor`, which is returned."""
    return broadcast(tensor, root, name=name, process_set=process_set, out=tensor)


def alltoall_async(
    tensor: Any,
    splits: Optional[Sequence[int]] = None,
    *,
    name: Optional[str] = None,
    process_set: Set = None,
) -> Handle:
    """Starts an `alltoall`; `wait` gives its result."""
    return submit(ALLTOALL, [tensor], splits=splits, name=name, process_set=process_set)


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
    return submit(ALLTOALL, [tensor], splits=splits, name=name, process_set=process_set, waits=True).wait()


def gather_async(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts a `gather`; `wait` gives its result."""
    return submit(GATHER, [tensor], root=root, name=name, process_set=process_set)


def gather(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None) -> Any:
    """All ranks' arrays joined along the first dimension, as by `allgather`, on the root; None on the others."""
    return submit(GATHER, [tensor], root=root, name=name, process_set=process_set, waits=True).wait()


def scatter_async(
    tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None, out: Any = None
) -> Handle:
    """Starts a `scatter`; `wait` gives its result."""
    outs = None if out is None else [out]
    return submit(SCATTER, [tensor], outs=outs, root=root, name=name, process_set=process_set)


def scatter(tensor: Any, root: int = 0, *, name: Optional[str] = None, process_set: Set = None, out: Any = None) -> Any:
    """This rank's rows of the root's array; the lower ranks get one row more where they do not divide evenly.

    Args:
        tensor: an array of the root's shape and type on all ranks; its values matter on the root only, so that
            `numpy.empty` (memory that is never touched) will do on the others.
        root, name, process_set: as for `broadcast`.
        out: an array for this rank's rows.
    """
    outs = None if out is None else [out]
    return submit(SCATTER, [tensor], outs=outs, root=root, name=name, process_set=process_set, waits=True).wait()


def barrier_async(*, name: Optional[str] = None, process_set: Set = None) -> Handle:
    """Starts a `barrier`: its `wait` returns when all ranks have entered."""
    return submit(BARRIER, [], name=name, process_set=process_set)


def barrier(*, name: Optional[str] = None, process_set: Set = None) -> None:
    """Returns when all ranks have entered."""
    submit(BARRIER, [], name=name, process_set=process_set, waits=True).wait()


def join_async(*, process_set: Set = None) -> Handle:
    """Starts a `join`; `wait` gives its result."""
    return submit(JOIN, [], name=None, process_set=process_set)


def join(*, process_set: Set = None) -> int:
    """Says that this rank has no more data, and waits until all ranks have said so.

    Meanwhile it takes part in what the others run, with values that change no result.

    Returns:
        The last rank that joined.
    """
    return submit(JOIN, [], name=None, process_set=process_set, waits=True).wait()


def send_async(tensor: Any, dest: int, tag: int = 0, *, process_set: Set = None) -> Handle:
    """Starts a `send`; after `wait` the array may be written again."""
    return _native.transfer(True, tensor, dest, tag, set_id(process_set))


def send(tensor: Any, dest: int, tag: int = 0, *, process_set: Set = None) -> None:
    """Sends an array to one rank, which takes it with `recv` and the same tag, type and size.

    It may return before the other rank receives, so an array of another size there is an error there for sure, and
    here only at times.

    Args:
        tensor: the array.
        dest: the rank, of the whole job.
        tag: a number that tells messages between the same two ranks apart, from 0 to 2**32 - 1.
        process_set: a set that has both ranks.
    """
    send_async(tensor, dest, tag, process_set=process_set).wait()


def recv_async(out: Any, source: int, tag: int = 0, *, process_set: Set = None) -> Handle:
    """Starts a `recv`; `wait` gives the array."""
    if source is None:
        raise UsageError("source=None is not a rank; recv_any receives from any rank, and says which it was")
    return _native.transfer(False, out, source, tag, set_id(process_set))


def recv(out: Any, source: int, tag: int = 0, *, process_set: Set = None) -> Any:
    """Receives into `out` what rank `source` sends with this tag, and returns `out`. What was sent can still be received
    when that rank has left."""
    return recv_async(out, source, tag, process_set=process_set).wait()


def recv_any_async(out: Any, tag: int = 0, *, process_set: Set = None) -> Handle:
    """Starts a `recv_any`; `wait` gives the rank that has sent what lies in `out` then."""
    return _native.transfer(False, out, None, tag, set_id(process_set))


def recv_any(out: Any, tag: int = 0, *, process_set: Set = None) -> int:
    """Receives into `out` what any rank sends with this tag, and returns that rank.

    Receives of one tag, from any rank or from one, take messages in the order in which they were started. Of several
    ranks that have sent, each has its turn. When all other ranks have left, and nothing that they had sent is left to
    be received, it ends with `ShutdownError`.

    Args:
        out: an array of the type and size of what is sent.
        tag: the tag that the sender gives.
        process_set: a set; its members are who may send.
    """
    return recv_any_async(out, tag, process_set=process_set).wait()

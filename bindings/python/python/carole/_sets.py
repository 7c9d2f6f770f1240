"""Process sets: operations among some of the ranks."""

from __future__ import annotations

import operator
from typing import Dict, List, Optional, Sequence, Union

from . import _native
from ._errors import UsageError


# What fits the core's type for ranks and for identifiers.
_BEYOND = 2**32


def _checked(ranks: Sequence[int]) -> List[int]:
    try:
        numbers = sorted({operator.index(rank) for rank in ranks})
    except TypeError:
        raise UsageError(f"a process set is made of a list of ranks, and not of {ranks!r}") from None
    for rank in numbers:
        if not 0 <= rank < _BEYOND:
            raise UsageError(f"{rank} is not a rank; ranks count from 0")
    return numbers


class ProcessSet:
    """Some of the ranks, for operations among them only.

    Args:
        ranks: its ranks, in any order.

    A new set can be used once `init(process_sets=[...])` or `add_process_set` has made it known to all ranks.
    In every set, `root` and `dest` are ranks of the whole job.
    """

    # Horovod's programs read it; it holds None wherever a set is made of ranks, as all sets are here.
    mpi_comm: None = None

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks: Optional[List[int]] = _checked(ranks)
        self.process_set_id: Optional[int] = None

    @property
    def ranks(self) -> Optional[List[int]]:
        """The ranks, ascending. For the global set: None before init."""
        if self._ranks is None and _native.is_initialized():
            return list(range(_native.world()["size"]))
        return self._ranks

    def included(self) -> Optional[bool]:
        """Whether this process is a member; None before init."""
        if self.process_set_id is None or not _native.is_initialized():
            return None
        return _native.world()["rank"] in (self.ranks or [])

    def rank(self) -> Optional[int]:
        """This process's position among the members; None before init or where it is not one."""
        if not self.included():
            return None
        return (self.ranks or []).index(_native.world()["rank"])

    def size(self) -> Optional[int]:
        """The number of members; None before init."""
        if self.process_set_id is None or not _native.is_initialized():
            return None
        return len(self.ranks or [])

    def __reduce__(self):
        # A copy is as well known to the job as the set is.
        return _of_ranks, (self.ranks,)

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcessSet) and self.ranks == other.ranks

    def __hash__(self) -> int:
        return hash(tuple(self.ranks or ()))


class _Global(ProcessSet):
    def __init__(self) -> None:
        self._ranks = None
        self.process_set_id = 0

    def __reduce__(self):
        # There is one only.
        return "global_process_set"


global_process_set: ProcessSet = _Global()
"""All ranks."""

_known: Dict[int, List[ProcessSet]] = {}


def _of_ranks(ranks: Sequence[int]) -> ProcessSet:
    known = (one for sets in _known.values() for one in sets if one.ranks == ranks)
    return next(known, None) or ProcessSet(ranks)


def set_id(process_set: Union[ProcessSet, int, None]) -> int:
    """The identifier that the core knows a set by."""
    if process_set is None:
        return 0
    if isinstance(process_set, ProcessSet):
        if process_set.process_set_id is None:
            raise UsageError(
                f"{process_set} is not known to the job; call add_process_set() on all ranks, "
                "or name it in init(process_sets=...)"
            )
        return process_set.process_set_id
    if isinstance(process_set, int) and 0 <= process_set < _BEYOND:
        return process_set
    raise UsageError(f"process_set={process_set!r} is not a ProcessSet (add_process_set makes one of a list of ranks)")


def as_set(process_set: Union[ProcessSet, Sequence[int]]) -> ProcessSet:
    return process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)


def adopt(sets: Sequence[ProcessSet]) -> None:
    """Gives the sets made by init their identifiers."""
    by_ranks = {tuple(ranks): identifier for identifier, ranks, _ in _native.process_sets()}
    for one in sets:
        identifier = by_ranks.get(tuple(one.ranks or ()))
        if identifier is not None:
            one.process_set_id = identifier
            _known.setdefault(identifier, []).append(one)


def forget() -> None:
    """After shutdown no set but the global one is known."""
    for sets in _known.values():
        for one in sets:
            one.process_set_id = None
    _known.clear()


def renew() -> None:
    """In a new epoch sets have the ranks that are left, under their new numbers."""
    left = {identifier: ranks for identifier, ranks, _ in _native.process_sets()}
    for identifier in list(_known):
        for one in _known[identifier]:
            if identifier in left:
                one._ranks = list(left[identifier])
            else:
                one.process_set_id = None
        if identifier not in left:
            del _known[identifier]


def add_process_set(process_set: Union[ProcessSet, Sequence[int]]) -> ProcessSet:
    """Makes a process set known to the job.

    All ranks must call it, members or not, with the same ranks. Calls match by these, so that ranks may add several sets in
    different orders (and remove others in between).

    Args:
        process_set: a `ProcessSet`, or its ranks.
    Returns:
        The set, ready for use.
    Raises:
        UsageError: for a rank that does not exist, for no ranks, or for a set that is known already.
        MismatchError: on the other ranks, when one of them had such a UsageError.
    """
    added = as_set(process_set)
    if added.process_set_id is not None and _native.is_initialized():
        raise UsageError(f"{added} is known to the job already")
    identifier = _native.add_process_set(added.ranks or [])
    added.process_set_id = identifier
    _known.setdefault(identifier, []).append(added)
    return added


def remove_process_set(process_set: ProcessSet) -> bool:
    """Ends a process set. All ranks must call it for the same set; what differs is a MismatchError on all.

    Returns:
        False for the global set and for sets that are not known, else True.
    """
    identifier = process_set.process_set_id
    if identifier is None or identifier == 0 or not _native.is_initialized():
        return False
    removed = _native.remove_process_set(identifier)
    for one in _known.pop(identifier, []):
        one.process_set_id = None
    return removed

"""The names of a group's operations. The engine knows operations by name, so equal ones use few names in turn."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

from .desync import Desync, describe

# How many operations of one collective, type and size may be in flight; names are used again after so many, so that
# the engine knows them from the second round on.
RING = 64
# Sizes that have names of their own; the rest share.
_SIZES_MAX = 4096


class Ring:
    """The operations of one collective, type and size."""

    __slots__ = ("begun", "names", "words", "works")

    def __init__(self, names: List[str], words: str) -> None:
        self.begun = 0
        self.names, self.words = names, words
        self.works: List[Any] = [None] * RING


class Rings:
    """All operations of a group."""

    def __init__(self, store: Any, rank: int, ranks: Sequence[int]) -> None:
        self._rings: Dict[Tuple[int, Any, int], Ring] = {}
        self._who = (store, rank, ranks)
        self._desync: Optional[Desync] = None
        self.group = ""

    def next(self, collective: int, dtype: Any, size: int) -> Tuple[Ring, int]:
        """The ring of an operation, and its place in it, which is free."""
        ring = self._rings.get((collective, dtype, size))
        if ring is None:
            ring = self._new(collective, dtype, size)
        place = ring.begun % RING
        ring.begun += 1
        before = ring.works[place]
        if before is not None and not before.is_completed():
            before.wait()
        return ring, place

    def _new(self, collective: int, dtype: Any, size: int) -> Ring:
        if len(self._rings) >= _SIZES_MAX:
            dtype, size = None, -1
        what = f"c10d.{self.group[:52]}.{collective}.{str(dtype).rpartition('.')[2]}.{size}"
        names = [f"{what}.{k}" for k in range(RING)]
        return self._rings.setdefault((collective, dtype, size), Ring(names, describe(collective, dtype, size)))

    def begun(self) -> int:
        """How many operations the group has begun."""
        return sum(ring.begun for ring in list(self._rings.values()))

    def explain(self, ring: Ring, place: int) -> Optional[str]:
        """Why an operation will never end, where that is certain."""
        if self._desync is None:
            self._desync = Desync(*self._who, f"carole/waits/{self.group}")
        flight = {
            one.names[k]: one.words
            for one in list(self._rings.values())
            for k, work in enumerate(one.works)
            if work is not None and not work.is_completed()
        }
        return self._desync.look(ring.names[place], ring.words, flight, self.begun())

"""Finds that ranks wait for different operations, which would else end by a timeout only, after half an hour.

An operation is known by what it is, its type and its size, so ranks that disagree about the next one wait for each
other. A rank that has waited for some seconds writes into the group's store what it waits for, and reads what the
others wait for. Where another rank still waits, as it did at the last look, for an operation that this rank has not
begun, and has not begun the one that this rank waits for, neither wait can end.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, Dict, Optional, Tuple

# When the first look is taken, and how often after it.
FIRST_LOOK_S = 5.0
NEXT_LOOK_S = 2.0

_COLLECTIVES = ("allreduce", "allgather", "broadcast", "reducescatter", "alltoall", "reduce", "gather", "scatter",
                "barrier", "join")  # fmt: skip


def describe(collective: int, dtype: Any, size: int) -> str:
    """An operation in words, as all ranks say it."""
    words = _COLLECTIVES[collective]
    if dtype is None:
        return words
    count = "several tensors" if size < 0 else f"{size} elements" if size else "a tensor"
    return f"{words} of {count} of {str(dtype).rpartition('.')[2]}"


class Desync:
    """What a group's ranks have told each other about their waits."""

    def __init__(self, store: Any, rank: int, ranks: Any, prefix: str) -> None:
        self._store, self._rank, self._ranks, self._prefix = store, rank, ranks, prefix
        self._looks = 0
        # What each rank waited for at the last look, and its number then.
        self._seen: Dict[int, Tuple[Tuple[str, int], int]] = {}

    def look(self, name: str, words: str, flight: Dict[str, str], begun: int) -> Optional[str]:
        """Tells the others, and says what is wrong where that is certain.

        Args:
            name, words: the operation that this rank waits for.
            flight: the operations that it has begun and that are not over.
            begun: how many it has begun in all.
        """
        self._looks += 1
        mine = {"name": name, "words": words, "flight": sorted(flight), "begun": begun, "look": self._looks}
        try:
            self._tell(mine)
            for other in range(len(self._ranks)):
                key = f"{self._prefix}/{other}"
                if other == self._rank or not self._has(key):
                    continue
                theirs = json.loads(self._store.get(key).decode())
                # Another rank has found it out, about an operation that this rank waits for, too.
                if name in theirs.get("between", ()):
                    return theirs["verdict"]
                if self._stuck(other, theirs, name, flight):
                    verdict = self._verdict((self._rank, words), (other, theirs["words"]))
                    self._tell({**mine, "verdict": verdict, "between": [name, theirs["name"]]})
                    return verdict
        except Exception:  # noqa: BLE001 (the store may be gone with its rank; then the timeout must do)
            return None
        return None

    def _has(self, key: str) -> bool:
        if hasattr(self._store, "check"):
            return self._store.check([key])
        # Before torch 2.0.
        try:
            self._store.wait([key], datetime.timedelta(milliseconds=200))
        except RuntimeError:
            return False
        return True

    def _tell(self, state: Dict[str, Any]) -> None:
        self._store.set(f"{self._prefix}/{self._rank}", json.dumps(state))

    def _verdict(self, *waits: Tuple[int, str]) -> str:
        (first, its), (second, other) = sorted((self._ranks[rank], words) for rank, words in waits)
        return (
            f"ranks {first} and {second} disagree about the next operation of their group: rank {first} waits for "
            f"{its}, rank {second} for {other}; all ranks of a group must call the same operations in the same order, "
            "with tensors of the same type and size"
        )

    def _stuck(self, other: int, theirs: Any, name: str, flight: Dict[str, str]) -> bool:
        state, look = (theirs["name"], theirs["begun"]), theirs["look"]
        before = self._seen.get(other)
        if before is None or before[0] != state or look > before[1]:
            self._seen[other] = (state, look)
        waits_still = before is not None and before[0] == state and look > before[1]
        return waits_still and theirs["name"] not in flight and name not in theirs["flight"]

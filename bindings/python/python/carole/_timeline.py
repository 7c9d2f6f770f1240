"""The timeline: a Chrome trace (chrome://tracing, https://ui.perfetto.dev) of the operations of this rank.

An event spans from the call that submits an operation to the call that takes its result, as the program saw it; what
the engine did in between is not in it. The file is valid JSON after every event, also after SIGKILL: each event is
one write, which replaces the closing bracket.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Sequence

# Beyond this size nothing more is written: no viewer opens larger files.
_BYTES_MAX = 1 << 30


class Timeline:
    """One file of events."""

    def __init__(self, path: str, rank: int) -> None:
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._end = 0
        self._lanes: Dict[str, int] = {}
        self._started_ns = time.perf_counter_ns()
        self._append({
            "name": "start_time_since_epoch_in_micros", "ph": "M", "pid": 0,
            "args": {"start_time_since_epoch_in_micros": time.time_ns() // 1000, "rank": rank},
        })  # fmt: skip

    def _append(self, event: Dict[str, Any]) -> None:
        text = json.dumps(event, separators=(",", ":"))
        with self._lock:
            if self._file < 0 or self._end + len(text) > _BYTES_MAX:
                return
            line = (("[\n" if self._end == 0 else ",\n") + text + "\n]").encode()
            # A write to a file is over before a signal takes effect, so the file ends with a bracket at any time.
            os.pwrite(self._file, line, self._end)
            self._end += len(line) - 2

    def _now_us(self) -> float:
        return (time.perf_counter_ns() - self._started_ns) / 1000

    def _lane(self, name: str) -> int:
        lane = self._lanes.get(name)
        if lane is None:
            with self._lock:
                lane = self._lanes.setdefault(name, len(self._lanes) + 1)
            self._append({"name": "process_name", "ph": "M", "pid": lane, "args": {"name": name}})
            self._append({"name": "process_sort_index", "ph": "M", "pid": lane, "args": {"sort_index": lane}})
        return lane

    def begin(self, name: str, operation: str, dtype: str, shapes: Sequence[Sequence[int]]) -> int:
        """Notes that an operation was submitted; `end` takes what it returns."""
        lane = self._lane(name)
        arguments = {"dtype": dtype, "shape": [list(shape) for shape in shapes]}
        self._append({"name": operation, "ph": "B", "pid": lane, "tid": 0, "ts": self._now_us(), "args": arguments})
        return lane

    def end(self, lane: int, failed: bool = False) -> None:
        """Notes that the result of an operation was taken."""
        event: Dict[str, Any] = {"ph": "E", "pid": lane, "tid": 0, "ts": self._now_us()}
        if failed:
            event["args"] = {"failed": True}
        self._append(event)

    def mark(self, name: str) -> None:
        """Notes a moment."""
        self._append({"name": name, "ph": "i", "s": "g", "pid": 0, "tid": 0, "ts": self._now_us()})

    def close(self) -> None:
        """Ends the file."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


active: Optional[Timeline] = None
"""The timeline in use."""
listeners: List[Callable[[], None]] = []
"""Called when a timeline begins or ends."""


def path_of(path: str, rank: int) -> str:
    """The file of a rank: rank 0 writes `path` itself, where Horovod's users look for it."""
    if rank == 0:
        return path
    stem, extension = os.path.splitext(path)
    return f"{stem}.{rank}{extension}"


def start(path: str, rank: int) -> None:
    """Begins to write; a timeline in use is ended first."""
    global active
    stop()
    active = Timeline(path_of(path, rank), rank)
    for listener in listeners:
        listener()


def stop() -> None:
    """Ends the timeline, if one is in use."""
    global active
    ended, active = active, None
    if ended is not None:
        ended.close()
    for listener in listeners:
        listener()

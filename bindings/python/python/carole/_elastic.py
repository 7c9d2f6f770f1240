"""State that survives the loss and the arrival of ranks, for any framework."""

from __future__ import annotations

import array
import copy
import functools
import os
import queue
import sys
import threading
from typing import Any, Callable, Dict, List, Sequence, Tuple

from . import _life, _native
from ._errors import BrokenError, HorovodInternalError, HostsUpdatedInterrupt
from ._reductions import allreduce
from ._submit import Max


class HostUpdateResult:
    """What changed about the hosts; the values are bits."""

    no_update = 0
    removed = 1
    added = 2
    mixed = removed | added


class State:
    """What a training must keep when ranks come and go. Subclasses say how it is saved.

    Args:
        bcast_object: broadcasts an object from rank 0.
        get_rank: this process's rank.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int]) -> None:
        self._bcast_object = bcast_object
        self._rank = get_rank
        self._host_messages: "queue.Queue[Tuple[float, int]]" = queue.Queue()
        self._last_updated_timestamp = 0.0
        self._reset_callbacks: List[Callable[[], None]] = []

    def register_reset_callbacks(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Functions to call after the job was joined anew: to adapt the learning rate to the size, say."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """The job was joined anew."""
        self._host_messages = queue.Queue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Hosts came or went at `timestamp`; the next `check_host_updates` acts on it."""
        self._host_messages.put((timestamp, update_res))

    def commit(self) -> None:
        """Saves the state, to be restored when a rank fails, and looks whether hosts came or went."""
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Raises HostsUpdatedInterrupt, on all ranks alike, where hosts came or went. All ranks must call it."""
        update = notification_manager.news()
        while not self._host_messages.empty():
            timestamp, seen = self._host_messages.get()
            if timestamp > self._last_updated_timestamp:
                self._last_updated_timestamp, update = timestamp, update | seen
        # What any rank knows counts for all, so that all of them stop at the same place.
        bits = HostUpdateResult.added, HostUpdateResult.removed
        added, removed = _agree("elastic.news", [int(update & bit != 0) for bit in bits])
        if added or removed:
            raise HostsUpdatedInterrupt(skip_sync=not added)

    def save(self) -> None:
        """Keeps a copy of the state in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Goes back to the state of the last `save`."""
        raise NotImplementedError

    def sync(self) -> None:
        """Gives all ranks the state of rank 0."""
        raise NotImplementedError

    def reset(self) -> None:
        """Called when the job was joined anew, before the callbacks."""


class ObjectState(State):
    """State made of Python objects, which are attributes of it.

    Args:
        bcast_object, get_rank: as for `State`.
        **kwargs: the attributes and their first values.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(bcast_object, get_rank)
        self._saved_state: Dict[str, Any] = dict(kwargs)
        for name, value in kwargs.items():
            setattr(self, name, value)
        ObjectState.save(self)

    def save(self) -> None:
        # A copy, so that what the program goes on changing in place is not the saved state.
        self._saved_state = {name: copy.deepcopy(getattr(self, name)) for name in self._saved_state}

    def restore(self) -> None:
        for name, value in self._saved_state.items():
            setattr(self, name, copy.deepcopy(value))

    def sync(self) -> None:
        self._fetch()
        self.save()

    def _fetch(self) -> None:
        """Takes the attributes of rank 0, and saves nothing yet: a rank may be lost before all of the state is here."""
        if self._saved_state:
            current = {name: getattr(self, name) for name in self._saved_state}
            for name, value in copy.deepcopy(self._bcast_object(current)).items():
                setattr(self, name, value)


class NotificationManager:
    """Tells states that hosts came or went."""

    def __init__(self) -> None:
        self._listeners: List[State] = []
        self._lock = threading.Lock()

    def init(self, *_: Any, **__: Any) -> None:
        """Accepted for Horovod's sake."""

    def register_listener(self, listener: State) -> None:
        """`listener.on_hosts_updated` is called from now on."""
        with self._lock:
            self._listeners.append(listener)

    def remove_listener(self, listener: State) -> None:
        """The opposite of `register_listener`."""
        with self._lock:
            self._listeners = [one for one in self._listeners if one is not listener]

    def news(self) -> int:
        """What the launcher has told this process since the epoch began, as bits of `HostUpdateResult`."""
        added, removed = _native.news() if _native.is_initialized() else (False, False)
        return (HostUpdateResult.added if added else 0) | (HostUpdateResult.removed if removed else 0)

    def handle_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Hosts came or went: all listeners hear of it."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.on_hosts_updated(timestamp, update_res)


notification_manager = NotificationManager()
"""The one that `run_fn` registers states with."""


def _agree(name: str, values: Sequence[int]) -> List[int]:
    """The largest of all ranks' values, each by itself: a small allreduce, whose values travel with its agreement."""
    return list(allreduce(array.array("q", values), op=Max, name=name))


def _leave_quietly(error: BrokenError) -> bool:
    """Whether the others have let this process go, as they do when its host is to be used no longer."""
    return bool(getattr(error, "excluded", False))


def run_fn(func: Callable[..., Any], reset: Callable[[], None]) -> Callable[..., Any]:
    """Makes `func(state, ...)` start again, with restored state, after a rank failed or hosts changed.

    Args:
        func: the training; its first argument is the `State`.
        reset: leaves the epoch and joins the next one.

    Before each start the ranks agree whether the state must be synchronized: it is, unless no rank lacks it.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        notification_manager.register_listener(state)
        # A process that has just come lacks the state, whatever the others think.
        lacks_state = True
        try:
            while True:
                let_go = False
                try:
                    if _agree("elastic.sync", [int(lacks_state)])[0]:
                        state.sync()
                    return func(state, *args, **kwargs)
                except (HorovodInternalError, BrokenError):
                    state.restore()
                    lacks_state = True
                except HostsUpdatedInterrupt as interrupt:
                    lacks_state = not interrupt.skip_sync
                    let_go = True
                try:
                    reset()
                except BrokenError as error:
                    if let_go and _leave_quietly(error):
                        sys.exit(0)
                    raise
                state.on_reset()
        finally:
            notification_manager.remove_listener(state)

    return wrapper


def may_grow() -> bool:
    """Whether this process belongs to an elastic job, in which there may come to be more ranks."""
    return "CAROLE_WORKER" in os.environ


def rejoin() -> None:
    """Goes on in the next epoch, with the ranks that are left and those that are new. No process is restarted."""
    _life.reform()

"""State that survives the loss and the arrival of ranks, for any framework."""

from __future__ import annotations

import copy
import functools
import queue
import threading
from typing import Any, Callable, Dict, List, Sequence, Tuple

from . import _life
from ._errors import BrokenError, HorovodInternalError, HostsUpdatedInterrupt


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
        newest, all_update = self._last_updated_timestamp, HostUpdateResult.no_update
        while not self._host_messages.empty():
            timestamp, update = self._host_messages.get()
            if timestamp > newest:
                newest, all_update = timestamp, all_update | update
        # What rank 0 knows counts, so that all ranks stop at the same place.
        before, self._last_updated_timestamp, all_update = self._bcast_object(
            (self._last_updated_timestamp, newest, all_update)
        )
        if self._last_updated_timestamp > before:
            raise HostsUpdatedInterrupt(all_update == HostUpdateResult.removed)

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
        if self._saved_state:
            current = {name: getattr(self, name) for name in self._saved_state}
            self._saved_state = copy.deepcopy(self._bcast_object(current))
            self.restore()


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

    def handle_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Hosts came or went: all listeners hear of it."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.on_hosts_updated(timestamp, update_res)


notification_manager = NotificationManager()
"""The one that `run_fn` registers states with."""


def run_fn(func: Callable[..., Any], reset: Callable[[], None]) -> Callable[..., Any]:
    """Makes `func(state, ...)` start again, with restored state, after a rank failed or hosts changed.

    Args:
        func: the training; its first argument is the `State`.
        reset: leaves the job and joins it anew.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        notification_manager.register_listener(state)
        skip_sync = False
        try:
            while True:
                try:
                    if not skip_sync:
                        state.sync()
                    return func(state, *args, **kwargs)
                except (HorovodInternalError, BrokenError):
                    state.restore()
                    skip_sync = False
                except HostsUpdatedInterrupt as interrupt:
                    skip_sync = interrupt.skip_sync
                reset()
                state.on_reset()
        finally:
            notification_manager.remove_listener(state)

    return wrapper


def rejoin() -> None:
    """Leaves the job and joins it anew, with the arguments of the environment."""
    _life.shutdown()
    _life.init()

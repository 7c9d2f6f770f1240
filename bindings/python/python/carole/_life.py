"""Joining and leaving the job, and this process's place in it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any, Callable, List, Optional, Sequence, Union

from . import _native, _sets
from ._sets import ProcessSet

_joined_in: Optional[int] = None
_lock = threading.Lock()
# What has to begin anew with each epoch.
after_reform: List[Callable[[], None]] = []


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value)


def init(*, process_sets: Optional[Sequence[Union[ProcessSet, Sequence[int]]]] = None, **knobs: Any) -> None:
    """Joins the job that the launcher (or the environment) describes; with no variables set, a job of one.

    Args:
        process_sets: sets of ranks to make at once; the same list on all ranks.
        **knobs: any knob by its name without `CAROLE_`, in small letters: `init(algorithm="ring")` is
            `CAROLE_ALGORITHM=ring`, and goes before the environment.

    Calling it again with the same arguments does nothing.

    Raises:
        UsageError: for a knob or a process set that does not make sense, or an incomplete environment.
        BrokenError: when another rank cannot be reached.
    """
    global _joined_in
    sets = [_sets.as_set(one) for one in process_sets or ()]
    pairs = [("CAROLE_" + name.upper(), _text(value)) for name, value in sorted(knobs.items())]
    _native.init(pairs, [one.ranks or [] for one in sets])
    with _lock:
        if _joined_in is None:
            atexit.register(_at_exit)
        _joined_in = os.getpid()
    _sets.adopt(sets)


def shutdown() -> None:
    """Leaves the job, saying goodbye to the others. `init` may be called again. Takes at most seconds."""
    _native.shutdown()
    _sets.forget()


def reform() -> None:
    """Forms the next epoch with the ranks that are left. No process is restarted.

    Call it after a `BrokenError`; or, on all ranks, at any time, to go on without those that have called `shutdown`. In
    an elastic job (`carolerun --min-np`) processes that wait to be let in become the last ranks.

    Ranks keep their order and count from 0 again: `rank`, `size` and the others tell the new ones. A `ProcessSet` keeps
    its identifier and loses the members that are gone; one that has lost all of them is not known any more.
    Operations in flight have ended with an error. Ranks that live are waited for, up to `CAROLE_ELASTIC_TIMEOUT_S`
    (600 s); one that does not answer for `CAROLE_TIMEOUT_MS` (3 s) is left behind.

    Raises:
        BrokenError: where this process cannot go on. Its `excluded` is true when the others have gone on without it
            (it was stopped for too long, or let go); else too few ranks came together (a minority).
    After any error this process has left the job.
    """
    try:
        _native.reform()
    except Exception:
        _sets.forget()
        raise
    _sets.renew()
    for begin in after_reform:
        begin()


def epoch() -> int:
    """The number of the present epoch: how often the ranks have come together before."""
    return _native.world()["epoch"]


def _at_exit() -> None:
    # A forked child inherits this hook, but not the membership.
    if _joined_in == os.getpid() and _native.is_initialized() and not _died_of_an_exception():
        _native.shutdown()


def _died_of_an_exception() -> bool:
    """Whether this process ends because of an exception that nobody caught. That is a death and no goodbye: the
    others are to learn that this rank failed, and carolerun is to see it fail first."""
    # Python leaves the exception here after printing it. At a prompt it is an old one, and not why the user left.
    return getattr(sys, "last_value", None) is not None and not (sys.flags.interactive or hasattr(sys, "ps1"))


def is_initialized() -> bool:
    """Whether `init` has succeeded and `shutdown` has not been called."""
    return _native.is_initialized()


def rank() -> int:
    """This process's rank: from 0 to size - 1. Raises UsageError before init, as all of these do."""
    return _native.world()["rank"]


def size() -> int:
    """The number of processes."""
    return _native.world()["size"]


def local_rank() -> int:
    """This process's rank among those on its host."""
    return _native.world()["local_rank"]


def local_size() -> int:
    """The number of processes on this host."""
    return _native.world()["local_size"]


def cross_rank() -> int:
    """This host's position among the hosts that have this local rank."""
    return _native.world()["cross_rank"]


def cross_size() -> int:
    """The number of hosts that have this local rank."""
    return _native.world()["cross_size"]


def is_homogeneous() -> bool:
    """Whether all hosts have the same number of processes."""
    return _native.world()["is_homogeneous"]

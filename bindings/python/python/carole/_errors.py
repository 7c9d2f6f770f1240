"""Exceptions, sorted by what the caller can do."""

from __future__ import annotations

import builtins
from typing import Optional


class Error(RuntimeError):
    """Base class of everything that Carole raises."""


class UsageError(Error, ValueError):
    """The call can never work: correct the program. No data was sent."""


class MismatchError(Error):
    """Ranks disagree about one operation. All of them get this error, with the same words, and the job goes on.

    Attributes:
        tensor: the operation's name.
    """

    tensor: Optional[str] = None


class BrokenError(Error):
    """The group is broken (a process ended, say). Every operation in flight fails with this error.

    Attributes:
        culprit: the rank at fault, where it is known, else None.
        epoch: the epoch that ended.
        excluded: whether the others have gone on without this process. Else `reform` goes on with those that are left.
    """

    culprit: Optional[int] = None
    epoch: Optional[int] = None
    excluded: bool = False


class ShutdownError(Error):
    """The job was shut down in an orderly way.

    Attributes:
        rank: the rank that shut down, or None where it was this one.
    """

    rank: Optional[int] = None


class TimeoutError(Error, builtins.TimeoutError):  # noqa: A001 (the name users look for)
    """The time for this wait is over. The operation goes on and can be waited for again."""


class HorovodInternalError(Error):
    """What `carole.torch` raises where Horovod raises its error of this name: an operation in flight failed."""


class HostsUpdatedInterrupt(RuntimeError):
    """Hosts came or went: `elastic.run` joins anew with those that are there.

    Attributes:
        skip_sync: whether no rank is new, so that nothing need be synchronized.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the hosts of the job have changed")
        self.skip_sync = skip_sync


class HorovodVersionMismatchError(ImportError):
    """A library was built for another version of a framework. Carole is not built against any."""

    def __init__(self, name: str = "", version: str = "", installed_version: str = "") -> None:
        super().__init__(f"{name} {version} was built in, and {installed_version} is installed")
        self.name, self.version, self.installed_version = name, version, installed_version

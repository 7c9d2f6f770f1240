"""The commands that the wheel installs."""

from __future__ import annotations

import signal
import sys
from typing import Callable, Sequence

from . import _native


def _main(command: str, main: Callable[[Sequence[str]], int]) -> None:
    # Python would only note a signal and go on waiting; the command handles or obeys it itself.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    sys.exit(main([command, *sys.argv[1:]]))


def carolerun() -> None:
    """Starts a command on several ranks."""
    _main("carolerun", _native.launch)


def horovodrun() -> None:
    """`carolerun` under Horovod's name; the package carole-horovod installs it."""
    _main("horovodrun", _native.launch)


def carole_perf() -> None:
    """Measures and explains collectives."""
    # By its whole path, since it starts itself again on every rank, and the running executable is Python.
    _main(sys.argv[0], _native.perf)

"""The commands that the wheel installs."""

from __future__ import annotations

import signal
import sys

from . import _native


def _main(command: str, main) -> None:
    # Python would only note a signal and go on waiting; the command handles or obeys it itself.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    sys.exit(main([command, *sys.argv[1:]]))


def carolerun() -> None:
    """Starts a command on several ranks."""
    _main("carolerun", _native.launch)


def carole_perf() -> None:
    """Measures and explains collectives."""
    _main("carole-perf", _native.perf)

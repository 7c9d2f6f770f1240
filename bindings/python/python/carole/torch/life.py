"""`init` with Horovod's signature."""

from __future__ import annotations

import os
from typing import Any, Optional, Sequence, Union

from .. import _life, _timeline
from .._errors import UsageError
from .._sets import ProcessSet


def init(comm: Any = None, process_sets: Union[Sequence[ProcessSet], str, None] = None, **knobs: Any) -> None:
    """Joins the job.

    Args:
        comm: must be None: the job is the one that the launcher started. (For some of the ranks, use a
            process set.)
        process_sets: sets to make at once. The word "dynamic" is accepted: sets can always be added.
        **knobs: as for `carole.init`.

    Where `HOROVOD_TIMELINE` names a file, the timeline is written to it; see `start_timeline`.
    """
    if comm is not None:
        raise UsageError("init(comm=...) is not supported; for some of the ranks use process_sets=[...]")
    sets: Optional[Sequence[ProcessSet]] = None
    if isinstance(process_sets, str):
        if process_sets != "dynamic":
            raise UsageError(f'process_sets={process_sets!r} is neither "dynamic" nor a list of ProcessSet')
    else:
        sets = process_sets
    _life.init(process_sets=sets, **knobs)
    path = os.environ.get("HOROVOD_TIMELINE", "")
    if path not in ("", "DYNAMIC") and _timeline.active is None:
        _timeline.start(path, _life.rank())

"""`init` with Horovod's signature."""

from __future__ import annotations

from typing import Any, Optional, Sequence, Union

from .. import _life
from .._errors import UsageError
from .._sets import ProcessSet


def init(comm: Any = None, process_sets: Union[Sequence[ProcessSet], str, None] = None, **knobs: Any) -> None:
    """Joins the job.

    Args:
        comm: must be None: the job is the one that the launcher started. (For some of the ranks, use a
            process set.)
        process_sets: sets to make at once. The word "dynamic" is accepted: sets can always be added.
        **knobs: as for `carole.init`.
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

"""`carole.run`: a function on several ranks, from a script or a notebook.

The function, its arguments and the results travel as files in a folder of this user's own (mode 0700), which the
ranks, children of this process, are told of; nothing is unpickled that came over a network.
"""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from ._errors import BrokenError, UsageError

_LAUNCH = "from carole._scripts import carolerun; carolerun()"


def _dumps(value: Any) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        try:
            return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise UsageError(f"{error}; functions of a script or a notebook need cloudpickle: pip install cloudpickle")
    return cloudpickle.dumps(value)


def run(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Optional[Dict[str, Any]] = None,
    np: int = 1,
    *,
    env: Optional[Dict[str, str]] = None,
    timeout: Optional[float] = None,
    launcher: Sequence[str] = (),
) -> List[Any]:
    """Calls `fn(*args, **kwargs)` on `np` ranks of this host and returns their results, in rank order.

    Args:
        fn: calls `carole.init()` (or `hvd.init()`) itself. With cloudpickle installed it may be any function, also of
            a notebook; otherwise one that can be imported.
        np: the number of ranks.
        env: variables for the ranks, beside those of this process.
        timeout: seconds after which the job is ended.
        launcher: further arguments of carolerun.
    Raises:
        BrokenError: when a rank raised, with its traceback and its rank as `culprit`, or died.
    """
    if isinstance(np, bool) or not isinstance(np, int) or np < 1:
        raise UsageError(f"np={np!r}: a job has one rank or more")
    with tempfile.TemporaryDirectory(prefix="carole-run-") as folder:
        _write(Path(folder, "call"), _dumps((fn, tuple(args), dict(kwargs or {}))))
        command = [sys.executable, "-c", _LAUNCH, "-np", str(np), *launcher]
        command += [sys.executable, "-m", "carole._run", folder]
        variables = {**os.environ, **(env or {})}
        # What this process imports, the ranks can import.
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            code = subprocess.run(command, env=variables, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            raise BrokenError(f"the job was ended after {timeout} s") from None
        return _results(folder, np, code)


def _results(folder: str, np: int, code: int) -> List[Any]:
    results, missing = [], []
    failed: Optional[BrokenError] = None
    for rank in range(np):
        file = Path(folder, f"result.{rank}")
        if not file.exists():
            missing.append(rank)
            continue
        good, value = pickle.loads(file.read_bytes())
        if good:
            results.append(value)
        elif failed is None or "BrokenError" in str(failed):
            # The first cause rather than the ranks that heard of it.
            failed = BrokenError(f"rank {rank} raised:\n{value}")
            failed.culprit = rank
    if failed is not None:
        raise failed
    if missing:
        error = BrokenError(f"rank {', '.join(map(str, missing))} ended without a result (carolerun: {code})")
        error.culprit = missing[0]
        raise error
    return results


def _write(path: Path, data: bytes) -> None:
    # Whole or not at all, and never readable by others.
    part = path.with_name(path.name + ".part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    os.rename(part, path)


def _check_folder(folder: str) -> None:
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(f"{folder} is not a folder of this user's own; carole.run makes one")


def _work(folder: str) -> int:
    _check_folder(folder)
    rank = int(os.environ["CAROLE_RANK"])
    try:
        fn, args, kwargs = pickle.loads(Path(folder, "call").read_bytes())
        data = _dumps((True, fn(*args, **kwargs)))
    except BaseException:
        _write(Path(folder, f"result.{rank}"), pickle.dumps((False, traceback.format_exc())))
        raise
    _write(Path(folder, f"result.{rank}"), data)
    return 0


if __name__ == "__main__":
    sys.exit(_work(*sys.argv[1:]))

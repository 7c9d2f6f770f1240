"""Runs a function on several ranks, each in a process of its own.

    results = run(3, body)           # body() on three ranks; what it returned, in rank order

A rank that raises, dies or outlives the time makes `run` raise `Failed`, whose text has the end of every rank's
output. No launcher is involved: the ranks are started with plain variables.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from typing import Any, Callable, Collection, Dict, List, Optional

TIMEOUT_S = 60.0


class Failed(AssertionError):
    """Some rank did not return a result."""


def environment(rank: int, size: int, job: str, extra: Optional[Dict[str, str]] = None) -> Dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CAROLE_", "HOROVOD_"))}
    return {
        **clean,
        "CAROLE_RANK": str(rank), "CAROLE_SIZE": str(size),
        "CAROLE_LOCAL_RANK": str(rank), "CAROLE_LOCAL_SIZE": str(size),
        "CAROLE_JOB": job, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        **(extra or {}),
    }  # fmt: skip


def run(
    size: int,
    body: Callable[..., Any],
    *arguments: Any,
    init: bool = True,
    env: Optional[Dict[str, str]] = None,
    timeout_s: float = TIMEOUT_S,
    may_die: Collection[int] = (),
) -> List[Any]:
    """Results in rank order; None for a rank of `may_die` that ended without one."""
    path, name = body.__code__.co_filename, body.__name__
    job = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="carole-test-") as folder:
        call = Path(folder, "call")
        call.write_bytes(pickle.dumps((path, name, arguments, init)))
        processes = []
        for rank in range(size):
            with open(Path(folder, f"output.{rank}"), "wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(call), str(Path(folder, f"result.{rank}"))],
                        env=environment(rank, size, job, env),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )  # fmt: skip
                )
        deadline = time.monotonic() + timeout_s
        late = []
        for rank, process in enumerate(processes):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
        for process in processes:
            process.kill()
            process.wait()
        results: List[Any] = []
        bad = [f"rank {rank} did not end within {timeout_s} s" for rank in late]
        for rank, process in enumerate(processes):
            file = Path(folder, f"result.{rank}")
            results.append(pickle.loads(file.read_bytes()) if file.exists() else None)
            if rank not in late and rank not in may_die and (process.returncode != 0 or not file.exists()):
                bad.append(f"rank {rank} ended with {process.returncode}")
        if bad:
            for rank in range(size):
                text = Path(folder, f"output.{rank}").read_text(errors="replace")
                bad.append(f"--- output of rank {rank} ---\n{text[-3000:]}")
            raise Failed("\n".join(bad))
        return results


def catch(kind: Any, call: Callable[[], Any]) -> str:
    """The text of the error that `call` must raise."""
    try:
        result = call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no error, but {result!r}")


def _main() -> None:
    call, result = sys.argv[1:]
    path, name, arguments, init = pickle.loads(Path(call).read_bytes())
    # Tests import this file as `harness`: the same directory, not a second copy.
    sys.path.insert(0, str(Path(path).parent))
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[Path(path).stem] = module
    specification.loader.exec_module(module)
    import carole

    try:
        if init:
            carole.init()
        value = getattr(module, name)(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Without a goodbye, so that the other ranks fail at once and not by their own time limit.
        os._exit(1)
    Path(result).write_bytes(pickle.dumps(value))
    if init:
        carole.shutdown()


if __name__ == "__main__":
    _main()

"""Runs a function on several ranks, each in a process of its own.

    results = run(3, body)           # body() on three ranks; what it returned, in rank order

A rank that raises, dies or outlives the time makes `run` raise `Failed`, whose text has the end of every rank's
output. No launcher is involved: the ranks are started with plain variables.

`run_forked` is the same for tests of torch, whose import takes seconds: the ranks are forks of one process that has
imported it, and has done nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from typing import Any, Callable, Collection, Dict, List, Optional

# Long, since a test machine may be busy with other things; no test should come near it.
TIMEOUT_S = float(os.environ.get("TEST_TIMEOUT_S", "300"))
# What takes long to import; some of it is not in every torch.
PRELOADED = (
    "torch", "torch.distributed", "carole", "carole.torch", "torch.optim", "torch._dynamo", "torch.distributed.tensor",
    "torch.distributed.fsdp", "torch.distributed.checkpoint",
)  # fmt: skip


# The kernel gives ports from 32768 on to whatever connects or binds to port 0, at any moment; never these.
PORTS = range(10000, 32000)


def free_port(count: int = 16) -> int:
    """A port that nobody listens on, nor on those after it, and that no connection is given meanwhile."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with contextlib.ExitStack() as probes:
            try:
                for offset in range(count):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except OSError:
                continue
        return port


class Failed(AssertionError):
    """Some rank did not return a result."""


def environment(rank: int, size: int, job: str, extra: Optional[Dict[str, str]] = None) -> Dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CAROLE_", "HOROVOD_"))}
    return {
        **clean,
        "CAROLE_RANK": str(rank), "CAROLE_SIZE": str(size),
        "CAROLE_LOCAL_RANK": str(rank), "CAROLE_LOCAL_SIZE": str(size),
        # A rank that gets no processor for some seconds is not dead; tests of silence set their own limits.
        "CAROLE_TIMEOUT_MS": "20000", "CAROLE_START_TIMEOUT_S": "120",
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
    forked: bool = False,
) -> List[Any]:
    """Results in rank order; None for a rank of `may_die` that ended without one."""
    path, name = body.__code__.co_filename, body.__name__
    job = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="carole-test-") as folder:
        call = Path(folder, "call")
        call.write_bytes(pickle.dumps((path, name, arguments, init)))
        commands = [[str(call), str(Path(folder, f"result.{rank}"))] for rank in range(size)]
        environments = [environment(rank, size, job, env) for rank in range(size)]
        outputs = [str(Path(folder, f"output.{rank}")) for rank in range(size)]
        start = _fork_all if forked else _start_all
        codes = start(commands, environments, outputs, timeout_s)
        late = [rank for rank, code in enumerate(codes) if code is None]
        results: List[Any] = []
        bad = [f"rank {rank} did not end within {timeout_s} s" for rank in late]
        for rank, code in enumerate(codes):
            file = Path(folder, f"result.{rank}")
            results.append(pickle.loads(file.read_bytes()) if file.exists() else None)
            if rank not in late and rank not in may_die and (code != 0 or not file.exists()):
                bad.append(f"rank {rank} ended with {code}")
        if bad:
            for rank in range(size):
                text = Path(folder, f"output.{rank}").read_text(errors="replace")
                bad.append(f"--- output of rank {rank} ---\n{text[-3000:]}")
            raise Failed("\n".join(bad))
        return results


def run_forked(size: int, body: Callable[..., Any], *arguments: Any, **options: Any) -> List[Any]:
    """`run` with ranks that have imported torch already."""
    return run(size, body, *arguments, forked=True, **options)


Codes = List[Optional[int]]


def _start_all(commands: List[List[str]], environments: List[Dict[str, str]], outputs: List[str],
               timeout_s: float) -> Codes:  # fmt: skip
    processes = []
    for command, variables, output in zip(commands, environments, outputs):
        with open(output, "wb") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, *command], env=variables, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    deadline = time.monotonic() + timeout_s
    codes: Codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    for process in processes:
        process.kill()
        process.wait()
    return codes


_forker: Optional[subprocess.Popen] = None


def _fork_all(commands: List[List[str]], environments: List[Dict[str, str]], outputs: List[str],
              timeout_s: float) -> Codes:  # fmt: skip
    global _forker
    if _forker is None:
        _forker = subprocess.Popen(
            [sys.executable, __file__], env=environment(0, 1, "forker"), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(_forker.kill)
    assert _forker.stdin is not None and _forker.stdout is not None
    _forker.stdin.write(json.dumps([commands, environments, outputs, timeout_s]) + "\n")
    _forker.stdin.flush()
    return json.loads(_forker.stdout.readline())


def _serve() -> None:
    """Forks ranks on request, and answers how they ended."""
    for name in PRELOADED:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    for line in sys.stdin:
        commands, environments, outputs, timeout_s = json.loads(line)
        pids = []
        for command, variables, output in zip(commands, environments, outputs):
            pid = os.fork()
            if pid == 0:
                return _become(command, variables, output)
            pids.append(pid)
        deadline = time.monotonic() + timeout_s
        codes: Codes = [None] * len(pids)
        while None in codes and time.monotonic() < deadline:
            for number, pid in enumerate(pids):
                if codes[number] is None:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    codes[number] = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.01)
        for number, pid in enumerate(pids):
            if codes[number] is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        print(json.dumps(codes), flush=True)


def _become(command: List[str], variables: Dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    import torch

    torch.set_num_threads(1)
    _main(*command)


def catch(kind: Any, call: Callable[[], Any]) -> str:
    """The text of the error that `call` must raise."""
    try:
        result = call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no error, but {result!r}")


def _main(call: str, result: str) -> None:
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
    if len(sys.argv) == 1:
        _serve()
    else:
        _main(*sys.argv[1:])

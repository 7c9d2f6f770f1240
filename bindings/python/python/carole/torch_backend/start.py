"""How the ranks of a default process group find each other through torch's store, and the sets of its subgroups."""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
import uuid
from typing import Any, Dict, List

from .. import _life, _native
from .._errors import UsageError

# What says that a launcher has told this process who it is.
_LAUNCHED = ("CAROLE_RANK", "HOROVOD_RANK")

_joins = 0


def join(store: Any, rank: int, size: int, timeout_s: float) -> None:
    """Joins the job of `size` ranks, unless this process is in one already, which then must be the same."""
    global _joins
    if not _native.is_initialized():
        # A rank that does not take part in an operation for so long is what c10d calls a timeout.
        knobs: Dict[str, Any] = {"stall_fail_s": max(1, min(int(timeout_s), 10**6))}
        knobs["stall_warn_s"] = max(1, min(60, int(timeout_s / 2)))
        if any(name in os.environ for name in _LAUNCHED):
            _life.init(**knobs)
        else:
            _join_through(store, rank, size, f"carole/{_joins}", knobs)
        _joins += 1
    world = _native.world()
    if (world["rank"], world["size"]) != (rank, size):
        raise UsageError(
            f"init_process_group says rank {rank} of {size}, and this process is rank {world['rank']} of "
            f"{world['size']} of Carole's job; give both the same numbers"
        )


def _host() -> str:
    """What tells this host, and its present life, from others."""
    given = os.environ.get("CAROLE_HOST_ID")
    if given:
        return given
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()}/{file.read().strip()}"
    except OSError:
        return socket.gethostname()


def _join_through(store: Any, rank: int, size: int, prefix: str, knobs: Dict[str, Any]) -> None:
    store.set(f"{prefix}/host/{rank}", _host())
    hosts = [_text(store, f"{prefix}/host/{other}") for other in range(size)]
    local = [other for other in range(size) if hosts[other] == hosts[rank]]
    knobs.update(rank=rank, size=size, local_rank=local.index(rank), local_size=len(local))
    if rank == 0:
        plan = {"job": uuid.uuid4().hex, "secret": secrets.token_hex(32), "address": ""}
        if len(set(hosts)) > 1:
            plan["address"] = _free_address(store)
        store.set(f"{prefix}/plan", json.dumps(plan))
    plan = json.loads(_text(store, f"{prefix}/plan"))
    knobs["job"] = plan["job"]
    if not plan["address"]:
        # On one host the kernel vouches for the user, so no secret is needed.
        _life.init(**knobs)
        return
    knobs["rendezvous"] = plan["address"]
    # The file is 0600 from its creation, and gone as soon as it was read.
    with tempfile.NamedTemporaryFile("w", prefix="carole-") as file:
        file.write(plan["secret"])
        file.flush()
        _life.init(secret_file=file.name, **knobs)


def _text(store: Any, key: str) -> str:
    # `get` waits until another rank has set it, for the time that init_process_group was given.
    return store.get(key).decode()


def _free_address(store: Any) -> str:
    """An address of rank 0 that the other hosts can reach: the host of the store, which all have reached."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host = os.environ.get("MASTER_ADDR") or getattr(store, "host", None) or socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ensure_set(ranks: List[int]) -> int:
    """The number of the process set of these ranks; made by all ranks together where it is new."""
    ordered = sorted(ranks)
    if ordered == list(range(_native.world()["size"])):
        return 0
    for number, members, _ in _native.process_sets():
        if members == ordered:
            return number
    return _native.add_process_set(ordered)

"""CAROLE_ENCRYPT: what passes between ranks over TCP is encrypted, and everything goes on as it does in clear."""

import os
import signal
import socket
import time

import numpy as np
import pytest

import carole
from harness import catch, free_port, run

ENCRYPTED = {"CAROLE_ENCRYPT": "1", "CAROLE_TRANSPORT": "tcp"}
# As a tensor's bytes it is found again in what passes in clear.
PATTERN = b"it is the gradient of layer 7 ;)"
ALL_PROTOCOLS = 3


def body_values():
    me, size = carole.rank(), carole.size()
    for count in (1, 7, 1000, 300_001, 3_000_000):
        ones = np.full(count, me + 1, np.float32)
        assert (carole.allreduce(ones, carole.Sum) == size * (size + 1) / 2).all()
    gathered = carole.allgather(np.full((me + 1, 3), me, np.int16))
    assert (gathered == np.repeat(np.arange(size), np.arange(1, size + 1))[:, None]).all()
    assert (carole.broadcast(np.arange(100_000) * (me == 1), 1) == np.arange(100_000)).all()
    received, _ = carole.alltoall(np.full(size * 50_000, me), [50_000] * size)
    assert (received == np.repeat(np.arange(size), 50_000)).all()
    handles = [carole.allreduce_async(np.full(999, i), carole.Sum, name=f"t{i}") for i in range(200)]
    assert all((handle.wait() == size * i).all() for i, handle in enumerate(handles))
    carole.barrier()
    return "ok"


@pytest.mark.parametrize("size, lanes", [(2, 1), (3, 4)])
def test_values(size, lanes):
    assert run(size, body_values, env={**ENCRYPTED, "CAROLE_TCP_LANES": str(lanes)}) == ["ok"] * size


def body_pattern():
    """Rank 0 looks at all that passes on the loopback interface while the ranks exchange a tensor."""
    tap = None
    if carole.rank() == 0:
        try:
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
        except PermissionError:
            tap = None
        else:
            tap.bind(("lo", 0))
            tap.setblocking(False)
    tensor = np.frombuffer(PATTERN * 20, np.uint8)
    # Packets of others on this machine may push them out of the socket's buffer, so that one look is not enough.
    seen, packets = False, 0
    for _ in range(20):
        carole.broadcast(tensor, 1, name="secret")
        while tap:
            try:
                packet = tap.recv(1 << 16)
            except BlockingIOError:
                break
            packets += 1
            seen |= PATTERN in packet
    return (seen, packets) if tap else "skipped"


def test_what_passes_cannot_be_read():
    plain = run(2, body_pattern, env={"CAROLE_TRANSPORT": "tcp"})[0]
    if plain == "skipped":
        pytest.skip("packets can be looked at by root only")
    assert plain[0], "the test does not see what it should"
    seen, packets = run(2, body_pattern, env=ENCRYPTED)[0]
    assert packets > 0 and not seen


def body_one_rank_only():
    os.environ["CAROLE_ENCRYPT"] = str(carole_rank() % 2)
    return catch(carole.UsageError, carole.init)


def carole_rank():
    return int(os.environ["CAROLE_RANK"])


def test_one_rank_only_is_an_error_for_all():
    texts = run(2, body_one_rank_only, init=False, env={"CAROLE_TRANSPORT": "tcp"})
    assert all("CAROLE_ENCRYPT" in text and "rank 1" in text for text in texts), texts


def body_over_a_port(port):
    """Ranks that meet over TCP: the meeting is encrypted, too, and refuses who does not."""
    os.environ["CAROLE_RENDEZVOUS"] = f"127.0.0.1:{port}"
    if carole_rank() == 2:
        os.environ["CAROLE_ENCRYPT"] = "0"
    return catch(carole.UsageError, carole.init)


def test_a_meeting_over_tcp_refuses_who_does_not_encrypt(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(os.urandom(32).hex())
    secret.chmod(0o600)
    env = {**ENCRYPTED, "CAROLE_SECRET_FILE": str(secret), "CAROLE_START_TIMEOUT_S": "3"}
    texts = run(3, body_over_a_port, free_port(), init=False, env=env)
    assert "CAROLE_ENCRYPT=1" in texts[2], texts
    assert all("rank 2" in text for text in texts[:2]), texts


def body_killed():
    me = carole.rank()
    tensor = np.ones(3_000_000, np.float32)
    started = time.monotonic()
    try:
        for turn in range(1000):
            if me == 1 and turn == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            carole.allreduce(tensor, carole.Sum)
    except carole.BrokenError as error:
        assert error.culprit == 1, error
    assert time.monotonic() - started < 20
    carole.reform()
    assert carole.size() == 2
    assert (carole.allreduce(tensor, carole.Sum) == 2).all()
    return "ok"


def test_a_killed_rank():
    assert run(3, body_killed, env=ENCRYPTED, may_die={1})[::2] == ["ok"] * 2

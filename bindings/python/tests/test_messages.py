"""Tagged messages between two ranks."""

import os
import time

import numpy as np

import carole
from harness import catch, run
from test_collectives import all_types, same, values


def body_types():
    me, size = carole.rank(), carole.size()
    for dtype in all_types():
        for shape in ((), (0,), (1,), (5, 3), (40_000,)):
            out = np.empty(shape, dtype)
            sending = carole.send_async(values(me, shape, dtype), (me + 1) % size, tag=7)
            assert carole.recv(out, (me - 1) % size, tag=7) is out
            same(out, values((me - 1) % size, shape, dtype), (dtype.name, shape))
            assert sending.wait() is None and sending.poll()


def test_every_type_and_shape():
    run(3, body_types)


def body_tags():
    """Messages with one tag come in order; those with different tags do not wait for each other."""
    count = 50
    if carole.rank() == 0:
        order = np.random.default_rng(0).permutation(count)
        handles = [carole.send_async(np.full(1000, i), 1, tag=int(i)) for i in order]
        handles += [carole.send_async(np.array([i]), 1, tag=2**32 - 1) for i in range(count)]
        for handle in handles:
            handle.wait(30)
        return
    outs = [np.empty(1000, np.int64) for _ in range(count)]
    for i, handle in enumerate([carole.recv_async(out, 0, tag=i) for i, out in enumerate(outs)]):
        assert (handle.wait(30) == i).all()
    out = np.empty(1, np.int64)
    assert [int(carole.recv(out, 0, tag=2**32 - 1)[0]) for _ in range(count)] == list(range(count))


def test_tags_and_order():
    run(2, body_tags)


def body_sent_before_leaving():
    """What was sent before its sender left can still be received, and what was not ends with an error."""
    count = 20
    pid = int(carole.broadcast(np.array([os.getpid()]), 0)[0])
    if carole.rank() == 0:
        for i in range(count):
            carole.send(np.full(100, i), 1, tag=i % 3)
        carole.shutdown()
        return
    out = np.empty(100, np.int64)
    never = carole.recv_async(np.empty(100), 0, tag=9)
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.01)
    assert "rank 0" in catch(carole.ShutdownError, lambda: never.wait(30))
    for tag in (2, 0, 1):
        for i in range(tag, count, 3):
            assert (carole.recv(out, 0, tag=tag) == i).all()
    for tag in (0, 9):
        assert "rank 0" in catch(carole.ShutdownError, lambda: carole.recv(out, 0, tag=tag))
    assert "rank 0" in catch(carole.ShutdownError, lambda: carole.send(out, 0))


def test_messages_that_were_sent_before_leaving():
    for transport in ("shm", "tcp"):
        run(2, body_sent_before_leaving, env={"CAROLE_TRANSPORT": transport})


def body_both_ways():
    """Large messages in both directions at once do not wait for each other."""
    me = carole.rank()
    x, out = np.full(1 << 20, me), np.empty(1 << 20, np.int64)
    for _ in range(3):
        sending = carole.send_async(x, 1 - me)
        carole.recv(out, 1 - me)
        sending.wait()
        assert (out == 1 - me).all()


def test_both_ways():
    run(2, body_both_ways)


def body_wrong():
    me, size = carole.rank(), carole.size()
    x = np.ones(4)
    assert f"{size}" in catch(carole.UsageError, lambda: carole.send(x, size))
    assert "rank" in catch(carole.UsageError, lambda: carole.send(x, me))
    for wrong in (-1, "next", 1.5):
        catch(carole.UsageError, lambda: carole.send(x, wrong))
    catch(carole.UsageError, lambda: carole.send(x, 1 - me, tag=-1))
    catch(carole.UsageError, lambda: carole.send([1.0], 1 - me))
    catch(carole.UsageError, lambda: carole.recv([1.0], 1 - me))
    catch(carole.UsageError, lambda: carole.send(np.ones((4, 4))[:, 0], 1 - me))
    # Different lengths: the receiver is told. A small message is on its way before anybody can know.
    if me == 0:
        try:
            carole.send(x, 1, tag=3)
        except carole.MismatchError as error:
            assert "32 bytes" in str(error) and "24 bytes" in str(error), error
    else:
        out = np.full(3, 7.0)
        text = catch(carole.MismatchError, lambda: carole.recv(out, 0, 3))
        assert "32 bytes on rank 0" in text and "24 bytes on rank 1" in text, text
        assert (out == 7).all()
    assert (carole.allreduce(np.ones(2), carole.Sum) == size).all()


def test_messages_that_are_wrong():
    run(2, body_wrong)

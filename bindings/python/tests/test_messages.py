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


def body_any(count):
    """Rank 0 hears everybody: empty, small and large messages, each length with a tag of its own; each sender's come in
    their order."""
    me, size = carole.rank(), carole.size()
    lengths = [1, 0, 300_000, 1000]
    if me != 0:
        arrays = [(np.full(lengths[i % 4], 100 * me + i, np.int64), i % 4) for i in range(count)]
        for handle in [carole.send_async(array, 0, tag) for array, tag in arrays]:
            handle.wait(60)
        return
    for tag, length in reversed(list(enumerate(lengths))):
        seen = {}
        for _ in range((size - 1) * count // 4):
            out = np.full(length, -1, np.int64)
            source = carole.recv_any(out, tag)
            turn = seen.setdefault(source, 0)
            assert (out == 100 * source + tag + 4 * turn).all(), (source, tag, turn, out[:3])
            seen[source] += 1
        assert seen == {rank: count // 4 for rank in range(1, size)}, seen


def test_from_any_rank():
    for transport in ("shm", "tcp"):
        run(4, body_any, 32, env={"CAROLE_TRANSPORT": transport})


def body_any_turns():
    me, size, out = carole.rank(), carole.size(), np.empty(1)
    if me != 0:
        for _ in range(10):
            carole.send(out, 0, tag=1)
        carole.send(out, 0, tag=2)
        carole.barrier()
        return
    for source in range(1, size):
        carole.recv(out, source, tag=2)
    # What every rank had sent before is here: each has its turn.
    assert [carole.recv_any(out, tag=1) for _ in range(10 * (size - 1))] == 10 * list(range(1, size))
    carole.barrier()


def test_ranks_have_their_turns():
    run(4, body_any_turns)


def body_any_order():
    """Receives of one tag take messages in the order in which they were started, whether they name a rank or not."""
    me = carole.rank()
    if me == 1:
        carole.barrier()
        for i in range(4):
            carole.send(np.array([i]), 0, tag=3)
        return
    if me == 2:
        carole.barrier()
        return
    outs = [np.empty(1, np.int64) for _ in range(4)]
    handles = [
        carole.recv_any_async(outs[0], tag=3),
        carole.recv_async(outs[1], 1, tag=3),
        carole.recv_any_async(outs[2], tag=3),
        carole.recv_any_async(outs[3], tag=3),
    ]
    assert not any(handle.poll() for handle in handles)
    carole.barrier()
    assert [handle.wait(60) for handle in reversed(handles)][::-1] == [1, outs[1], 1, 1]
    assert [int(out[0]) for out in outs] == [0, 1, 2, 3]


def test_order_of_receives_from_any_rank():
    run(3, body_any_order)


def body_any_timeout():
    me, out = carole.rank(), np.empty(1 << 20)
    if me != 0:
        carole.barrier()
        carole.barrier()
        carole.send(np.full(1 << 20, float(me)), 0) if me == 2 else None
        return
    handle = carole.recv_any_async(out)
    carole.barrier()
    text = catch(carole.TimeoutError, lambda: handle.wait(0.3))
    assert "from any rank with tag 0" in text and "can be waited for again" in text, text
    carole.barrier()
    catch(carole.UsageError, lambda: carole.recv_any([1.0]))
    catch(carole.UsageError, lambda: carole.recv_any(out, tag=-1))
    assert handle.wait(60) == 2 and (out == 2).all()


def test_a_receive_from_any_rank_that_waits():
    run(3, body_any_timeout)


def body_any_leaves(meet):
    """What was sent before everybody left is received; then nothing can come any more."""
    me, size = carole.rank(), carole.size()
    if me != 0:
        if meet:
            carole.barrier()
        for i in range(3):
            carole.send(np.full(10, 10 * me + i), 0, tag=1)
        carole.shutdown()
        return
    never = carole.recv_any_async(np.empty(10), tag=9)
    if meet:
        carole.barrier()
    assert "rank" in catch(carole.ShutdownError, lambda: never.wait(60))
    seen = []
    for _ in range(3 * (size - 1)):
        out = np.empty(10, np.int64)
        source = carole.recv_any(out, tag=1)
        assert out[0] // 10 == source
        seen.append(int(out[0]))
    assert sorted(seen) == [10 * rank + i for rank in range(1, size) for i in range(3)], seen
    text = catch(carole.ShutdownError, lambda: carole.recv_any(np.empty(10), tag=1))
    assert "rank" in text, text


def test_receives_from_any_rank_of_those_who_have_left():
    for transport in ("shm", "tcp"):
        for meet in (True, False):
            run(3, body_any_leaves, meet, env={"CAROLE_TRANSPORT": transport})


def body_any_dies():
    me = carole.rank()
    carole.barrier()
    if me == 2:
        os._exit(3)
    text = catch(carole.BrokenError, lambda: carole.recv_any(np.empty(1)))
    assert "rank 2" in text, text


def test_a_death_ends_a_receive_from_any_rank():
    run(3, body_any_dies, may_die=(2,))


def body_any_alone():
    assert "another member" in catch(carole.UsageError, lambda: carole.recv_any(np.empty(1)))
    assert "recv_any" in catch(carole.UsageError, lambda: carole.recv(np.empty(1), None))
    assert "dest=None" in catch(carole.UsageError, lambda: carole.send(np.empty(1), None))


def test_nobody_to_receive_from():
    run(1, body_any_alone)

"""Small collectives that repeat: after a few they are done without agreement, until somebody deviates."""

import os
import random
import signal
import time

import numpy as np
import pytest

import carole
from carole import _native
from harness import catch, run
from test_collectives import all_types, close, combine, ops_for, values
from test_persistent import stay_away

# Agreements after which a name stands where the seats on the boards are agreed on.
ENOUGH = 8


def stands(name, process_set=0):
    return _native.stands(process_set, name)


def settle(name, process_set=None):
    """Repeats an operation until it stands, which is after as many times on all ranks: the links, and the seats on the
    boards, come when they come."""
    tensor = np.ones(3, np.float32)
    process_set = process_set or carole.global_process_set
    for turn in range(5000):
        carole.allreduce(tensor, carole.Sum, name=name, process_set=process_set)
        if stands(name, process_set.process_set_id):
            return tensor
        time.sleep(0.001 if turn > ENOUGH else 0)
    raise AssertionError(f"{name} never stands")


def stay(outcome="ok"):
    """Nothing stands any more when a rank has left, so nobody leaves before all have looked."""
    carole.barrier()
    return outcome


def body_values():
    me, size = carole.rank(), carole.size()
    settle("first")
    for dtype in all_types():
        for op in ops_for(dtype):
            if op == carole.Adasum:
                continue
            for shape in [(), (1,), (size * 2 + 1, 3)]:
                name = f"{dtype.name}.{op.name}.{shape}"
                for turn in range(ENOUGH):
                    inputs = [values(rank + 3 * turn, shape, dtype) for rank in range(size)]
                    mine = inputs[me].copy()
                    total = combine(op, inputs, dtype)
                    out = mine if turn % 3 == 0 else np.empty_like(mine) if turn % 3 == 1 else None
                    result = carole.allreduce(mine, op, name=name, out=out)
                    close(result, total, (name, turn))
                    if turn == ENOUGH - 1:
                        # The same bits as by agreement.
                        agreed = carole.allreduce(inputs[me].copy(), op, name=name + ".fresh")
                        assert np.asarray(result).tobytes() == np.asarray(agreed).tobytes(), name
                assert stands(name), name
    scaled = np.full(5, me + 1, np.float32)
    for _ in range(ENOUGH):
        result = carole.allreduce(scaled, carole.Sum, name="scaled", prescale_factor=2.0, postscale_factor=0.5)
        assert (result == size * (size + 1) / 2).all()
    assert stands("scaled")
    return stay()


@pytest.mark.parametrize("size", [2, 3])
def test_values(size):
    assert run(size, body_values) == ["ok"] * size


def all_kinds(turn, dtype, prefix):
    """Every other collective that may stand, and what it must give: (name, call, result or none)."""
    me, size = carole.rank(), carole.size()

    def of(rank, rows=(2, 3)):
        return values(rank + 3 * turn, rows, dtype)

    def rows(rank):
        # A scalar is a row, and one rank has none.
        return of(rank, () if rank == 0 else (rank - 1,))

    def splits(rank):
        return [(rank + to) % 3 for to in range(size)]

    def sends(rank):
        return of(rank, (sum(splits(rank)), 2))

    def received(rank):
        at = sum(splits(rank)[:me])
        return sends(rank)[at : at + splits(rank)[me]]

    dealt = [of(rank, (2 * size + 1, 3)) for rank in range(size)]
    begin = me * 2 + min(me, 1)
    mine = slice(begin, begin + 2 + (me == 0))
    root = size - 1
    op = carole.Max if dtype.kind == "b" else carole.Sum
    calls = [
        ("broadcast", lambda name: carole.broadcast(of(me), root, name=name), of(root)),
        ("scalar", lambda name: carole.broadcast(of(me, ()), root, name=name), of(root, ())),
        ("allgather", lambda name: carole.allgather(of(me), name=name), np.concatenate([of(r) for r in range(size)])),
        (
            "uneven",
            lambda name: carole.allgather(rows(me), name=name),
            np.concatenate([rows(r).reshape(-1) for r in range(size)]),
        ),
        ("reducescatter", lambda name: carole.reducescatter(dealt[me], op, name=name), combine(op, dealt, dtype)[mine]),
        (
            "reduce",
            lambda name: carole.reduce(of(me), root, op=op, name=name),
            combine(op, [of(r) for r in range(size)], dtype) if me == root else None,
        ),
        (
            "alltoall",
            lambda name: carole.alltoall(of(me, (size * 2, 3)), name=name),
            np.concatenate([of(r, (size * 2, 3))[me * 2 : me * 2 + 2] for r in range(size)]),
        ),
        (
            "splits",
            lambda name: carole.alltoall(sends(me), splits(me), name=name),
            (np.concatenate([received(r) for r in range(size)]), [splits(r)[me] for r in range(size)]),
        ),
    ]
    return [(f"{prefix}.{kind}", call, result) for kind, call, result in calls]


def body_kinds():
    settle("first")
    for dtype in all_types():
        for turn in range(ENOUGH):
            for name, call, expected in all_kinds(turn, dtype, dtype.name):
                result = call(name)
                if isinstance(expected, tuple):
                    assert list(result[1]) == list(expected[1]), (name, turn)
                    result, expected = result[0], expected[0]
                if expected is None:
                    assert result is None, (name, turn)
                else:
                    close(result, expected, (name, turn))
        for name, _, _ in all_kinds(0, dtype, dtype.name):
            assert stands(name), name
    return stay()


@pytest.mark.parametrize("size", [2, 3])
def test_every_kind(size):
    assert run(size, body_kinds) == ["ok"] * size


def body_other_rows():
    """Rows and splits are no part of what must agree: who has others makes an ordinary operation of it."""
    me, size = carole.rank(), carole.size()
    settle("first")

    def gather(rows):
        return carole.allgather(np.full((rows, 2), me, np.int32), name="rows").shape[0]

    def exchange(splits):
        return list(carole.alltoall(np.arange(sum(splits), dtype=np.int64), splits, name="splits")[1])

    for lone in range(size):
        for _ in range(ENOUGH):
            assert gather(2) == 2 * size
            assert exchange([1] * size) == [1] * size
        assert stands("rows") and stands("splits")
        assert gather(2 + (me == lone)) == 2 * size + 1
        assert exchange([1 + (me == lone)] * size) == [1 + (rank == lone) for rank in range(size)]
        assert not stands("rows") and not stands("splits")
    # Another root, and splits that cannot be.
    for _ in range(ENOUGH):
        carole.broadcast(np.full(2, me), 0, name="root")
    assert stands("root")
    text = catch(carole.MismatchError, lambda: carole.broadcast(np.full(2, me), 1 if me else 0, name="root"))
    assert "'root'" in text and "root" in text.replace("'root'", ""), text
    for _ in range(ENOUGH):
        gather(2)
    assert stands("rows")
    text = catch(ValueError, lambda: carole.alltoall(np.zeros(3 * size), [size] * (size + 1), name="rows"))
    assert "splits" in text, text
    return stay()


@pytest.mark.parametrize("size", [2, 3])
def test_other_rows(size):
    assert run(size, body_other_rows) == ["ok"] * size


def body_large():
    """More than a few kilobytes lie aside; all else is as with small ones."""
    me, size = carole.rank(), carole.size()
    settle("first")
    dtypes = [np.dtype(kind) for kind in (np.float32, np.float16, np.uint8)]
    for n in ((4 << 10) + 4, (64 << 10) + 12, 256 << 10):
        for dtype in dtypes:
            name = f"{dtype.name}.{n}"
            shape = (n // dtype.itemsize,)
            for turn in range(ENOUGH):
                inputs = [values(rank + 3 * turn, shape, dtype) for rank in range(size)]
                mine = inputs[me].copy()
                out = mine if turn % 3 == 0 else np.empty_like(mine) if turn % 3 == 1 else None
                result = carole.allreduce(mine, carole.Sum, name=name, out=out)
                close(result, combine(carole.Sum, inputs, dtype), (name, turn))
                gathered = carole.allgather(inputs[me], name="g" + name)
                assert gathered.tobytes() == np.concatenate(inputs).tobytes(), (name, turn)
                shown = carole.broadcast(inputs[me], size - 1, name="b" + name)
                assert shown.tobytes() == inputs[size - 1].tobytes(), (name, turn)
            assert stands(name) and stands("g" + name) and stands("b" + name), name
            agreed = carole.allreduce(inputs[me].copy(), carole.Sum, name=name + ".fresh")
            assert np.asarray(result).tobytes() == np.asarray(agreed).tobytes(), name
    # The memory of what stood is used again, whoever deviates and however often.
    for turn in range(50):
        for _ in range(ENOUGH):
            wide = np.full(30_000 + turn % 2, me + turn, np.float32)
            total = carole.allreduce(wide, carole.Sum, name="changes")
            assert (total == size * turn + size * (size - 1) / 2).all(), turn
        assert stands("changes"), turn
    text = catch(carole.MismatchError, lambda: carole.allreduce(np.ones(30_000 + (me == 1)), name="changes"))
    assert "'changes'" in text and "rank 0" in text and "rank 1" in text, text
    for _ in range(ENOUGH):
        carole.allreduce(np.ones(30_000), carole.Sum, name="changes")
    assert stands("changes")
    if me > 0:
        assert carole.join() >= 0
    else:
        assert (carole.allreduce(np.ones(30_000), carole.Sum, name="changes") == 1).all()
        assert carole.join() >= 0
    assert (carole.allreduce(np.ones(30_000), carole.Sum, name="changes") == size).all()
    return stay()


@pytest.mark.parametrize("size", [2, 3])
def test_large(size):
    assert run(size, body_large) == ["ok"] * size


def body_without_memory():
    """A rank that gets no memory for what lies aside goes the ordinary way, and so do all."""
    me, size = carole.rank(), carole.size()
    settle("first")
    names = [f"n{i}" for i in range(40)]
    for turn in range(3 * ENOUGH):
        for name in names:
            x = np.full(64 << 10, me + turn, np.float32)
            assert (carole.allreduce_(x, carole.Sum, name=name) == size * turn + 1).all(), (name, turn)
    return stay(sum(map(stands, names)))


def test_memory_that_runs_out():
    standing = run(2, body_without_memory, env={"CAROLE_MEMORY": "16M"})
    assert all(0 < some < 40 for some in standing), standing
    assert run(2, body_without_memory) == [40, 40]


def body_does_not():
    ones = np.ones(3, np.float32)
    big = np.ones((256 << 10) + 1, np.uint8)
    for _ in range(300):
        time.sleep(0.001)
        assert (carole.allreduce(ones, carole.Sum, name="small") == carole.size()).all()
        carole.allreduce(big, carole.Sum, name="big")
        carole.gather(ones, 0, name="gather")
        carole.allreduce(ones, carole.Sum)
    return stay([stands(name) for name in ("small", "big", "gather", "allreduce.noname.0")])


@pytest.mark.parametrize(
    "knobs, small",
    [
        ({}, True),
        ({"CAROLE_TRANSPORT": "tcp"}, False),
        ({"CAROLE_ALGORITHM": "ring"}, False),
        ({"CAROLE_UNIFORM": "1"}, True),
        ({"CAROLE_CACHE_CAPACITY": "0"}, False),
    ],
)
def test_what_stands(knobs, small):
    assert run(2, body_does_not, env=knobs) == [[small, False, False, False]] * 2


def body_deviations():
    me, size = carole.rank(), carole.size()
    ones = settle("shape")
    text = catch(carole.MismatchError, lambda: carole.allreduce(np.ones(3 + (me == 1), np.float32), name="shape"))
    assert "'shape'" in text and "rank 0" in text and "rank 1" in text and "[4]" in text, text
    assert not stands("shape")
    settle("shape")
    # All go on with something else, which stands in its turn.
    for width in (5, 2, 5):
        wide = np.arange(width, dtype=np.float32)
        for _ in range(ENOUGH):
            assert (carole.allreduce(wide, carole.Sum, name="shape") == wide * size).all()
        assert stands("shape")
    settle("op")
    text = catch(carole.MismatchError, lambda: carole.allreduce(ones, carole.Max if me else carole.Sum, name="op"))
    assert "'op'" in text and "reduction" in text, text
    settle("kind")
    calls = [lambda: carole.allgather(ones, name="kind"), lambda: carole.allreduce(ones, name="kind")]
    assert "'kind'" in catch(carole.MismatchError, calls[me == 0])
    settle("refused")
    text = catch(
        (carole.MismatchError, carole.UsageError),
        lambda: carole.allreduce("text" if me == 1 else ones, name="refused"),
    )
    assert "str" in text if me == 1 else "rank 1 refused" in text, text
    # A name is in flight once.
    settle("twice")
    carole.barrier()
    first = carole.allreduce_async(ones, carole.Sum, name="twice")
    text = catch(carole.UsageError, lambda: carole.allreduce_async(ones, carole.Sum, name="twice"))
    assert "'twice' is in flight already" in text, text
    assert (first.wait() == size).all()
    assert stands("twice")
    return stay()


@pytest.mark.parametrize("size", [2, 3])
def test_deviations(size):
    assert run(size, body_deviations) == ["ok"] * size


def body_join():
    me, size = carole.rank(), carole.size()
    ones = settle("joined")
    if me > 0:
        # What was started before counts before.
        last = carole.allreduce_async(ones, carole.Sum, name="joined")
        assert carole.join() >= 0
        assert (last.wait() == size).all()
    else:
        assert (carole.allreduce(ones, carole.Sum, name="joined") == size).all()
        for _ in range(3):
            assert (carole.allreduce(ones, carole.Sum, name="joined") == 1).all()
        assert carole.join() >= 0
    settle("joined")
    assert (carole.allreduce(ones, carole.Sum, name="joined") == size).all()
    return "ok"


@pytest.mark.parametrize("size", [2, 3])
def test_join(size):
    assert run(size, body_join) == ["ok"] * size


def body_join_before():
    """What makes an operation stand may be agreed on when a rank has joined, which will not start it."""
    me, size = carole.rank(), carole.size()
    ones = settle("first")
    for name in ("a", "b", "c"):
        # From the third agreement on it stands.
        for _ in range(2):
            assert (carole.allreduce(ones, carole.Sum, name=name) == size).all()
    carole.barrier()
    if me > 0:
        handles = [carole.allreduce_async(ones, carole.Sum, name=name) for name in ("a", "b", "c")]
        assert carole.join() >= 0
        assert all((handle.wait() == size).all() for handle in handles)
    else:
        time.sleep(0.5)
        for name in ("a", "b", "c"):
            assert (carole.allreduce(ones, carole.Sum, name=name) == size).all()
        for name in ("a", "b", "c"):
            assert (carole.allreduce(ones, carole.Sum, name=name) == 1).all()
        assert carole.join() >= 0
    assert (carole.allreduce(ones, carole.Sum, name="a") == size).all()
    return "ok"


@pytest.mark.parametrize("size", [2, 3])
def test_a_join_before_it_stands(size):
    assert run(size, body_join_before) == ["ok"] * size


def body_unwaited():
    """A start is nobody's to wait for: it ends by itself, and by a look at it."""
    me, size = carole.rank(), carole.size()
    ones = settle("unwaited")
    settle("late")
    for _ in range(5):
        handle = carole.allreduce_async(ones, carole.Sum, name="unwaited")
        until = time.monotonic() + 20
        while not handle.poll():
            assert time.monotonic() < until
        assert (handle.wait() == size).all()
    carole.allreduce_async(ones, carole.Sum, name="unwaited")  # dropped
    until = time.monotonic() + 20
    while True:
        # Refused until the start that nobody waits for is over.
        try:
            carole.allreduce(ones, carole.Sum, name="unwaited")
            break
        except carole.UsageError as error:
            assert "in flight" in str(error) and time.monotonic() < until
    # Who deviates is heard of by a rank that does something else meanwhile.
    if me == 0:
        handle = carole.allreduce_async(ones, carole.Sum, name="late")
        time.sleep(0.5)
        assert "'late'" in catch(carole.MismatchError, handle.wait)
    else:
        assert "'late'" in catch(carole.MismatchError, lambda: carole.allreduce(ones, carole.Max, name="late"))
    return "ok"


def test_nobody_needs_to_wait():
    assert run(2, body_unwaited) == ["ok"] * 2


def body_shuffled():
    me, size = carole.rank(), carole.size()
    order = random.Random(me)
    settle("first")
    tensors = [np.full(1 + i % 50, i, np.float32) for i in range(200)]
    for turn in range(100):
        names = list(range(200))
        order.shuffle(names)
        handles = {}
        for i in names:
            handles[i] = carole.allreduce_async(tensors[i] + turn, carole.Sum, name=f"t{i}")
        order.shuffle(names)
        for i in names:
            assert (handles[i].wait() == size * (i + turn)).all(), (turn, i)
    assert all(stands(f"t{i}") for i in range(200))
    return stay()


@pytest.mark.parametrize("size", [2, 4])
def test_any_order(size):
    assert run(size, body_shuffled) == ["ok"] * size


def body_full():
    """More names than there is room for: the others go on by agreement."""
    settle("first")
    tensor = np.ones(1000, np.float32)
    names = [f"n{i}" for i in range(200)]
    for _ in range(ENOUGH):
        for handle in [carole.allreduce_async(tensor, carole.Sum, name=name) for name in names]:
            assert (handle.wait() == carole.size()).all()
    standing = sum(stands(name) for name in names)
    assert 100 < standing < 200, standing
    return stay()


def test_no_room():
    assert run(2, body_full) == ["ok"] * 2


def body_sets():
    me = carole.rank()
    pair = carole.add_process_set([0, 1])
    ones = settle("first")
    if me < 2:
        settle("first", pair)
    for turn in range(ENOUGH):
        assert (carole.allreduce(ones, carole.Sum, name="x") == 3).all()
        if me < 2:
            assert (carole.allreduce(ones * turn, carole.Sum, name="x", process_set=pair) == 2 * turn).all()
    assert stands("x") and stands("x", pair.process_set_id) == (me < 2)
    carole.remove_process_set(pair)
    assert (carole.allreduce(ones, carole.Sum, name="x") == 3).all()
    return "ok"


def test_sets():
    assert run(3, body_sets) == ["ok"] * 3


def body_lost(how):
    me = carole.rank()
    ones = settle("lost")
    if me != 2:
        carole.send_async(np.zeros(1), 2)
    else:
        # The others are done with the operation by which it stands, so that the loss is not what that ends with.
        carole.recv(np.zeros(1), 0)
        carole.recv(np.zeros(1), 1)
        if how == "leaves":
            return "left"
        os.kill(os.getpid(), signal.SIGKILL)
    error = carole.ShutdownError if how == "leaves" else carole.BrokenError
    started = time.monotonic()
    text = catch(error, lambda: carole.allreduce(ones, carole.Sum, name="lost"))
    assert "rank 2" in text and time.monotonic() - started < 20, text
    catch(error, lambda: carole.allreduce(ones, carole.Sum, name="lost"))
    carole.shutdown()
    return "ok"


@pytest.mark.parametrize("how", ["is killed", "leaves"])
def test_a_rank_is_lost(how):
    may_die = {2} if how == "is killed" else set()
    assert run(3, body_lost, how, may_die=may_die)[:2] == ["ok"] * 2


def body_left_in_flight():
    """Who leaves with a start that others do not make gets an error for it, and so do they."""
    me = carole.rank()
    ones = settle("a")
    settle("b")
    carole.barrier()
    handle = carole.allreduce_async(ones, carole.Sum, name="a" if me else "b")
    if me:
        carole.shutdown()
        catch(carole.ShutdownError, handle.wait)
    else:
        text = catch(carole.ShutdownError, handle.wait)
        assert "rank 1" in text, text
    return "ok"


def test_leaving_with_starts_in_flight():
    assert run(2, body_left_in_flight) == ["ok"] * 2


def body_slow():
    me = carole.rank()
    ones = settle("slow")
    carole.barrier()
    if me == 1:
        time.sleep(1)
    burnt = time.process_time()
    carole.allreduce(ones, carole.Sum, name="slow")
    # What the wait burns, not how long it takes: a waiter that spins for a whole second burns a whole second.
    assert time.process_time() - burnt < 0.5
    # A wait has its limit, after which it can be waited for again.
    if me == 0:
        handle = carole.allreduce_async(ones, carole.Sum, name="slow")
        text = catch(TimeoutError, lambda: handle.wait(0.05))
        assert "'slow'" in text, text
        carole.barrier()
        assert (handle.wait() == 2).all()
    else:
        carole.barrier()
        assert (carole.allreduce(ones, carole.Sum, name="slow") == 2).all()
    return "ok"


def test_a_slow_rank_is_slept_for():
    assert run(2, body_slow) == ["ok"] * 2


def body_stalled():
    ones = settle("stalled")
    alone = carole.add_process_set([1])
    if carole.rank() == 1:
        stay_away(alone)
    else:
        text = catch(carole.BrokenError, lambda: carole.allreduce(ones, carole.Sum, name="stalled"))
        assert "'stalled' was not submitted by rank 1" in text, text
    return "ok"


def test_who_never_starts_ends_the_epoch_where_that_is_asked_for():
    assert run(2, body_stalled, env={"CAROLE_STALL_FAIL_S": "1"}) == ["ok"] * 2

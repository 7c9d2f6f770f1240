"""Collectives that are planned once and started many times."""

import os
import signal
import time

import numpy as np
import pytest

import carole
from harness import catch, run
from test_collectives import all_types, close, combine, my_rows, ops_for, values


def body_all(direct):
    me, size = carole.rank(), carole.size()
    for dtype in all_types():
        for op in ops_for(dtype):
            if op == carole.Adasum:
                continue
            inputs = [values(rank, (size * 2 + 1, 3), dtype) for rank in range(size)]
            total = combine(op, inputs, dtype)
            mine = inputs[me].copy()
            with carole.allreduce_init(mine, op) as plan, carole.reducescatter_init(mine, op) as part:
                assert plan.is_direct == part.is_direct == direct
                for _ in range(3):
                    close(plan(), total, (dtype.name, op.name))
                    close(part(), my_rows(total, me, size), (dtype.name, op.name))
                # Every start reads what is there then.
                mine[...] = 1 if dtype.name != "bool" else True
                close(plan(), combine(op, [mine] * size, dtype), (dtype.name, op.name))
    rows = np.full((me + 1, 2), me, np.int32)
    gather = carole.allgather_init(rows)
    cast = carole.broadcast_init(rows[:1], root=size - 1)
    reduce = carole.reduce_init(rows[:1], root=size - 1, op=carole.Sum)
    swap = carole.alltoall_init(np.arange(size * 2) + 100 * me, splits=[2] * size)
    for turn in range(3):
        expected = np.concatenate([np.full((r + 1, 2), r + turn) for r in range(size)])
        assert (gather() == expected).all()
        assert (cast() == size - 1 + turn).all()
        total = sum(range(size)) + size * turn
        reduced = reduce()
        assert reduced is None if me < size - 1 else (reduced == total).all()
        received, counts = swap()
        assert (received == np.concatenate([[2 * me, 2 * me + 1] + np.int64(100 * r) for r in range(size)])).all()
        assert counts == [2] * size
        rows += 1
    return "ok"


@pytest.mark.parametrize("size", [2, 3])
def test_everything(size):
    assert run(size, body_all, True) == ["ok"] * size


@pytest.mark.parametrize("knob", [{"CAROLE_TRANSPORT": "tcp"}, {"CAROLE_ALGORITHM": "ring"}])
def test_by_name(knob):
    """Where ranks share no memory the same results come by the ordinary way."""
    assert run(2, body_all, False, env=knob) == ["ok"] * 2


def test_alone():
    assert run(1, body_all, False) == ["ok"]


def body_sizes():
    me, size = carole.rank(), carole.size()
    plans = []
    for n in (0, 1, 17, 1000, 100_003, 1_000_001):
        x = np.empty(n, np.float32)
        plans.append((x, carole.allreduce_init(x, carole.Sum, out=x, name=f"x{n}")))
    parts = [np.empty((r % 5, 3), [np.float32, np.float64, np.int16][r % 3]) for r in range(300)]
    group = carole.grouped_allreduce_init(parts, carole.Sum, out=parts)
    for turn in range(4):
        # All are under way at once, and not started in the same order everywhere.
        for x, plan in plans if me % 2 else plans[::-1]:
            x[...] = np.arange(x.size) % 1000 + me + turn
            plan.start()
        for x, plan in plans:
            assert plan.wait() is x
            expected = (np.arange(x.size) % 1000 + turn) * size + sum(range(size))
            assert (x == expected.astype(np.float32)).all()
        for r, part in enumerate(parts):
            part[...] = r % 100 + me
        group()
        for r, part in enumerate(parts):
            assert (part == (r % 100) * size + sum(range(size))).all(), r
        # Between them go ordinary operations.
        assert (carole.allreduce(np.full(5, me), carole.Sum) == sum(range(size))).all()
    return "ok"


@pytest.mark.parametrize("size", [2, 4])
def test_sizes_and_orders(size):
    assert run(size, body_sizes) == ["ok"] * size


def body_mistakes():
    me = carole.rank()
    x = np.ones(3 + me, np.float32)
    text = catch(carole.MismatchError, lambda: carole.allreduce_init(x, name="shapes"))
    assert "'shapes'" in text and "rank 0" in text and "[3]" in text and "[4]" in text, text
    text = catch(carole.MismatchError, lambda: carole.allreduce_init(x[:3], [carole.Sum, carole.Max][me], name="ops"))
    assert "'ops'" in text and "reduction" in text, text
    bad = x[:3] if me else "text"
    text = catch((carole.MismatchError, carole.UsageError), lambda: carole.allreduce_init(bad, name="bad"))
    assert "'bad'" in text and "rank 0 refused" in text if me else "str" in text, text
    text = catch((carole.MismatchError, carole.UsageError), lambda: carole.grouped_allreduce_init(5 if me else [x[:3]]))
    assert "lists of arrays" in text, text
    plan = carole.allreduce_init(x[:3], carole.Sum, name="good")
    plan.start()
    text = catch(carole.UsageError, plan.start)
    assert "under way" in text, text
    plan.wait()
    text = catch((carole.UsageError, carole.MismatchError), carole.join)
    assert "persistent" in text, text
    plan.close()
    plan.close()
    assert "closed" in catch(carole.UsageError, plan)
    assert carole.join() >= 0
    # A rank that does not come is named, and the wait has its limit.
    with carole.allreduce_init(x[:3], carole.Sum, name="late") as plan:
        if me == 0:
            plan.start()
            text = catch(TimeoutError, lambda: plan.wait(0.2))
            assert "'late'" in text and "rank 1 has not started" in text, text
            carole.barrier()
            plan.wait()
        else:
            carole.barrier()
            plan()
    return "ok"


def test_mistakes():
    assert run(2, body_mistakes) == ["ok"] * 2


def body_progress():
    """What was started goes on while nobody waits."""
    me, n = carole.rank(), 3_000_000
    x = np.full(n, me + 1, np.float32)
    plan = carole.allreduce_init(x, carole.Sum, out=x)
    plan.start()
    if me == 0:
        until = time.monotonic() + 20
        while not plan.poll():
            assert time.monotonic() < until
    carole.barrier()
    plan.wait()
    assert (x == 3).all()
    return "ok"


def test_progress():
    assert run(2, body_progress) == ["ok"] * 2


def body_killed():
    me = carole.rank()
    x = np.ones(100_000, np.float32)
    plan = carole.allreduce_init(x, carole.Sum, name="killed")
    for turn in range(1000):
        if me == 2 and turn == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            plan()
        except carole.BrokenError as error:
            # The turn before may be done at rank 2 and not yet here.
            assert turn >= 499 and "rank 2" in str(error), (turn, error)
            catch(carole.BrokenError, plan)
            plan.close()
            return "broken"
    raise AssertionError("nobody noticed")


def test_killed():
    assert run(3, body_killed, may_die={2})[:2] == ["broken"] * 2


def body_leaves():
    me = carole.rank()
    x = np.ones(10, np.float32)
    plan = carole.allreduce_init(x, carole.Sum, name="leaves")
    plan()
    if me == 1:
        return "left"
    started = time.monotonic()
    text = catch(carole.ShutdownError, plan)
    assert "rank 1" in text and time.monotonic() - started < 20, text
    return "ok"


def test_a_rank_leaves():
    assert run(2, body_leaves) == ["ok", "left"]


def body_many():
    """Memory of plans that were given up is used again."""
    x = np.ones(200_000, np.float32)
    for turn in range(3000):
        plan = carole.allreduce_init(x, carole.Sum)
        if turn % 100 == 0:
            assert (plan() == carole.size()).all()
        plan.close()
    return "ok"


def test_many_plans():
    assert run(2, body_many, env={"CAROLE_MEMORY": "64M"}) == ["ok"] * 2


def body_interrupted():
    """Ctrl-C ends a call that plans alone."""
    if carole.rank() == 0:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        started = time.monotonic()
        try:
            carole.allreduce_init(np.ones(3), name="alone")
        except KeyboardInterrupt:
            assert time.monotonic() - started < 20
            return "interrupted"
        raise AssertionError("it planned alone")
    time.sleep(1)
    return "interrupted"


def test_planning_can_be_interrupted():
    assert run(2, body_interrupted) == ["interrupted"] * 2


def stay_away(alone):
    """Does other things, in a set of its own, until the epoch breaks."""
    while True:
        try:
            carole.barrier(process_set=alone)
            time.sleep(0.01)
        except carole.BrokenError:
            return


def body_stalled():
    alone = carole.add_process_set([1])
    plan = carole.allreduce_init(np.ones(3), name="stalled")
    if carole.rank() == 1:
        stay_away(alone)
    assert "'stalled' was not submitted by rank 1" in catch(carole.BrokenError, plan)
    return "ok"


def test_who_never_starts_ends_the_epoch_where_that_is_asked_for():
    assert run(2, body_stalled, env={"CAROLE_STALL_FAIL_S": "1"}) == ["ok"] * 2

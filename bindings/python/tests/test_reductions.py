"""Every reduction x operation x type that the contract allows, the refusals of the others, Adasum, and join."""

import numpy as np
import pytest

import carole
from harness import catch, run
from test_collectives import all_types, close, combine, my_rows, ops_for, values

NAMED = [carole.Average, carole.Sum, carole.Min, carole.Max, carole.Product, carole.BitAnd, carole.BitOr]


def body_matrix():
    me, size = carole.rank(), carole.size()
    for dtype in all_types():
        inputs = [values(rank, (size * 2 + 1, 3), dtype) for rank in range(size)]
        mine = inputs[me]
        for op in ops_for(dtype):
            what, total = (dtype.name, op.name), combine(op, inputs, dtype)
            close(carole.allreduce(mine, op), total, what)
            close(carole.grouped_allreduce([mine, mine[:1]], op)[1], total[:1], what)
            close(carole.reducescatter(mine, op), my_rows(total, me, size), what)
            close(carole.grouped_reducescatter([mine], op)[0], my_rows(total, me, size), what)
            for root in range(size):
                reduced = carole.reduce(mine, root, op)
                if me == root:
                    close(reduced, total, what)
                else:
                    assert reduced is None, what
        for op in set(NAMED) - set(ops_for(dtype)):
            for call in (carole.allreduce, carole.reducescatter, lambda x, op: carole.reduce(x, 0, op)):
                text = catch(carole.UsageError, lambda: call(mine, op))
                assert op.name.lower() in text.lower() and dtype.name in text, text
            carole.barrier()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_operations_and_types(size):
    run(size, body_matrix)


def adasum(a, b):
    """The rule of the paper, for two vectors, in float64."""
    dot, aa, bb = float(a @ b), float(a @ a), float(b @ b)
    return (1 - dot / (2 * aa) if aa else 1) * a + (1 - dot / (2 * bb) if bb else 1) * b


def body_adasum():
    me, size = carole.rank(), carole.size()
    inputs = [np.random.default_rng(rank).standard_normal(33) for rank in range(size)]
    for dtype in all_types():
        if dtype.kind in "iubc":
            catch(carole.UsageError, lambda: carole.allreduce(values(me, (4,), dtype), carole.Adasum))
            carole.barrier()
            continue
        result = carole.allreduce(inputs[me].astype(dtype), carole.Adasum).astype("f8")
        rounded = [one.astype(dtype).astype("f8") for one in inputs]
        if size == 2:
            expected = adasum(*rounded)
        else:
            expected = adasum(adasum(rounded[0], rounded[1]), rounded[2])
        limit = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2}.get(dtype.name, 1e-1)
        assert np.abs(result - expected).max() <= limit, (dtype, result, expected)


@pytest.mark.parametrize("size", [2, 3])
def test_adasum(size):
    run(size, body_adasum)


def body_numbers():
    size = carole.size()
    me = carole.rank()
    assert carole.allreduce(np.full(3, 200, np.uint8), carole.Sum).tolist() == [200 * size % 256] * 3
    # Floor, not truncation: (-1 + 0 + 0) / 3 and the like.
    assert carole.allreduce(np.array([-1 if me == 0 else 0])).tolist() == [-1]
    nan = np.array([np.nan if me == 1 else 1.0, -0.0 if me == 1 else 0.0], np.float32)
    low, high = carole.allreduce(nan, carole.Min), carole.allreduce(nan, carole.Max)
    assert np.isnan(low[0]) and np.isnan(high[0])
    assert np.signbit(low[1]) and not np.signbit(high[1]), "-0 is less than +0"
    # In f32 until the end: 2048 + 1 + 1 has no place for the ones in f16 if it is rounded on the way.
    half = np.array([2048 if me == 0 else 1], np.float16)
    assert carole.allreduce(half, carole.Sum).tolist() == [np.float16(2048 + size - 1)]
    # Prescaled integers are rounded down one by one, the result is scaled before it is rounded.
    scaled = carole.allreduce(np.array([3], np.int32), carole.Sum, prescale_factor=0.5, postscale_factor=0.5)
    assert scaled.tolist() == [size * 1 // 2]
    return low.tobytes() + high.tobytes()


def test_the_rules_for_numbers():
    assert len(set(run(3, body_numbers))) == 1


def body_join_everything():
    """Rank 0 joins at once; the others run every collective, then join."""
    me, size = carole.rank(), carole.size()
    if me == 0:
        return carole.join()
    for dtype in all_types():
        present = [values(rank, (size, 2), dtype) for rank in range(1, size)]
        mine = present[me - 1]
        for op in ops_for(dtype):
            if op == carole.Average:
                continue
            total = combine(op, present, dtype)
            close(carole.allreduce(mine, op), total, ("join", dtype.name, op.name))
            close(carole.reducescatter(mine, op), my_rows(total, me, size), ("join", dtype.name, op.name))
    x = np.full(4, 6.0 * me)
    total = 6.0 * sum(range(1, size))
    assert (carole.allreduce(x) == total / size).all()
    assert (carole.allreduce(x, join_average="size") == total / size).all()
    assert (carole.allreduce(x, join_average="present") == total / (size - 1)).all()
    assert np.allclose(carole.grouped_allreduce([x, x], join_average="present")[1], total / (size - 1))
    assert np.allclose(carole.reducescatter(np.ones(size), join_average="present"), 1.0)
    assert (carole.allgather(np.array([me])) == np.arange(1, size)).all()
    assert (carole.broadcast(x, root=size - 1) == 6.0 * (size - 1)).all()
    gathered = carole.gather(np.array([me]), root=1)
    assert gathered is None if me != 1 else gathered.tolist() == list(range(1, size))
    output, received = carole.alltoall(np.full(size, me), [1] * size)
    assert output.tolist() == list(range(1, size)) and received == [0] + [1] * (size - 1)
    text = catch(carole.MismatchError, lambda: carole.broadcast(x, root=0, name="root"))
    assert "rank 0" in text and "joined" in text, text
    carole.barrier()
    text = catch(carole.UsageError, lambda: carole.allreduce(x, join_average="all"))
    assert "join_average" in text
    return carole.join()


def test_every_collective_while_a_rank_has_joined():
    last = run(3, body_join_everything)
    assert len(set(last)) == 1 and last[0] in (1, 2)

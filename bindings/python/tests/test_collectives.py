"""Every collective x type x way of calling, on real processes."""

import numpy as np
import pytest

import carole
from harness import catch, run

SIZES = [1, 2, 3]
NAMES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64",
         "bool", "complex64", "complex128"]  # fmt: skip


def all_types():
    types = [np.dtype(name) for name in NAMES]
    try:
        import ml_dtypes

        types.append(np.dtype(ml_dtypes.bfloat16))
    except ImportError:
        pass
    return types


def values(rank, shape, dtype, salt=0):
    """Small whole numbers, so that every sum and product below is exact in every type."""
    count = int(np.prod(shape, dtype=np.int64))
    numbers = (np.arange(count) * 3 + rank * 2 + salt) % 4
    if dtype == np.bool_:
        numbers = numbers % 2
    return numbers.reshape(shape).astype(dtype)


def combine(op, arrays, dtype):
    """The oracle: in a type that is wide enough, then rounded."""
    if dtype == np.bool_:
        stack = np.stack(arrays)
        both = {carole.Sum: np.any, carole.Max: np.any, carole.Product: np.all, carole.Min: np.all,
                carole.BitAnd: np.all, carole.BitOr: np.any}  # fmt: skip
        return both[op](stack, axis=0)
    kind = "c16" if dtype.kind == "c" else "i8" if dtype.kind in "iu" else "f8"
    stack = np.stack([array.astype(kind) for array in arrays])
    if op == carole.Average:
        total = stack.sum(axis=0)
        return (total // len(arrays) if dtype.kind in "iu" else total / len(arrays)).astype(dtype)
    functions = {carole.Sum: np.sum, carole.Product: np.prod, carole.Min: np.min, carole.Max: np.max,
                 carole.BitAnd: np.bitwise_and.reduce, carole.BitOr: np.bitwise_or.reduce}  # fmt: skip
    return functions[op](stack, axis=0).astype(dtype)


def ops_for(dtype):
    ops = [carole.Sum, carole.Product]
    if dtype.kind != "b":
        ops.append(carole.Average)
    if dtype.kind != "c":
        ops += [carole.Min, carole.Max]
    if dtype.kind in "iub":
        ops += [carole.BitAnd, carole.BitOr]
    return ops


def same(actual, expected, what):
    assert actual.dtype == expected.dtype, (what, actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert actual.tobytes() == expected.tobytes() or (actual == expected).all(), (what, actual, expected)


def close(actual, expected, what):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    # An average by 3 may be off by one unit in the last place of its type (divide or multiply by a reciprocal).
    limit = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-22, "complex64": 2**-22}.get(
        expected.dtype.name, 2**-50
    )
    wide = "c16" if expected.dtype.kind == "c" else "f8"
    if expected.dtype.kind in "iub":
        return same(actual, expected, what)
    a, b = actual.astype(wide), expected.astype(wide)
    assert (np.abs(a - b) <= limit * np.maximum(1, np.abs(b))).all(), (what, actual, expected)


def body_allreduce():
    me, size = carole.rank(), carole.size()
    for dtype in all_types():
        for shape in ((), (0,), (1,), (7,), (3, 5), (2, 0, 4), (1000,)):
            inputs = [values(rank, shape, dtype) for rank in range(size)]
            for op in ops_for(dtype):
                what = (dtype.name, shape, op.name)
                expected = combine(op, inputs, dtype)
                mine = inputs[me].copy()
                close(carole.allreduce(mine, op), expected, what)
                same(mine, inputs[me], "the input of an operation not in place is untouched")
                handle = carole.allreduce_async(mine, op, name=f"a.{what}")
                close(carole.wait(handle), expected, what)
                out = np.empty_like(mine)
                assert carole.allreduce(mine, op, out=out) is out
                close(out, expected, what)
                assert carole.allreduce_(mine, op) is mine
                close(mine, expected, what)
                mine = inputs[me].copy()
                assert carole.allreduce_async_(mine, op).wait() is mine
                close(mine, expected, what)


def body_grouped():
    me, size = carole.rank(), carole.size()
    types = all_types()
    shapes = [(), (3,), (0, 2), (2, 3), (257,)]

    def group(rank):
        return [values(rank, shapes[i % len(shapes)], dtype, salt=i) for i, dtype in enumerate(types)]

    groups = [group(rank) for rank in range(size)]
    expected = [combine(carole.Sum, list(arrays), arrays[0].dtype) for arrays in zip(*groups)]
    for _ in range(2):
        for one, (actual, wanted) in enumerate(zip(carole.grouped_allreduce(groups[me], carole.Sum), expected)):
            same(actual, wanted, ("grouped", one))
        handle = carole.grouped_allreduce_async(groups[me], carole.Sum, name="group")
        for actual, wanted in zip(carole.wait(handle), expected):
            same(actual, wanted, "grouped async")
    mine = group(me)
    result = carole.grouped_allreduce_(mine, carole.Sum)
    assert all(a is b for a, b in zip(result, mine))
    for actual, wanted in zip(mine, expected):
        same(actual, wanted, "grouped in place")
    rows = [values(me, (me + i, 2), dtype) for i, dtype in enumerate(types)]
    for i, (dtype, actual) in enumerate(zip(types, carole.grouped_allgather(rows))):
        same(actual, np.concatenate([values(r, (r + i, 2), dtype) for r in range(size)]), "grouped allgather")
    scattered = carole.grouped_reducescatter([values(me, (size * 2 + 1, 2), dtype) for dtype in types], carole.Sum)
    for dtype, actual in zip(types, scattered):
        total = combine(carole.Sum, [values(r, (size * 2 + 1, 2), dtype) for r in range(size)], dtype)
        same(actual, my_rows(total, me, size), "grouped reducescatter")


def my_rows(array, me, size):
    """The contract's deal: the lower ranks get one row more."""
    each, more = divmod(len(array), size)
    start = me * each + min(me, more)
    return array[start : start + each + (1 if me < more else 0)]


def body_rows():
    me, size = carole.rank(), carole.size()
    for dtype in all_types():
        for row in ((), (3,), (2, 2)):
            what = (dtype.name, row)
            # Uneven, and some of them empty.
            uneven = [values(r, (r % 2 * 4 + r,) + row, dtype) for r in range(size)]
            same(carole.allgather(uneven[me]), np.concatenate(uneven), what)
            same(carole.allgather_async(uneven[me], name=f"g{what}").wait(), np.concatenate(uneven), what)
            for root in range(size):
                gathered = carole.gather(uneven[me], root)
                if me == root:
                    same(gathered, np.concatenate(uneven), what)
                else:
                    assert gathered is None
            for rows in (0, 1, size, 2 * size + 1):
                inputs = [values(r, (rows,) + row, dtype) for r in range(size)]
                total = combine(carole.Sum, inputs, dtype)
                same(carole.reducescatter(inputs[me], carole.Sum), my_rows(total, me, size), (what, rows))
                out = np.empty_like(my_rows(total, me, size))
                assert carole.reducescatter(inputs[me], carole.Sum, out=out) is out
                same(out, my_rows(total, me, size), (what, rows, "out"))
                for root in range(size):
                    same(carole.scatter(inputs[me], root), my_rows(inputs[root], me, size), (what, rows, root))
                    copy = inputs[me].copy()
                    same(carole.broadcast(copy, root), inputs[root], (what, rows, root))
                    same(copy, inputs[me], "the input of a broadcast not in place is untouched")
                    assert carole.broadcast_(copy, root) is copy
                    same(copy, inputs[root], (what, rows, root))
                    reduced = carole.reduce(inputs[me], root, carole.Sum)
                    if me == root:
                        same(reduced, total, (what, rows, root))
                    else:
                        assert reduced is None
    same(carole.allgather(np.float32(me)), np.arange(size, dtype=np.float32), "scalars gather to a row each")


def body_alltoall():
    me, size = carole.rank(), carole.size()
    for dtype in all_types():
        equal = [values(r, (size * 2, 3), dtype) for r in range(size)]
        expected = np.concatenate([equal[r][me * 2 : me * 2 + 2] for r in range(size)])
        same(carole.alltoall(equal[me]), expected, (dtype.name, "equal"))
        # Rank r sends (r + j) % 3 rows to rank j, so some splits are empty.
        splits = [[(r + j) % 3 for j in range(size)] for r in range(size)]
        inputs = [values(r, (sum(splits[r]), 2), dtype) for r in range(size)]
        output, received = carole.alltoall(inputs[me], splits[me])
        assert list(received) == [splits[r][me] for r in range(size)]
        parts = [inputs[r][sum(splits[r][:me]) : sum(splits[r][: me + 1])] for r in range(size)]
        same(output, np.concatenate(parts), (dtype.name, "splits"))
        again, _ = carole.alltoall_async(inputs[me], np.array(splits[me]), name="all").wait()
        same(again, output, "async")


def ring_of_messages(me, size):
    """Twice, with different tags, the second received first."""
    one, two = np.empty(3, np.int64), np.empty((), np.float32)
    handles = [
        carole.send_async(np.full(3, me), (me + 1) % size, tag=1),
        carole.send_async(np.float32(me), (me + 1) % size, tag=2),
    ]
    assert carole.recv(two, (me - 1) % size, tag=2) is two and two == (me - 1) % size
    carole.recv(one, (me - 1) % size, tag=1)
    assert (one == (me - 1) % size).all()
    for handle in handles:
        handle.wait()


def body_rest():
    me, size = carole.rank(), carole.size()
    x = np.full(5, me + 1, np.float32)
    scaled = carole.allreduce(x, carole.Sum, prescale_factor=0.5, postscale_factor=4.0)
    same(scaled, np.full(5, 2 * size * (size + 1) / 2, np.float32), "scales")
    adasum = carole.allreduce(np.ones(4), carole.Adasum)
    assert np.allclose(adasum, 1.0), "the adaptive sum of equal gradients is that gradient"
    carole.barrier()
    carole.barrier_async(name="b").wait()
    if size > 1:
        ring_of_messages(me, size)
    many = [carole.allreduce_async(np.full(9, i + me), carole.Sum, name=f"m{i}") for i in np.random.permutation(50)]
    for handle in many:
        handle.wait()
    last = carole.join()
    assert 0 <= last < size
    return last


def body_join():
    me, size = carole.rank(), carole.size()
    steps = 3 + me
    for step in range(steps):
        present = [r for r in range(size) if 3 + r > step]
        total = carole.allreduce(np.full(4, me + 1.0), carole.Sum, name="x")
        assert (total == sum(r + 1 for r in present)).all(), (step, total)
        mean = carole.allreduce(np.full(4, me + 1.0), carole.Average, name="y", join_average="present")
        assert np.allclose(mean, sum(r + 1 for r in present) / len(present))
        mean = carole.allreduce(np.full(4, me + 1.0), carole.Average, name="z")
        assert np.allclose(mean, sum(r + 1 for r in present) / size)
    return carole.join()


def body_sets():
    me, size = carole.rank(), carole.size()
    catch(carole.UsageError, lambda: carole.add_process_set(list(range(size))))
    catch(carole.UsageError, lambda: carole.add_process_set([size]))
    if size == 1:
        return
    even = carole.add_process_set(list(range(0, size, 2)))
    assert even.included() == (me % 2 == 0) and even.size() == (size + 1) // 2
    if even.included():
        assert even.rank() == me // 2
        total = carole.allreduce(np.ones(3), carole.Sum, process_set=even)
        assert (total == even.size()).all()
        assert (carole.broadcast(np.full(2, me), root=0, process_set=even) == 0).all()
    carole.barrier()
    assert carole.remove_process_set(even) and even.process_set_id is None
    assert carole.remove_process_set(carole.global_process_set) is False


def body_static_sets():
    size = int(__import__("os").environ["CAROLE_SIZE"])
    first = carole.ProcessSet([0])
    carole.init(process_sets=[first] if size > 1 else [])
    if size > 1:
        assert first.process_set_id != 0
        if first.included():
            assert (carole.allreduce(np.ones(2), carole.Sum, process_set=first) == 1).all()
    carole.shutdown()
    assert first.process_set_id is None
    carole.init()
    assert (carole.allreduce(np.ones(2), carole.Sum) == size).all()
    carole.shutdown()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("body", [body_allreduce, body_grouped, body_rows, body_alltoall, body_rest, body_sets])
def test_collectives(body, size):
    results = run(size, body)
    assert len(set(results)) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_join(size):
    assert run(size, body_join) == [size - 1] * size


@pytest.mark.parametrize("size", [1, 3])
def test_sets_given_to_init_and_a_second_init(size):
    run(size, body_static_sets, init=False)


def body_bits():
    x = np.random.default_rng(carole.rank()).standard_normal(100_000).astype(np.float32)
    return carole.allreduce(x, carole.Average).tobytes()


def test_all_ranks_hold_the_same_bits():
    results = run(3, body_bits)
    assert results[0] == results[1] == results[2]

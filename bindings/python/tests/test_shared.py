"""Tensors in memory that the ranks of a host share."""

import gc
import os
import signal
import time

import numpy as np
import pytest

import carole
from carole._shared import allocate
from harness import catch, run
from test_collectives import all_types, close, combine, ops_for, values

BIG = 40_000


def lies_on_a_board(array):
    """Whether an array lies in memory that other processes map."""
    at = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= at < last:
                return "carole-board" in line
    return False


def body_all(shared):
    me, size = carole.rank(), carole.size()
    for dtype in all_types():
        array = carole.shared_zeros(BIG, dtype=dtype)
        assert array.shape == (BIG,) and not array.any() and lies_on_a_board(array) == shared
        out = carole.shared_zeros([BIG], dtype=dtype.name)
        for op in ops_for(dtype):
            inputs = [values(rank, (BIG,), dtype) for rank in range(size)]
            total = combine(op, inputs, dtype)
            array[...] = inputs[me]
            result = carole.allreduce(array, op, out=out)
            assert result is out
            close(out, total, (dtype.name, op.name, "apart"))
            assert (array == inputs[me]).all() or dtype.kind in "fc", "an input is only read"
            carole.allreduce_(array, op)
            close(array, total, (dtype.name, op.name, "in place"))
            # Where one rank has its array elsewhere, all go the ordinary way.
            own = inputs[me].copy() if me == 1 else array
            own[...] = inputs[me]
            carole.allreduce_(own, op)
            close(own, total, (dtype.name, op.name, "one elsewhere"))
    return "ok"


@pytest.mark.parametrize("size", [2, 3])
def test_everything(size):
    assert run(size, body_all, True) == ["ok"] * size


def test_where_nothing_is_shared():
    assert run(2, body_all, False, env={"CAROLE_TRANSPORT": "tcp"}) == ["ok"] * 2
    assert run(1, body_all, False) == ["ok"]


def body_shapes():
    """Several sizes and groups, by name and planned, in a set and in all ranks, with what is not shared between."""
    me, size = carole.rank(), carole.size()
    pair = carole.add_process_set([0, 1])
    for n in (1, 16_383, 16_384, 100_003, 3_000_001):
        x = carole.shared_zeros(n)
        parts = [carole.shared_zeros(n // 3, 2), carole.shared_zeros(0), carole.shared_zeros(7)]
        with carole.allreduce_init(x, carole.Sum, out=x) as plan:
            for turn in range(3):
                expected = (np.arange(n) % 1000 + turn) * size + sum(range(size))
                x[...] = np.arange(n) % 1000 + me + turn
                if turn == 1:
                    plan()
                else:
                    carole.allreduce_(x, carole.Sum, name="x")
                assert (x == expected).all(), (n, turn)
                for part in parts:
                    part[...] = me
                carole.grouped_allreduce_(parts, carole.Average)
                assert all((part == sum(range(size)) / size).all() for part in parts)
        if me < 2:
            x[...] = me
            carole.allreduce_(x, carole.Max, process_set=pair)
            assert (x == 1).all()
        view = x[n // 2 :]
        view[...] = 1
        carole.allreduce_(view, carole.Sum)
        assert (view == size).all()
    return "ok"


@pytest.mark.parametrize("size", [3, 4])
def test_shapes(size):
    assert run(size, body_shapes) == ["ok"] * size


def body_one_has_none():
    """A rank without arrays in shared memory stalls nobody, in no set."""
    me, size = carole.rank(), carole.size()
    pair = carole.add_process_set([0, 1])
    array = np.zeros(BIG, np.float32) if me == 1 else carole.shared_zeros(BIG)
    until = time.monotonic() + 2.5
    going = np.full(1, size)
    while going[0] == size:
        array[...] = me
        carole.allreduce_(array, carole.Sum, name="mixed")
        assert (array == sum(range(size))).all()
        if me < 2:
            carole.allreduce_(array, carole.Average, process_set=pair)
        going[...] = time.monotonic() < until
        carole.allreduce_(going, carole.Sum)
    carole.remove_process_set(pair)
    return "ok"


def test_one_has_none():
    assert run(3, body_one_has_none, env={"CAROLE_STALL_WARN_S": "1", "CAROLE_STALL_FAIL_S": "2"}) == ["ok"] * 3


def body_memory():
    for turn in range(300):
        array = carole.shared_zeros(256, 1024)
        assert not array.any(), "what is given again is zero again"
        array[...] = turn
        if turn % 50 == 0:
            carole.allreduce_(array, carole.Sum)
    text = catch(carole.UsageError, lambda: [carole.shared_zeros(1 << 20) for _ in range(100)])
    assert "CAROLE_MEMORY" in text and str(4 << 20) in text, text
    gc.collect()
    assert carole.shared_zeros(1 << 20).size == 1 << 20
    text = catch(carole.UsageError, lambda: carole.shared_zeros(1 << 62, 1 << 62))
    assert "fits no memory" in text, text
    text = catch(carole.UsageError, lambda: carole.shared_zeros(3, dtype="text"))
    assert "'text'" in text, text
    kept = carole.shared_zeros(BIG)
    kept[...] = 7
    carole.barrier()
    carole.shutdown()
    assert (kept == 7).all(), "arrays stay after the job"
    assert "init" in catch(carole.Error, lambda: carole.shared_zeros(1))
    return "ok"


def test_memory():
    assert run(2, body_memory, env={"CAROLE_MEMORY": "64M"}) == ["ok"] * 2


def body_fork():
    """A data loader that is forked sees the array, and leaves it alone when it ends."""
    array = carole.shared_zeros(BIG)
    array[...] = 5
    child = os.fork()
    if child == 0:
        seen = bool((array == 5).all())
        del array
        gc.collect()
        os._exit(0 if seen else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (array == 5).all()
    carole.allreduce_(array, carole.Sum)
    assert (array == 5 * carole.size()).all()
    return "ok"


def test_fork():
    assert run(2, body_fork) == ["ok"] * 2


def body_killed(planned):
    me = carole.rank()
    memory = allocate((1 << 24,), "float32")
    assert memory.is_shared
    array = np.asarray(memory)
    plan = carole.allreduce_init(array, carole.Sum, out=array) if planned else None
    for turn in range(1000):
        array[...] = turn + 1
        try:
            if plan:
                plan.start()
            else:
                handle = carole.allreduce_async_(array, carole.Sum, name="killed")
            # That its members lend their arrays is agreed on during the first turns.
            if me == 2 and turn > 5:
                # The others write into this rank's array: they are in the middle of it.
                while array[0] == turn + 1 and not (plan or handle).poll():
                    pass
                if array[-1] == turn + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            (plan or handle).wait()
        except carole.BrokenError as error:
            assert "rank 2" in str(error), error
            break
    else:
        raise AssertionError("nobody noticed")
    # It stood in a batch that failed: nobody else reaches it any more, and it is the caller's.
    assert not memory.is_shared and not lies_on_a_board(array)
    array[...] = me
    time.sleep(0.1)
    assert (array == me).all()
    return "broken"


@pytest.mark.parametrize("planned", [False, True])
def test_killed(planned):
    assert run(3, body_killed, planned, may_die={2})[:2] == ["broken"] * 2


def body_reform():
    array = carole.shared_zeros(BIG)
    carole.allreduce_(array, carole.Sum)
    carole.reform()
    for again in (array, carole.shared_zeros(BIG)):
        again[...] = carole.rank()
        carole.allreduce_(again, carole.Sum)
        assert (again == sum(range(carole.size()))).all()
    assert lies_on_a_board(again)
    return "ok"


def test_reform():
    assert run(2, body_reform) == ["ok"] * 2


def body_torch():
    import torch

    import carole.torch as hvd

    tensor = hvd.shared_zeros(200, 300)
    assert tensor.dtype == torch.float32 and tuple(tensor.shape) == (200, 300) and lies_on_a_board(tensor.numpy())
    for dtype in (torch.bfloat16, torch.float64, torch.int32, torch.bool):
        other = hvd.shared_zeros((BIG,), dtype=dtype)
        assert other.dtype == dtype and not other.any()
        other.fill_(1)
        hvd.allreduce_(other, op=hvd.Max)
        assert bool((other == 1).all())
    tensor.fill_(hvd.rank())
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert bool((tensor == sum(range(hvd.size()))).all())
    model = torch.nn.Linear(300, 300)
    hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), gradient_as_bucket_view=True
    )
    assert all(lies_on_a_board(p.grad.numpy()) for p in model.parameters()), "buckets lie there, too"
    return "ok"


def test_torch():
    pytest.importorskip("torch")
    assert run(2, body_torch) == ["ok"] * 2

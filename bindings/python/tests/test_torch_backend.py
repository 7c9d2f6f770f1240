"""`torch.distributed` on the backend "carole". SKIPPED AS A WHOLE where torch is not installed."""

import datetime
import os
import time

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: carole.torch_backend is NOT tested")

import torch.distributed as dist  # noqa: E402
from harness import catch, free_port  # noqa: E402
from harness import run_forked as run  # noqa: E402

OLD = torch.__version__.startswith("1.")
new_only = pytest.mark.skipif(OLD, reason=f"torch {torch.__version__}: a Python process group has no such methods")


def begin(timeout_s=120):
    """Joins as a program under carolerun does: rank and size from the launcher, the store by MASTER_ADDR."""
    import carole.torch_backend  # noqa: F401

    rank, size = (int(os.environ[name]) for name in ("CAROLE_RANK", "CAROLE_SIZE"))
    dist.init_process_group(
        "carole", init_method=f"tcp://127.0.0.1:{os.environ['PORT']}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )  # fmt: skip
    return rank, size


def run_c10d(size, body, *arguments, env=None, **options):
    # A rank of a busy machine may not get a processor for seconds; none of these tests is about silence.
    variables = {"PORT": str(free_port()), "CAROLE_TIMEOUT_MS": "30000", **(env or {})}
    return run(size, body, *arguments, init=False, env=variables, **options)


def check_reductions(rank, size, group=None):
    ops = dist.ReduceOp
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8):
        for op, expected in (
            (ops.SUM, size * (size + 1) // 2), (ops.MAX, size), (ops.MIN, 1), (ops.PRODUCT, [1, 1, 2, 6][size]),
        ):  # fmt: skip
            x = torch.full((3, 2), rank + 1, dtype=dtype)
            dist.all_reduce(x, op=op, group=group)
            assert (x == expected).all(), (dtype, op, x)
    x = torch.full((2,), float(rank))
    if hasattr(ops, "AVG"):
        dist.all_reduce(x, op=ops.AVG, group=group)
        assert (x == (size - 1) / 2).all()
    x = torch.arange(6.0).reshape(2, 3).t()
    work = dist.all_reduce(x, async_op=True, group=group)
    assert work.wait() and work.is_completed()
    assert torch.equal(x, torch.arange(6.0).reshape(2, 3).t() * size)
    works = [dist.all_reduce(torch.full((5,), float(i)), async_op=True, group=group) for i in range(200)]
    future = works[7].get_future()
    future.wait()
    assert future.value()[0][0] == 7 * size
    for work in works:
        work.wait()


def body_basic():
    rank, size = begin()
    check_reductions(rank, size)
    for root in range(size):
        x = torch.full((2, 2), float(rank))
        dist.broadcast(x, root)
        assert (x == root).all()
    out = [torch.empty(3, 2) for _ in range(size)]
    dist.all_gather(out, torch.full((3, 2), float(rank)))
    assert [one[0, 0].item() for one in out] == list(range(size))
    out = torch.empty(2)
    dist.reduce_scatter(out, [torch.full((2,), float(i)) for i in range(size)])
    assert (out == rank * size).all()
    nxt, before = (rank + 1) % size, (rank - 1) % size
    for dtype in (torch.float32, torch.bool, torch.bfloat16) if size > 1 else ():
        got = torch.zeros(4, dtype=dtype)
        work = dist.isend(torch.ones(4, dtype=dtype), nxt, tag=3)
        dist.recv(got, before, tag=3)
        work.wait()
        assert got.to(torch.float32).sum() == 4
    dist.barrier()
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank, "list": [1] * rank})
    assert objects == [{"rank": r, "list": [1] * r} for r in range(size)]
    listed = [{"from": rank}, "x"]
    dist.broadcast_object_list(listed, src=size - 1)
    assert listed == [{"from": size - 1}, "x"]
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_basic(size):
    run_c10d(size, body_basic)


def body_all():
    rank, size = begin()
    out = torch.empty(size * 2)
    dist.all_gather_into_tensor(out, torch.full((2,), float(rank)))
    assert out.tolist() == [float(r) for r in range(size) for _ in range(2)]
    out = torch.empty(2)
    dist.reduce_scatter_tensor(out, torch.arange(size * 2.0), op=dist.ReduceOp.MAX)
    assert out.tolist() == [2.0 * rank, 2.0 * rank + 1]
    out = torch.empty(size)
    dist.all_to_all_single(out, torch.arange(float(size)) + 10 * rank)
    assert out.tolist() == [10.0 * r + rank for r in range(size)]
    # Rank r sends i + 1 rows to rank i.
    out = torch.empty(size * (rank + 1), 2)
    sent = torch.cat([torch.full((i + 1, 2), float(rank)) for i in range(size)])
    dist.all_to_all_single(out, sent, [rank + 1] * size, [i + 1 for i in range(size)])
    assert out[:, 0].tolist() == [float(r) for r in range(size) for _ in range(rank + 1)]
    out = [torch.empty(2) for _ in range(size)]
    dist.all_to_all(out, [torch.full((2,), 10.0 * rank + i) for i in range(size)])
    assert [one[0].item() for one in out] == [10.0 * r + rank for r in range(size)]
    for root in range(size):
        into = [torch.empty(2) for _ in range(size)] if rank == root else None
        dist.gather(torch.full((2,), float(rank)), into, dst=root)
        assert into is None or [one[0].item() for one in into] == list(range(size))
        mine = torch.empty(2)
        dist.scatter(mine, [torch.full((2,), float(i)) for i in range(size)] if rank == root else None, src=root)
        assert (mine == rank).all()
        x = torch.full((2,), float(rank + 1))
        dist.reduce(x, root)
        assert rank != root or (x == size * (size + 1) / 2).all()
    # Rows of different lengths.
    out = torch.empty(rank + 1)
    dist.reduce_scatter(out, [torch.full((i + 1,), float(i)) for i in range(size)])
    assert (out == rank * size).all()
    nxt, before = (rank + 1) % size, (rank - 1) % size
    got = torch.empty(3)
    for work in dist.batch_isend_irecv([
        dist.P2POp(dist.isend, torch.full((3,), float(rank)), nxt), dist.P2POp(dist.irecv, got, before)
    ]):  # fmt: skip
        work.wait()
    assert (got == before).all()
    tensors = [torch.ones(2), torch.ones(3)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    assert all((tensor == size).all() for tensor in tensors)
    gathered = [None] * size if rank == 0 else None
    dist.gather_object(rank, gathered)
    assert rank or gathered == list(range(size))
    scattered = [None]
    dist.scatter_object_list(scattered, [f"for {i}" for i in range(size)] if rank == 0 else None)
    assert scattered == [f"for {rank}"]
    dist.destroy_process_group()


def check_groups(rank, size):
    everyone = dist.new_group(list(range(size)))
    check_reductions(rank, size, everyone)
    for members in ([0], list(range(size - 1)), list(range(size))[::-1]):
        group = dist.new_group(members)
        if rank not in members:
            continue
        x = torch.full((2,), float(rank))
        dist.all_reduce(x, group=group)
        assert (x == sum(members)).all(), (members, x)
        out = [torch.empty(1) for _ in members]
        dist.all_gather(out, torch.tensor([float(rank)]), group=group)
        assert [one.item() for one in out] == [float(one) for one in sorted(members)]
        x = torch.full((2,), float(rank))
        dist.broadcast(x, members[0], group=group)
        assert (x == members[0]).all()
        dist.barrier(group=group)
    # Overlapping groups, in an order of their own on each rank.
    if size == 3:
        pairs = {pair: dist.new_group(list(pair)) for pair in ((0, 1), (1, 2), (0, 2))}
        works = []
        for pair in sorted(pairs, reverse=rank % 2 == 0):
            if rank in pair:
                x = torch.full((1000,), float(rank))
                works.append((pair, x, dist.all_reduce(x, group=pairs[pair], async_op=True)))
        for pair, x, work in works:
            work.wait()
            assert (x == sum(pair)).all()


def body_groups():
    rank, size = begin()
    check_groups(rank, size)
    dist.destroy_process_group()


@new_only
@pytest.mark.parametrize("size", [2, 3])
def test_all(size):
    run_c10d(size, body_all)


def test_groups():
    run_c10d(3, body_groups)


def body_uneven_future():
    rank, size = begin()
    whole = torch.cat([torch.full((i + 1,), i + 1.0) for i in range(size)])
    for inside in (False, True):
        parts = list(whole.clone().split([i + 1 for i in range(size)]))
        # The output may be a part of the input.
        out = parts[0][:1] if inside and rank == 0 else torch.zeros(rank + 1)
        dist.reduce_scatter(out, parts, async_op=True).get_future().wait()
        assert (out == (rank + 1) * size).all(), out
    dist.destroy_process_group()


def test_an_uneven_reduce_scatter_has_its_result_when_its_future_is_complete():
    run_c10d(3, body_uneven_future)


def body_nothing_to_send():
    rank, _ = begin()
    # Rank 0 has no rows, and gets one of rank 1's three.
    sent, received = ([0, 0], [0, 1]) if rank == 0 else ([1, 2], [0, 2])
    out = torch.zeros(sum(received), 4)
    dist.all_to_all_single(out, torch.ones(sum(sent), 4), received, sent)
    assert (out == 1).all()
    dist.destroy_process_group()


@new_only
def test_a_rank_may_have_no_rows_for_an_alltoall():
    run_c10d(2, body_nothing_to_send)


def check_xor(rank, size, dtype, group=None):
    xor = dist.ReduceOp.BXOR
    ranks = [torch.tensor([[r + 5, r * 3], [r, 0], [r + 1, 7]]).to(dtype)[:size] for r in range(size)]
    expected = ranks[0]
    for other in ranks[1:]:
        expected = (expected.to(torch.int64) ^ other.to(torch.int64)).to(dtype)
    x = ranks[rank].t().contiguous().t()
    dist.all_reduce(x, op=xor, group=group)
    assert torch.equal(x, expected), (dtype, x)
    out = torch.empty(2, dtype=dtype)
    place = dist.get_rank(group)
    dist.reduce_scatter(out, list(ranks[rank]), op=xor, group=group, async_op=True).get_future().wait()
    assert torch.equal(out, expected[place])
    parts = [ranks[rank][0], *(row[:1] for row in ranks[rank][1:])]
    out = torch.empty(1 if place else 2, dtype=dtype)
    dist.reduce_scatter(out, parts, op=xor, group=group)
    assert torch.equal(out, expected[place][: len(out)])
    if not OLD:
        x = ranks[rank].clone()
        dist.reduce(x, size - 1, op=xor, group=group)
        assert torch.equal(x, expected if rank == size - 1 else ranks[rank])


def body_xor():
    rank, size = begin()
    backwards = dist.new_group(list(range(size))[::-1])
    for name in ("uint8", "int32", "int64", "bool", "uint16", "uint64"):
        if hasattr(torch, name):
            check_xor(rank, size, getattr(torch, name))
            check_xor(rank, size, getattr(torch, name), backwards)
    text = catch(RuntimeError, lambda: dist.all_reduce(torch.ones(2), op=dist.ReduceOp.BXOR))
    assert "BXOR" in text and "float32" in text, text
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 3])
def test_xor(size):
    run_c10d(size, body_xor)


def body_any_source():
    rank, size = begin()
    for tag, group in enumerate([None, dist.new_group(list(range(size))[::-1])]):
        if rank == 0:
            others = []
            for length in (3, 300_000):
                for _ in range(size - 1):
                    x = torch.empty(length, dtype=torch.float64)
                    others.append(dist.recv(x, group=group, tag=2 * tag + (length > 3)))
                    assert (x == others[-1]).all(), (others, x[:3])
            assert sorted(others) == sorted(2 * list(range(1, size))), others
        else:
            for length in (3, 300_000):
                dist.send(torch.full((length,), float(rank), dtype=torch.float64), 0, group, 2 * tag + (length > 3))
        dist.barrier()
    # Two at once, waited for in the other order, and one whose bytes do not lie one behind the other.
    if rank == 0:
        xs = [torch.zeros(4), torch.zeros(4, 2)[:, 0], torch.zeros(4)]
        works = [dist.irecv(xs[0]), dist.irecv(xs[1]), dist.irecv(xs[2], 1)]
        assert not any(work.is_completed() for work in works) and works[0]._source_rank() == -1
        dist.barrier()
        for work in reversed(works):
            assert work.wait()
        assert [work._source_rank() for work in works] == [1, 1, 1]
        assert [float(x[3]) for x in xs] == [0, 1, 2], xs
        x = torch.zeros(5)
        work = dist.irecv(x)
        future = work.get_future()
        dist.barrier()
        assert future.wait()[0] is x and (x == 7).all() and work.source_rank() == size - 1
        texts = [catch(carole_timeout(), lambda: dist.irecv(x).wait(datetime.timedelta(seconds=0.5)))]
    else:
        dist.barrier()
        for i in range(3 if rank == 1 else 0):
            dist.send(torch.full((4,), float(i)), 0)
        dist.barrier()
        if rank == size - 1:
            dist.send(torch.full((5,), 7.0), 0)
        texts = []
    dist.barrier()
    dist.destroy_process_group()
    return texts


def test_a_receive_from_any_rank():
    (text,) = run_c10d(3, body_any_source)[0]
    assert "receive from any rank was not finished after 0.5 s" in text, text


def body_any_source_alone():
    begin()
    text = catch(RuntimeError, lambda: dist.recv(torch.ones(1)))
    dist.destroy_process_group()
    return text


def test_a_receive_from_any_rank_of_one():
    assert "another member" in run_c10d(1, body_any_source_alone)[0]


def body_torchrun():
    import carole.torch_backend  # noqa: F401

    for _ in range(2):
        dist.init_process_group("carole")
        x = torch.ones(2)
        dist.all_reduce(x)
        assert (x == 2).all()
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return "ok"


def as_torchrun():
    rank = os.environ.pop("CAROLE_RANK")
    size = os.environ.pop("CAROLE_SIZE")
    for name in ("CAROLE_LOCAL_RANK", "CAROLE_LOCAL_SIZE", "CAROLE_JOB"):
        del os.environ[name]
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
    return body_torchrun()


def as_two_hosts():
    rank = os.environ["CAROLE_RANK"]
    for name in ("CAROLE_RANK", "CAROLE_SIZE", "CAROLE_LOCAL_RANK", "CAROLE_LOCAL_SIZE", "CAROLE_JOB"):
        del os.environ[name]
    # Stands for two hosts: the ranks meet over TCP, with a secret from torch's store.
    os.environ.update(RANK=rank, WORLD_SIZE="2", CAROLE_HOST_ID=f"host{rank}")
    return body_torchrun()


@pytest.mark.parametrize("body", [as_torchrun, as_two_hosts])
def test_without_our_launcher(body):
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    assert run(2, body, init=False, env=env) == ["ok", "ok"]


def body_late():
    # Long enough for the barrier of a busy machine.
    rank, _ = begin(timeout_s=8)
    dist.barrier()
    if rank == 0:
        started = time.monotonic()
        text = catch(RuntimeError, lambda: dist.all_reduce(torch.ones(2)))
        assert time.monotonic() - started < 120
        return text
    time.sleep(20)
    return ""


def test_a_timeout_names_the_culprit():
    text = run_c10d(2, body_late)[0]
    assert "1" in text and "rank" in text, text


def body_silent():
    rank, _ = begin()
    group = dist.new_group([1, 2], timeout=datetime.timedelta(seconds=3))
    dist.barrier()
    texts = []
    if rank == 1:
        started = time.monotonic()
        work = dist.irecv(torch.ones(2), 2, group=group)
        texts.append(catch(carole_timeout(), lambda: work.wait(datetime.timedelta(seconds=1))))
        texts.append(catch(RuntimeError, work.wait))
        # Without the time that a collective gets to find who is missing.
        assert time.monotonic() - started < 9
    dist.barrier()
    return texts


def carole_timeout():
    import carole

    return carole.TimeoutError


def test_the_timeout_of_a_message_names_the_peer():
    one, whole = run_c10d(3, body_silent)[1]
    assert "receive from rank 2 was not finished after 1.0 s" in one, one
    assert "receive from rank 2 was not finished after 3.0 s" in whole, whole


def body_monitored():
    rank, size = begin()
    dist.monitored_barrier()
    if rank == 1:
        # Stays away from the second one; the others' errors come first.
        time.sleep(20)
        return ""
    return catch(RuntimeError, lambda: dist.monitored_barrier(timeout=datetime.timedelta(seconds=8)))


@new_only
def test_monitored_barrier():
    texts = run_c10d(3, body_monitored)
    assert "rank 1 did not come" in texts[0]


def body_disagree(what):
    rank, _ = begin(timeout_s=600)
    for _ in range(2):
        dist.all_reduce(torch.ones(100))
        dist.all_reduce(torch.ones(200))
    started = time.monotonic()
    if what == "known sizes":
        call = lambda: dist.all_reduce(torch.ones(200 if rank else 100))  # noqa: E731
    elif what == "sizes":
        call = lambda: dist.all_reduce(torch.ones(7 + rank))  # noqa: E731
    elif what == "types":
        call = lambda: dist.all_reduce(torch.ones(7, dtype=torch.float64 if rank else torch.float32))  # noqa: E731
    else:
        call = (lambda: dist.barrier()) if rank else (lambda: dist.broadcast(torch.ones(7), 0))
    text = catch(RuntimeError, call)
    assert time.monotonic() - started < 60
    return text


@pytest.mark.parametrize(
    "what, words",
    [
        ("known sizes", "rank 0 waits for allreduce of 100 elements of float32, rank 1 for allreduce of 200 elements"),
        ("sizes", "rank 0 waits for allreduce of 7 elements of float32, rank 1 for allreduce of 8 elements"),
        ("types", "rank 0 waits for allreduce of 7 elements of float32, rank 1 for allreduce of 7 elements of float64"),
        ("collectives", "rank 0 waits for broadcast of 7 elements of float32, rank 1 for barrier"),
    ],
)
def test_ranks_that_disagree_hear_of_it_long_before_the_timeout(what, words):
    texts = run_c10d(2, body_disagree, what)
    assert any(words in text for text in texts), texts
    assert all("ranks" in text and "disagree" in text for text in texts), texts


def body_complex():
    rank, size = begin()
    z = torch.complex(torch.full((3,), rank + 1.0), torch.ones(3))
    # dist.all_reduce refuses a lazy conjugate itself; what calls the group directly must not get wrong sums.
    group = dist.distributed_c10d._get_default_group()
    lazy = z.clone().conj()
    group.allreduce([lazy], dist.AllreduceOptions()).wait()
    assert torch.equal(
        lazy.resolve_conj(), torch.complex(torch.full((3,), size * (size + 1) / 2), torch.full((3,), -float(size)))
    )
    out = [torch.empty(3, dtype=z.dtype) for _ in range(size)]
    group.allgather([out], [z.conj()]).wait()
    assert [one[0].item() for one in out] == [complex(r + 1, -1) for r in range(size)]
    dist.destroy_process_group()


@new_only
def test_lazy_conjugates():
    run_c10d(2, body_complex)


def body_dies():
    rank, _ = begin()
    dist.barrier()
    if rank == 1:
        os._exit(3)
    return catch(RuntimeError, lambda: [dist.all_reduce(torch.ones(10)) for _ in range(100)])


def test_a_death_names_the_culprit():
    text = run_c10d(2, body_dies, may_die=(1,))[0]
    assert "1" in text, text

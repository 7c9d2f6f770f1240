"""Process sets: given to init, added and removed while the job runs, and what is wrong with them."""

import os

import numpy as np
import pytest

import carole
from harness import catch, run


def body_static():
    first, last, pair = carole.ProcessSet([0]), carole.ProcessSet([2, 1]), [0, 2]
    carole.init(process_sets=[first, last, pair])
    me = carole.rank()
    assert carole.global_process_set.ranks == [0, 1, 2] and carole.global_process_set.process_set_id == 0
    assert len({0, first.process_set_id, last.process_set_id}) == 3
    assert last.ranks == [1, 2] and last.size() == 2
    if last.included():
        assert last.rank() == me - 1
        total = carole.allreduce(np.full(3, me), carole.Sum, process_set=last, name="same name as below")
        assert total.tolist() == [3] * 3
        # `root` is a rank of the whole job.
        assert carole.broadcast(np.array([me]), root=2, process_set=last).tolist() == [2]
        assert carole.allgather(np.array([me]), process_set=last.process_set_id).tolist() == [1, 2]
        carole.barrier(process_set=last)
        assert carole.join(process_set=last) in (1, 2)
    else:
        text = catch(carole.UsageError, lambda: carole.allreduce(np.ones(2), process_set=last))
        assert "not a member" in text and "rank 0" in text, text
        assert last.rank() is None and last.included() is False
    assert carole.allreduce(np.full(3, me), carole.Sum, name="same name as below").tolist() == [3] * 3
    assert carole.remove_process_set(last) is True
    assert last.process_set_id is None
    catch(carole.UsageError, lambda: carole.allreduce(np.ones(2), process_set=last))
    # Sets end with the job.
    identifier = first.process_set_id
    carole.shutdown()
    assert first.process_set_id is None and first.included() is None and first.size() is None
    carole.init()
    catch(carole.UsageError, lambda: carole.allreduce(np.ones(2), process_set=identifier))
    carole.barrier()
    carole.shutdown()


def test_sets_given_to_init():
    run(3, body_static, init=False)


def body_dynamic():
    me = carole.rank()
    for _ in range(3):
        for ranks in ([0, 1], [1, 2], [0, 2], [1]):
            added = carole.add_process_set(ranks)
            assert added.ranks == sorted(ranks) and added.included() == (me in ranks)
            if added.included():
                total = carole.allreduce(np.full(2, me + 1.0), carole.Sum, process_set=added, name="x")
                assert (total == sum(rank + 1 for rank in ranks)).all()
            # Made by everybody, so nobody is ahead by a set.
            assert carole.remove_process_set(added)
            assert not carole.remove_process_set(added), "a second time there is nothing to remove"
    # Three that overlap in a circle, all in flight at once.
    sets = [carole.add_process_set(ranks) for ranks in ([0, 1], [1, 2], [2, 0])]
    for step in range(20):
        handles = [
            (one, carole.allreduce_async(np.full(50_000, me + 1.0), carole.Sum, process_set=one, name=f"c{step}"))
            for one in sets[me:] + sets[:me] if one.included()
        ]  # fmt: skip
        for one, handle in handles:
            assert (handle.wait(30) == sum(rank + 1 for rank in one.ranks)).all()
    carole.barrier()


def test_sets_added_and_removed():
    run(3, body_dynamic)


def body_wrong():
    me, size = carole.rank(), carole.size()
    known = carole.add_process_set([0, 1])
    for ranks, word in [
        ([0, size], f"rank {size} is not in this job"), ([], "at least one rank"), ([1, 0], "exists already"),
        (list(range(size)), "exists already"),
    ]:  # fmt: skip
        text = catch(carole.UsageError, lambda: carole.add_process_set(ranks))
        assert word in text, text
    assert "already" in catch(carole.UsageError, lambda: carole.add_process_set(known))
    for wrong in ("evens", -1, 1.5):
        assert "ProcessSet" in catch(carole.UsageError, lambda: carole.barrier(process_set=wrong))
    assert "4711" in catch(carole.UsageError, lambda: carole.barrier(process_set=4711))
    text = catch(carole.UsageError, lambda: carole.allreduce(np.ones(2), process_set=carole.ProcessSet([0])))
    assert "add_process_set" in text, text
    assert carole.remove_process_set(carole.global_process_set) is False
    # A root that is no member: its members hear of it.
    if known.included():
        text = catch(carole.Error, lambda: carole.broadcast(np.ones(2), root=size - 1, process_set=known, name="r"))
        assert f"{size - 1}" in text and "process set" in text, text
        text = catch(carole.UsageError, lambda: carole.send(np.ones(2), size - 1, process_set=known))
        assert "member" in text, text
    for wrong in ([-1, 0], [2**40], "ab", 3, [0.5]):
        assert "rank" in catch(carole.UsageError, lambda: carole.add_process_set(wrong))
    assert (carole.allreduce(np.ones(2), carole.Sum) == size).all()


def test_sets_that_are_wrong():
    run(3, body_wrong)


def body_different():
    """Sets are known by their ranks: it does not matter in which order a rank asks for them, or gives them up."""
    me = carole.rank()
    for _ in range(3):
        lists = [[0, 1], [0, 2]] if me < 2 else [[0, 2], [0, 1]]
        made = {tuple(ranks): carole.add_process_set(ranks) for ranks in lists}
        first, second = made[0, 1], made[0, 2]
        numbers = carole.allgather(np.array([[first.process_set_id, second.process_set_id]]))
        assert (numbers == numbers[0]).all() and numbers[0][0] != numbers[0][1], numbers
        for one in (first, second):
            if one.included():
                assert carole.allreduce(np.ones(2), carole.Sum, process_set=one).tolist() == [2, 2]
        assert all(carole.remove_process_set(made[tuple(ranks)]) for ranks in reversed(lists))
    first, second = carole.add_process_set([0, 1]), carole.add_process_set([0, 2])
    # What one rank may not ask for is told to the others, who do not wait.
    if me == 0:
        text = catch(carole.UsageError, lambda: carole.add_process_set([0, 1]))
    else:
        text = catch(carole.MismatchError, lambda: carole.add_process_set([1, 2]))
        assert "rank 0 refused it" in text, text
    assert "exists already" in text, text
    # Nothing has changed meanwhile.
    assert first.ranks == [0, 1] and second.ranks == [0, 2]
    assert carole.remove_process_set(second) and carole.remove_process_set(first)
    last = carole.add_process_set([1, 2])
    if last.included():
        assert carole.allreduce(np.ones(2), carole.Sum, process_set=last).tolist() == [2, 2]


def test_different_orders_on_different_ranks():
    run(3, body_different)


def body_different_from_init():
    sets = [[0], [1]] if os.environ["CAROLE_RANK"] == "0" else [[0], [0, 1]]
    text = catch(carole.MismatchError, lambda: carole.init(process_sets=sets))
    assert "rank 1 (1 in all)" in text and "ranks 0, 1 (2 in all)" in text, text
    assert not carole.is_initialized()
    carole.init(process_sets=[[0]])
    carole.barrier()


def test_different_lists_given_to_init():
    run(3, body_different_from_init, init=False)


def body_uneven():
    """Ranks that join early count fewer unnamed operations and changes of sets than the others."""
    me, size = carole.rank(), carole.size()
    for epoch in range(3):
        for step in range(5 + 3 * ((me + epoch) % size)):
            carole.allreduce(np.ones(2), carole.Sum)
        carole.join()
        assert carole.allreduce(np.ones(2), carole.Sum).tolist() == [size] * 2
        one = carole.add_process_set([0, 1])
        if one.included():
            for step in range(2 + me):
                carole.allreduce(np.ones(2), carole.Sum, process_set=one)
            carole.join(process_set=one)
            assert carole.allgather(np.array([me]), process_set=one).tolist() == [0, 1]
            assert carole.allreduce(np.ones(2), carole.Sum, process_set=one).tolist() == [2, 2]
        assert carole.remove_process_set(one)


def test_unnamed_operations_after_an_uneven_epoch():
    run(3, body_uneven)


def test_before_init():
    with pytest.raises(carole.UsageError, match="init"):
        carole.add_process_set([0])
    one = carole.ProcessSet([0])
    assert one.included() is None and one.rank() is None and one.size() is None
    assert carole.global_process_set.ranks is None
    assert carole.remove_process_set(one) is False
    assert carole.ProcessSet([1, 0, 1]) == carole.ProcessSet([0, 1]) != carole.ProcessSet([0])
    assert "ranks=[0]" in repr(one)

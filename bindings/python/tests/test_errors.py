"""What bad input gets, on the rank that gave it and on the others; and what else can go wrong."""

import gc
import os
import re
import resource
import signal
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import carole
from harness import catch, run


def test_before_init():
    for call in (carole.rank, carole.size, lambda: carole.allreduce(np.ones(2)), carole.barrier):
        text = catch(carole.UsageError, call)
        assert "init" in text, text


def test_classes():
    assert issubclass(carole.UsageError, ValueError) and issubclass(carole.UsageError, carole.Error)
    assert issubclass(carole.TimeoutError, TimeoutError) and issubclass(carole.TimeoutError, carole.Error)
    assert issubclass(carole.Error, RuntimeError)
    for one in (carole.MismatchError, carole.BrokenError, carole.ShutdownError):
        assert issubclass(one, carole.Error) and not issubclass(one, ValueError)


def body_after_shutdown():
    carole.shutdown()
    assert not carole.is_initialized()
    text = catch(carole.Error, lambda: carole.allreduce(np.ones(2)))
    assert "init" in text, text
    catch(carole.Error, carole.rank)
    carole.init()
    return int(carole.allreduce(np.ones(1), carole.Sum)[0])


def test_after_shutdown_and_again():
    assert run(2, body_after_shutdown) == [2, 2]


def body_refused(which):
    """Rank 1 gives something that cannot be accepted; rank 0 is told why; both go on."""
    read_only = np.ones(4)
    read_only.flags.writeable = False
    calls = {
        "read-only": (lambda: carole.allreduce_(read_only, name="t"), lambda: carole.allreduce_(np.ones(4), name="t")),
        "contiguous": (
            lambda: carole.allreduce(np.ones((4, 4))[:, 1], name="t"), lambda: carole.allreduce(np.ones(4), name="t"),
        ),
        "root": (
            lambda: carole.broadcast(np.ones(4), root=77, name="t"), lambda: carole.broadcast(np.ones(4), name="t"),
        ),
        "split": (
            lambda: carole.alltoall(np.ones(4), [-1, 5], name="t"), lambda: carole.alltoall(np.ones(4), name="t"),
        ),
        "splits": (
            lambda: carole.alltoall(np.ones(4), [3, 3], name="t"), lambda: carole.alltoall(np.ones(4), name="t"),
        ),
        "counterpart": (
            lambda: carole.allreduce(np.array(["a"]), name="t"), lambda: carole.allreduce(np.ones(4), name="t"),
        ),
    }  # fmt: skip
    wrong, right = calls[which]
    if carole.rank() == 1:
        text = catch(carole.UsageError, wrong)
    else:
        text = catch(carole.MismatchError, right)
        assert "rank 1" in text, text
    assert which in text, text
    # The name is free again at once, also on a rank whose refusal the others have not heard of yet.
    assert (carole.allreduce(np.ones(2), carole.Sum, name="t") == carole.size()).all()
    assert (carole.allreduce(np.ones(2), carole.Sum, name="after") == carole.size()).all()
    return text


@pytest.mark.parametrize("which", ["read-only", "contiguous", "root", "split", "splits", "counterpart"])
def test_refused_calls_are_told_to_the_others(which):
    run(2, body_refused, which)


def body_mismatch(which):
    me = carole.rank()
    x = np.ones(4, np.float32)
    calls = {
        "dtype": lambda: carole.allreduce(x if me else x.astype(np.float64), name="t"),
        "shape": lambda: carole.allreduce(np.ones(4 + me), name="t"),
        "op": lambda: carole.allreduce(x, carole.Sum if me else carole.Max, name="t"),
        "scale": lambda: carole.allreduce(x, carole.Sum, prescale_factor=1.0 + me, name="t"),
        "root": lambda: carole.broadcast(x, root=me % 2, name="t"),
        "collective": lambda: carole.allreduce(x, name="t") if me else carole.allgather(x, name="t"),
        "rows": lambda: carole.allgather(np.ones((2, 3 + me)), name="t"),
        "group": lambda: carole.grouped_allreduce([x] * (1 + me), name="t"),
        "postscale": lambda: carole.allreduce(x, postscale_factor=1.0 + me, name="t"),
        "join_average": lambda: carole.allreduce(x, join_average="present" if me else "size", name="t"),
        "in a group": lambda: carole.grouped_allreduce([x, x if me else x.astype(np.int32)], name="t"),
        "dimensions": lambda: carole.allreduce(np.ones((4, 1) if me else 4), name="t"),
    }
    text = catch(carole.MismatchError, calls[which])
    assert (carole.allreduce(np.ones(2), carole.Sum, name="after") == carole.size()).all()
    return text


@pytest.mark.parametrize(
    "which, value_0, value_1",
    [
        ("dtype", "float64", "float32"), ("shape", "[4]", "[5]"), ("op", "max", "sum"), ("scale", "1.0", "2.0"),
        ("root", "rank 0", "rank 1"), ("collective", "allgather", "allreduce"), ("rows", "[*, 3]", "[*, 4]"),
        ("group", "1", "2"), ("postscale", "1.0", "2.0"), ("join_average", "Size", "Present"),
        ("in a group", "int32", "float32"), ("dimensions", "[4]", "[4, 1]"),
    ],
)  # fmt: skip
def test_a_mismatch_has_the_same_words_on_all_ranks(which, value_0, value_1):
    texts = run(3, body_mismatch, which)
    assert texts[0] == texts[1] == texts[2], texts
    said = re.search(r"'t' does not match: rank 0 submitted (.*), rank [12] submitted (.*); (.*)", texts[0])
    assert said, texts[0]
    assert value_0 in said[1] and value_1 in said[2] and len(said[3]) > 10, texts[0]


def body_group():
    """One member of a group is wrong on one rank: the others of the group fail with it, and are left alone."""
    me, size = carole.rank(), carole.size()
    good, odd = np.full(4, me + 1.0), np.ones(3 + (me == 2))
    mine = [good.copy(), odd, good.copy()]
    before = [one.copy() for one in mine]
    text = catch(carole.MismatchError, lambda: carole.grouped_allreduce(mine, carole.Sum, name="unit"))
    assert all((one == was).all() for one, was in zip(mine, before))
    # Refused where it was submitted: the other ranks get the reason for the whole group.
    refused = np.asfortranarray(np.ones((2, 2)))
    wrong = [good, refused if me == 1 else np.ones((2, 2))]
    kind = carole.UsageError if me == 1 else carole.MismatchError
    reason = catch(kind, lambda: carole.grouped_allreduce(wrong, carole.Sum, name="unit"))
    assert "contiguous" in reason and (me == 1 or "rank 1" in reason), reason
    # Once all have been told, the name is free again, and a group that is right works.
    carole.barrier()
    first, second = carole.grouped_allreduce([good, np.ones(3)], carole.Sum, name="unit")
    assert (first == size * (size + 1) / 2).all() and (second == size).all()
    return text


def test_a_group_fails_as_a_unit():
    texts = run(3, body_group)
    assert texts[0] == texts[1] == texts[2]
    assert "tensor 1 of the group" in texts[0] and "rank 2" in texts[0], texts[0]


def body_local():
    x = np.ones(4)
    assert "float64[3]" in catch(carole.UsageError, lambda: carole.allreduce(x, out=np.ones(3)))
    b = np.ones(8)
    assert "overlap" in catch(carole.UsageError, lambda: carole.allreduce(b[:4], out=b[2:6]))
    assert "Average" in catch(carole.UsageError, lambda: carole.allreduce(x, op=99))
    assert "join_average" in catch(carole.UsageError, lambda: carole.allreduce(x, join_average="maybe"))
    assert "prescale" in catch(carole.UsageError, lambda: carole.allreduce(x, prescale_factor="much"))
    assert "asarray" in catch(carole.UsageError, lambda: carole.allreduce([1.0]))
    assert "order" in catch(carole.UsageError, lambda: carole.allreduce(x.astype(">f8")))
    assert "at least one" in catch(carole.UsageError, lambda: carole.grouped_allreduce([]))
    catch(carole.UsageError, lambda: carole.allreduce(np.ones(2, bool), carole.Average))
    catch(carole.UsageError, lambda: carole.allreduce(np.ones(2, complex), carole.Min))
    catch(carole.UsageError, lambda: carole.allreduce(x, carole.BitAnd))
    catch(carole.UsageError, lambda: carole.allreduce(x, process_set=carole.ProcessSet([0])))
    catch(carole.Error, lambda: carole.allreduce(x, process_set=4711))
    handle = carole.allreduce_async(x, name="twice")
    handle.wait()
    assert "once" in catch(carole.UsageError, handle.wait)


def test_calls_that_can_never_work():
    run(1, body_local)


def body_duplicate():
    if carole.rank() == 0:
        first = carole.allreduce_async(np.ones(4), carole.Sum, name="same")
        text = catch(carole.UsageError, lambda: carole.allreduce(np.ones(4), carole.Sum, name="same"))
        assert "same" in text, text
        carole.send(np.zeros(1), 1)
    else:
        carole.recv(np.zeros(1), 0)
        first = carole.allreduce_async(np.ones(4), carole.Sum, name="same")
    assert (first.wait() == 2).all()


def test_a_name_twice_in_flight():
    run(2, body_duplicate)


def body_fork():
    carole.allreduce(np.ones(2))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = catch(carole.Error, lambda: carole.allreduce(np.ones(2)))
        except BaseException as error:  # noqa: B902 (the parent reports it)
            text = f"unexpected: {error!r}"
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reader, 4096).decode()
    assert "fork" in text, text
    assert (carole.allreduce(np.ones(2), carole.Sum) == carole.size()).all()


def test_a_forked_child_gets_a_clear_error():
    run(2, body_fork)


class Array(np.ndarray):
    """NumPy's own arrays cannot be referred to weakly."""


def body_keep_alive():
    me = carole.rank()
    x = np.ones(1000).view(Array)
    watch = weakref.ref(x)
    if me == 0:
        handle = carole.allreduce_async(x, name="x")
        del x
        gc.collect()
        assert watch() is not None, "the input lives while the operation is in flight"
        carole.send(np.zeros(1), 1)
    else:
        carole.recv(np.zeros(1), 0)
        handle = carole.allreduce_async(x, name="x")
        del x
    result = handle.wait()
    del handle
    gc.collect()
    assert watch() is None, "the input is let go by wait"
    # A dropped handle lets its operation finish, and lets go of the input at a later call.
    x = np.ones(1000).view(Array)
    watch = weakref.ref(x)
    carole.allreduce_async(x, name="dropped")
    del x
    finished = carole.barrier_async()
    finished.wait()
    deadline = time.monotonic() + 120
    while watch() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
        finished.poll()
    assert watch() is None, "a dropped handle's input is let go by a later call"
    # A result keeps the engine's memory alive, and a view of it does, too.
    view = result[10:20]
    del result
    gc.collect()
    carole.allreduce(np.zeros(1000))
    assert (view == 1).all()


def test_keep_alive():
    run(2, body_keep_alive)


def body_interrupt():
    if carole.rank() == 0:
        handle = carole.allreduce_async(np.ones(4), carole.Sum, name="late")
        started = time.monotonic()
        text = catch(carole.TimeoutError, lambda: handle.wait(0.2))
        assert "late" in text and time.monotonic() - started >= 0.2
        assert not handle.poll()

        # The signal may come as early as it likes.
        def interrupted():
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            handle.wait()

        catch(KeyboardInterrupt, interrupted)
        carole.send(np.zeros(1), 1)
    else:
        carole.recv(np.zeros(1), 0)
        handle = carole.allreduce_async(np.ones(4), carole.Sum, name="late")
    return handle.wait().tolist()


def test_ctrl_c_ends_a_wait_and_the_handle_stays_valid():
    assert run(2, body_interrupt) == [[2.0] * 4] * 2


def body_interrupt_of_a_synchronous_call():
    """What was interrupted goes on by itself: the others get their result while this rank does something else."""
    if carole.rank() == 0:
        main = threading.get_ident()

        def kill_when_it_waits():
            # Inside the package is inside the call, which has submitted some moments later.
            while not os.path.dirname(sys._current_frames()[main].f_code.co_filename).endswith("carole"):
                time.sleep(0.01)
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGINT)

        def interrupted():
            threading.Thread(target=kill_when_it_waits).start()
            carole.allreduce(np.ones(4), carole.Sum, name="late")

        catch(KeyboardInterrupt, interrupted)
        carole.send_async(np.zeros(1), 1)
        time.sleep(1.5)
    else:
        carole.recv(np.zeros(1), 0)
        assert (carole.allreduce_async(np.ones(4), carole.Sum, name="late").wait(120) == 2).all()
    carole.barrier()


def test_an_interrupted_call_goes_on():
    run(2, body_interrupt_of_a_synchronous_call)


def body_other_threads():
    """Python goes on while a wait is on."""
    if carole.rank() == 0:
        turns = 0
        done = threading.Event()

        def wait():
            carole.allreduce(np.ones(4), carole.Sum, name="late")
            done.set()

        thread = threading.Thread(target=wait)
        thread.start()
        while turns < 1000 and not done.is_set():
            turns += 1
        carole.send(np.zeros(1), 1)
        thread.join()
        return turns
    carole.recv(np.zeros(1), 0)
    carole.allreduce(np.ones(4), carole.Sum, name="late")
    return 1000


def test_a_wait_leaves_the_interpreter_to_others():
    assert run(2, body_other_threads) == [1000, 1000]


def body_killed():
    started = time.monotonic()
    try:
        # Done at rank 1 is not yet done elsewhere, so that its death may be what the barrier of another ends with.
        carole.barrier()
        if carole.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(1000):
            carole.allreduce(np.ones(1000), name="x")
    except carole.BrokenError as error:
        return error.culprit, str(error), time.monotonic() - started
    raise AssertionError("no error")


def test_a_killed_rank_breaks_the_group_everywhere():
    first, none, third = run(3, body_killed, may_die=[1])
    assert none is None
    assert first[0] == third[0] == 1
    assert first[1] == third[1] and "rank 1" in first[1]


def body_shutdown_of_one():
    carole.barrier()
    if carole.rank() == 1:
        carole.shutdown()
        return None
    return catch(carole.ShutdownError, lambda: carole.allreduce(np.ones(3), name="x"))


def test_an_operation_that_needs_a_rank_that_left():
    texts = run(2, body_shutdown_of_one)
    assert "rank 1" in texts[0]


def body_little_memory(transport):
    """No file of this process may grow beyond a limit that a link's shared memory exceeds."""
    # Python ignores the signal that goes with it, so the limit is an error of the system.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    # The first links are made as soon as the job has started, so the limit comes before.
    carole.init()
    if transport == "shm":
        text = catch(carole.BrokenError, lambda: carole.allreduce(np.ones(4), name="t"))
        assert "shared memory exhausted" in text and "CAROLE_TRANSPORT" in text, text
    else:
        assert (carole.allreduce(np.ones(4), carole.Sum, name="t") == carole.size()).all()


@pytest.mark.parametrize("transport", ["shm", "auto"])
def test_shared_memory_exhausted(transport):
    run(2, body_little_memory, transport, env={"CAROLE_TRANSPORT": transport}, init=False)


def body_small_budget(transport):
    if transport == "shm":
        text = catch(carole.BrokenError, lambda: carole.allreduce(np.ones(4), name="t"))
        assert "shared memory exhausted" in text and "raise CAROLE_MEMORY" in text, text
    else:
        assert (carole.allreduce(np.ones(4), carole.Sum, name="t") == carole.size()).all()
        assert not _mapped_links()


def _mapped_links():
    with open("/proc/self/maps") as file:
        return [line for line in file if "carole-link" in line]


@pytest.mark.parametrize("transport", ["shm", "auto"])
def test_the_budget_of_shared_memory(transport):
    # A link takes more than that.
    run(2, body_small_budget, transport, env={"CAROLE_TRANSPORT": transport, "CAROLE_MEMORY": "1M"})


def body_forked_mappings():
    carole.barrier()
    carole.allreduce(np.ones(4))
    assert _mapped_links()
    child = os.fork()
    if child == 0:
        os._exit(3 if _mapped_links() else 0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    carole.barrier()


def test_forked_children_do_not_inherit_shared_memory():
    run(2, body_forked_mappings, env={"CAROLE_TRANSPORT": "shm"})

"""Beginning, end, and the death of a rank."""

import atexit
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest

import carole
from harness import catch, environment, run

ALONE = {name: value for name, value in os.environ.items() if not name.startswith(("CAROLE_", "HOROVOD_"))}


def body_ten_times():
    bits = []
    for turn in range(10):
        assert not carole.is_initialized()
        carole.init()
        carole.init()
        assert carole.is_initialized() and carole.size() == 3
        bits.append(carole.allreduce(np.full(1000, carole.rank() + turn * 1.0), carole.Sum).tobytes())
        assert (np.frombuffer(bits[-1]) == 3 + 3 * turn).all()
        carole.shutdown()
        carole.shutdown()
    assert "init()" in catch(carole.UsageError, carole.rank)
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def body_once():
    carole.init()
    carole.shutdown()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def test_init_and_shutdown_ten_times_leaves_nothing():
    once, often = run(3, body_once, init=False), run(3, body_ten_times, init=False)
    for (threads, files), (threads_after, files_after) in zip(once, often):
        assert threads_after <= threads and files_after <= files, (once, often)


def body_uninitialised():
    x = np.ones(2)
    calls = [
        carole.rank, carole.size, carole.local_rank, carole.local_size, carole.cross_rank, carole.cross_size,
        carole.is_homogeneous, carole.barrier, carole.join, lambda: carole.allreduce(x), lambda: carole.allreduce_(x),
        lambda: carole.grouped_allreduce([x]), lambda: carole.allgather(x), lambda: carole.broadcast(x, 0),
        lambda: carole.reducescatter(x), lambda: carole.alltoall(x), lambda: carole.reduce(x), lambda: carole.gather(x),
        lambda: carole.scatter(x), lambda: carole.send(x, 0), lambda: carole.recv(x, 0),
        lambda: carole.allreduce_async(x), lambda: carole.add_process_set([0]),
        # What is wrong with the call matters less than that there is no job.
        lambda: carole.allreduce([1.0]), lambda: carole.allreduce(x, op=99),
    ]  # fmt: skip
    return [catch(carole.UsageError, call) for call in calls]


def body_without_a_job():
    before = body_uninitialised()
    carole.init()
    handle = carole.allreduce_async(np.ones(2), name="early")
    handle.wait()
    left = carole.allreduce_async(np.ones(2), name="left")
    carole.shutdown()
    after = body_uninitialised()
    # It may have been over before the shutdown.
    try:
        assert left.wait().tolist() == [1, 1]
    except carole.Error:
        pass
    assert all("init()" in text for text in before + after), (before, after)


def test_calls_before_init_and_after_shutdown():
    run(2, body_without_a_job, init=False)


def body_forked():
    x = np.ones(3)
    carole.allreduce(x)
    handle = carole.allreduce_async(x, carole.Sum, name="parents")
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            texts = [catch(carole.UsageError, call) for call in (
                lambda: carole.allreduce(x), carole.barrier, carole.rank, lambda: carole.send(x, 0), carole.init,
                handle.wait,
            )]  # fmt: skip
            wrong = [text for text in texts if "fork" not in text]
            words = f"not clear: {wrong}" if wrong else "good"
            carole.shutdown()
        except BaseException as error:  # noqa: B902 (the parent reports it)
            words = f"unexpected: {error!r}"
        os.write(writer, words.encode())
        # The hooks that Python's own exit would run are run in the child, too.
        atexit._run_exitfuncs()
        os._exit(0)
    _, status = os.wait()
    words = os.read(reader, 4096).decode()
    assert words == "good" and status == 0, (words, status)
    assert (handle.wait() == carole.size()).all()
    assert (carole.allreduce(x, carole.Sum) == carole.size()).all()


def test_a_forked_child_is_told_and_harms_nobody():
    run(2, body_forked)


def body_timeouts():
    me = carole.rank()
    if me == 1:
        carole.recv(np.zeros(1), 0, tag=1)
        return carole.allreduce(np.full(2, 5.0), carole.Sum, name="late").tolist()
    handle = carole.allreduce_async(np.full(2, 2.0), carole.Sum, name="late")
    texts = []
    for timeout in (0, 0.05, 0.15, 0.0):
        texts.append(catch(carole.TimeoutError, lambda: carole.wait(handle, timeout)))
        assert "'late'" in texts[-1] and "again" in texts[-1], texts
        assert not carole.poll(handle)
    assert any("rank 1 on late" in text for text in texts), texts
    carole.send(np.zeros(1), 1, tag=1)
    result = carole.synchronize(handle, timeout=30).tolist()
    assert "once" in catch(carole.UsageError, handle.wait)
    return result


def test_a_wait_that_timed_out_can_be_repeated():
    assert run(2, body_timeouts) == [[7.0, 7.0]] * 2


def alone(script, **variables):
    return subprocess.run(
        [sys.executable, "-c", script], env={**ALONE, **variables}, capture_output=True, text=True, timeout=60
    )


def test_an_unknown_variable_names_the_nearest():
    script = "import carole; carole.init(); carole.shutdown(); carole.init()"
    result = alone(script, CAROLE_ALGORYTHM="ring")
    assert result.returncode == 0
    assert result.stderr.count("CAROLE_ALGORYTHM") == 1, result.stderr
    assert "did you mean CAROLE_ALGORITHM?" in result.stderr
    result = alone(script, CAROLE_ALGORYTHM="ring", CAROLE_STRICT_ENV="1")
    assert result.returncode == 1 and "UsageError" in result.stderr and "CAROLE_ALGORITHM" in result.stderr


def test_wrong_values_of_variables():
    script = "import carole; carole.init()"
    result = alone(script, CAROLE_ALGORITHM="rnig")
    assert result.returncode == 1 and "UsageError" in result.stderr and "ring" in result.stderr, result.stderr
    result = alone(script, CAROLE_RANK="0")
    assert result.returncode == 1 and "CAROLE_SIZE" in result.stderr, result.stderr
    result = alone(script, CAROLE_RANK="2", CAROLE_SIZE="2")
    assert result.returncode == 1 and "2" in result.stderr, result.stderr
    with pytest.raises(carole.UsageError, match="(?i)algorithm"):
        carole.init(algorythm="ring")


def body_killed(how, many):
    """Rank 1 dies while operations of all are in flight."""
    me = carole.rank()
    carole.barrier()
    if me == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), how)).start()
    started = time.monotonic()
    while True:
        handles = [carole.allreduce_async(np.ones(100_000), name=f"x{i}") for i in range(many)]
        errors = []
        for handle in handles:
            try:
                handle.wait(120)
            except carole.BrokenError as error:
                errors.append(error)
        if errors:
            break
        assert time.monotonic() - started < 120, "the death of rank 1 was not noticed"
    assert len({str(error) for error in errors}) == 1
    again = catch(carole.BrokenError, lambda: carole.allreduce(np.ones(2)))
    assert again == str(errors[0])
    carole.shutdown()
    return errors[0].culprit, errors[0].epoch, str(errors[0])


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_killed_in_the_middle(how, transport):
    results = run(4, body_killed, how, 8, may_die=[1], env={"CAROLE_TRANSPORT": transport})
    assert results.pop(1) is None
    assert len(set(results)) == 1, results
    culprit, _, text = results[0]
    assert culprit == 1 and re.search(r"\brank 1\b", text), results


def body_stopped():
    me = carole.rank()
    victim = int(carole.allgather(np.array([os.getpid()]))[1])
    if me == 1:
        time.sleep(60)
    if me == 2:
        carole.send(np.ones(1), 0)
    if me == 0:
        # Rank 2 must have what it needs of rank 1 before that is stopped.
        carole.recv(np.ones(1), 2)
        os.kill(victim, signal.SIGSTOP)
    started = time.monotonic()
    try:
        text = catch(carole.BrokenError, lambda: carole.allreduce(np.ones(10)))
        elapsed = time.monotonic() - started
        # The other survivor has the same words before the stopped one is ended for good.
        time.sleep(5.0)
    finally:
        if me == 0:
            os.kill(victim, signal.SIGKILL)
    return text, elapsed


def test_a_stopped_rank_is_given_up():
    first, none, third = run(3, body_stopped, may_die=[1], env={"CAROLE_TIMEOUT_MS": "3000"})
    assert none is None and first[0] == third[0] and "rank 1" in first[0], (first, third)


SCRIPT = """
import sys, carole, numpy as np
carole.init()
carole.barrier()
if carole.rank() == 1:
    {0}
try:
    carole.allreduce(np.ones(3), name="x")
except carole.Error as error:
    print(type(error).__name__, error, flush=True)
    raise
"""


@pytest.mark.parametrize(
    "ending, kind, code",
    [("raise ZeroDivisionError('of rank 1')", "BrokenError", 1), ("sys.exit(0)", "ShutdownError", 0)],
)
def test_how_a_script_ends_is_told_to_the_others(ending, kind, code):
    """An exception that nobody caught is a death; an orderly end is a goodbye."""
    job = uuid.uuid4().hex
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(ending)], env=environment(rank, 3, job), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    outputs = [one.communicate(timeout=60) for one in ranks]
    assert [one.returncode for one in ranks] == [1, code, 1], outputs
    assert outputs[0][0] == outputs[2][0], outputs
    assert outputs[0][0].startswith(kind) and "rank 1" in outputs[0][0], outputs
    assert f"carole.{kind}: " in outputs[0][1]


def test_carolerun_names_the_rank_that_raised():
    for _ in range(5):
        launcher = pathlib.Path(sys.executable).with_name("carolerun")
        result = subprocess.run(
            [str(launcher), "-np", "3", sys.executable, "-c", SCRIPT.format("raise ValueError('a bad sample')")],
            env=ALONE, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 1
        assert "rank 1 failed first" in result.stderr and "a bad sample" in result.stderr, result.stderr


def body_dropped():
    """Results of handles that nobody keeps: the operations run to their end and the memory is given back."""
    me = carole.rank()
    for i in range(200):
        carole.allreduce_async(np.full(10_000, me + 1.0), carole.Sum, name=f"dropped{i % 7}.{i}")
    out = np.zeros(1000)
    carole.allreduce_async(np.full(1000, me + 1.0), carole.Sum, name="out", out=out)
    carole.grouped_allreduce_async([np.ones(3), np.ones(4)], name="group")
    carole.allgather_async(np.ones((me, 2)), name="rows")
    carole.barrier()
    total = carole.allreduce(np.full(3, me + 1.0), carole.Sum, name="kept")
    carole.barrier()
    deadline = time.monotonic() + 120
    while (out != 3).any() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (out == 3).all() and (total == 3).all()


def test_dropped_handles():
    run(2, body_dropped)

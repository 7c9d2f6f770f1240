"""Elastic jobs of real processes under carolerun: killed, stopped, added, let go."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).parent / "elastic_program.py")
# Only a hang comes here.
PATIENCE_S = 150


class Job:
    """A job in the background, and what its workers have written."""

    def __init__(self, folder, *arguments, program=(), env=None):
        self.folder = Path(folder)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CAROLE_", "HOROVOD_"))}
        clean.update(CAROLE_TIMEOUT_MS="20000", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        clean.update(env or {})
        launch = "import sys; from carole._scripts import carolerun; sys.exit(carolerun())"
        command = [sys.executable, "-c", launch, *arguments, sys.executable, PROGRAM, str(folder), *program]
        self.output = open(self.folder / "output", "w+")
        self.process = subprocess.Popen(
            command, env=clean, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def text(self):
        return (self.folder / "output").read_text(errors="replace")

    def notes(self):
        """What each worker has written, by process number."""
        found = {}
        for file in self.folder.glob("log.*"):
            lines = file.read_text().splitlines(keepends=True)
            found[int(file.suffix[1:])] = [json.loads(line) for line in lines if line.endswith("\n")]
        return {pid: notes for pid, notes in found.items() if notes}

    def until(self, what, holds):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            result = holds()
            if result:
                return result
            assert self.process.poll() is None, f"the job has ended before {what}:\n{self.text()}"
            time.sleep(0.02)
        raise AssertionError(f"waited in vain until {what}; {self.notes()}\n{self.text()}")

    def trains_with(self, size, epoch=0, steps=10):
        """Waits until `size` workers have done some steps together in one epoch; their numbers by rank."""

        def together():
            ranks = {}
            for pid, notes in self.notes().items():
                last = notes[-1]
                done = [n for n in notes if n["epoch"] == last["epoch"] and "step" in n]
                if last["size"] == size and last["epoch"] >= epoch and len(done) * 5 >= steps and alive(pid):
                    ranks[last["rank"]] = pid
            return ranks if sorted(ranks) == list(range(size)) else None

        return self.until(f"{size} workers train", together)

    def end(self):
        (self.folder / "end").write_text("")
        return self.wait()

    def wait(self):
        code = self.process.wait(PATIENCE_S)
        assert not [pid for pid in self.notes() if alive(pid)], "a worker is left behind"
        return code


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def last_step(notes):
    return max([n["step"] for n in notes if "step" in n], default=0)


ONE_HOST = ("--min-np", "1", "--blacklist-cooldown-range", "600", "600")


ENCRYPTED = ("--encrypt", "--transport", "tcp")


@pytest.mark.parametrize("victims, flags", [((2,), ()), ((0,), ()), ((1, 3), ()), ((0,), ENCRYPTED)])
def test_survivors_train_on(tmp_path, victims, flags):
    with Job(tmp_path, "-np", "4", "--max-np", "4", *ONE_HOST, *flags) as job:
        before = job.trains_with(4)
        for victim in victims:
            os.kill(before[victim], signal.SIGKILL)
        struck = time.time()
        left = 4 - len(victims)
        after = job.trains_with(left, epoch=1)
        survivors = [pid for rank, pid in sorted(before.items()) if rank not in victims]
        assert [after[rank] for rank in range(left)] == survivors, "they keep their order, and nobody is restarted"
        assert set(job.notes()) == set(before.values())
        for pid in survivors:
            notes = job.notes()[pid]
            # Every step was committed, so at most the one in flight is lost.
            again = [n for n in notes if "begins" in n][-1]
            reached = last_step([n for n in notes if n["epoch"] == 0])
            assert reached - 1 <= again["begins"], notes
            assert any("reset" in n for n in notes)
            print(f"trains on {again['time'] - struck:.3f} s after the kill, with step {again['begins']}")
        assert job.end() == 0, job.text()
        ends = [notes[-1] for pid, notes in job.notes().items() if pid in survivors]
        assert len({end["ended"] for end in ends}) == 1 and all(end["sizes"] == end["ended"] for end in ends)
        assert "was killed by SIGKILL" in job.text()


def test_workers_come_and_go_with_their_hosts(tmp_path):
    hosts, script = tmp_path / "hosts", tmp_path / "discover"
    hosts.write_text("localhost:2\n")
    script.write_text(f"#!/bin/sh\ncat {hosts}\n")
    script.chmod(0o755)
    with Job(tmp_path, "--min-np", "2", "--max-np", "3", "--host-discovery-script", str(script)) as job:
        first = job.trains_with(2)
        hosts.write_text("localhost:4\n")
        asked = time.time()
        more = job.trains_with(3, epoch=1)
        assert more[0] == first[0] and more[1] == first[1], "the new one comes last"
        newcomer = job.notes()[more[2]]
        print(f"the new one trains {newcomer[1]['time'] - newcomer[0]['started']:.3f} s after its program began")
        assert newcomer[1]["time"] > asked and newcomer[0]["epoch"] == 1
        others = [n for n in job.notes()[more[0]] if n["epoch"] == 1 and "begins" in n]
        assert newcomer[1]["begins"] == others[0]["begins"] > 0, "with the state of the others"
        # Its host goes: it leaves at a commit, and ends well.
        hosts.write_text("localhost:2\n")
        fewer = job.trains_with(2, epoch=2)
        assert fewer == first
        # Nobody lacks the state, so that nothing need be synchronized, and nothing is lost.
        begins = [n for n in job.notes()[first[0]] if "begins" in n]
        assert len(begins) == 3
        job.until("the one let go has ended", lambda: not alive(more[2]))
        assert job.end() == 0, job.text()
        assert "Traceback" not in job.text()


def test_one_that_is_stopped_is_left_behind_and_ended(tmp_path):
    with Job(tmp_path, "-np", "3", "--max-np", "3", *ONE_HOST, env={"CAROLE_TIMEOUT_MS": "6000"}) as job:
        before = job.trains_with(3)
        os.kill(before[1], signal.SIGSTOP)
        after = job.trains_with(2, epoch=1)
        assert after == {0: before[0], 1: before[2]}
        job.until("the launcher has ended it", lambda: not alive(before[1]))
        assert "have gone on without it" in job.text()
        assert job.end() == 0, job.text()


def test_one_that_resumes_finds_that_it_must_not_go_on(tmp_path):
    with Job(tmp_path, "-np", "3", "--max-np", "3", *ONE_HOST, env={"CAROLE_TIMEOUT_MS": "6000"}) as job:
        before = job.trains_with(3)
        os.kill(before[0], signal.SIGSTOP)
        assert job.trains_with(2, epoch=1) == {0: before[1], 1: before[2]}
        os.kill(before[0], signal.SIGCONT)
        job.until("it has ended by itself", lambda: not alive(before[0]))
        assert "is excluded: the others have gone on without it in epoch 1" in job.text()
        assert job.end() == 0, job.text()


def test_the_place_of_a_failed_worker_is_filled_after_a_pause(tmp_path):
    options = ("-np", "3", "--min-np", "2", "--max-np", "3", "--blacklist-cooldown-range", "1", "2")
    with Job(tmp_path, *options) as job:
        before = job.trains_with(3)
        os.kill(before[0], signal.SIGKILL)
        after = job.trains_with(3, epoch=1)
        assert after[0] == before[1] and after[1] == before[2] and after[2] not in before.values()
        step = last_step(job.notes()[after[0]])
        assert last_step(job.notes()[after[2]]) >= step - 5
        assert job.end() == 0, job.text()


def test_a_worker_that_fails_at_its_start_is_replaced(tmp_path):
    options = ("-np", "2", "--min-np", "2", "--max-np", "2", "--blacklist-cooldown-range", "1", "2")
    with Job(tmp_path, *options, program=("fails",)) as job:
        job.trains_with(2)
        assert "exited with code 3" in job.text()
        assert job.end() == 0, job.text()


def test_resets_are_limited(tmp_path):
    with Job(tmp_path, "-np", "4", "--max-np", "4", "--reset-limit", "1", *ONE_HOST) as job:
        before = job.trains_with(4)
        os.kill(before[3], signal.SIGKILL)
        job.trains_with(3, epoch=1)
        os.kill(before[2], signal.SIGKILL)
        assert job.wait() == 1, job.text()
        assert "--reset-limit" in job.text()


def test_too_few_are_too_few(tmp_path):
    options = ("-np", "2", "--min-np", "2", "--elastic-timeout", "2", "--blacklist-cooldown-range", "600", "600")
    with Job(tmp_path, *options) as job:
        before = job.trains_with(2)
        os.kill(before[1], signal.SIGKILL)
        assert job.wait() != 0
        assert "at least 2" in job.text()


def test_torch_trains_on(tmp_path):
    pytest.importorskip("torch")
    with Job(tmp_path, "-np", "3", "--max-np", "3", *ONE_HOST, program=("torch",)) as job:
        before = job.trains_with(3)
        os.kill(before[0], signal.SIGKILL)
        after = job.trains_with(2, epoch=1, steps=200)
        assert after == {0: before[1], 1: before[2]}
        assert job.end() == 0, job.text()
        notes = job.notes()[after[0]]
        losses = [n["loss"] for n in notes if "loss" in n]
        assert losses[-1] < losses[0] / 10
        assert all(end["ended"] >= 200 for end in (job.notes()[pid][-1] for pid in after.values()))


def test_a_failing_program_fails_the_job(tmp_path):
    launch = "import sys; from carole._scripts import carolerun; sys.exit(carolerun())"
    for command, code, words in (
        ([sys.executable, "-c", "import sys; sys.exit(7)"], 7, "all workers have failed"),
        (["/nonexistent/program"], 127, "cannot be started"),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", launch, "--min-np", "2", "--max-np", "2", *command], capture_output=True, text=True,
            timeout=PATIENCE_S,
        )  # fmt: skip
        assert ran.returncode == code and words in ran.stderr, ran.stderr

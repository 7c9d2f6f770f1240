"""Starts the ranks of one library, orders them about, and notices when they are lost."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Optional

LINE_BYTES = 64
START_SECONDS = 120.0


class Lost(Exception):
    """The job has died or does not answer."""


@dataclass(frozen=True)
class Launch:
    """How the ranks of a library are started."""

    name: str  # as in tables
    library: str  # as in `libraries.join`
    transport: str  # "shm" or "tcp": which table it belongs to; "both" for Gloo, which has one only
    python: str
    # The launcher's words for so many ranks; none where each rank is started by itself.
    launcher: Optional[Callable[[int], List[str]]]
    environment: Dict[str, str] = field(default_factory=dict)
    # Its threads poll even with nothing to do, so it is stopped while the others are measured.
    polls_when_idle: bool = False
    limit: bool = False


class Job:
    def __init__(self, launch: Launch, ranks: int, pin: bool, nice: int, log: Path) -> None:
        self.launch = launch
        self.ranks = ranks
        self.version = ""
        self._folder = Path(tempfile.mkdtemp(prefix="peers-"))
        self._log = log
        self._channels: List[_Channel] = []
        self.pids: List[int] = []
        line = Path("/dev/shm") / self._folder.name
        line.write_bytes(bytes(ranks * LINE_BYTES))
        self._line = line
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self._folder / "s"))
        self._server.listen(ranks)
        self._processes = self._start(pin)
        if nice:
            for process in self._processes:
                be_nice(process.pid, nice)
        try:
            self._welcome(pin)
        except (Lost, OSError) as error:
            words = self.last_words()
            self.kill()
            raise Lost(f"{error}; {words}") from error
        except BaseException:
            self.kill()
            raise
        if nice:
            for pid in self.pids:
                be_nice(pid, nice)
        self._pause()

    def _start(self, pin: bool) -> List[subprocess.Popen]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PEERS_SOCKET": str(self._folder / "s"),
            "PEERS_LINE": str(self._line),
            **self.launch.environment,
        }
        if pin:
            environment["PEERS_PIN"] = "1"
        words = [self.launch.python, "-m", "peers.worker", self.launch.library]
        if self.launch.launcher is not None:
            starts = [([*self.launch.launcher(self.ranks), *words], {})]
        else:
            port = str(free_port(self.ranks))
            place = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            starts = [(words, {**place, "RANK": str(rank)}) for rank in range(self.ranks)]
        with open(self._log, "wb") as log:
            return [
                subprocess.Popen(
                    start, env={**environment, **more}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )
                for start, more in starts
            ]  # fmt: skip

    def _welcome(self, pin: bool) -> None:
        deadline = time.monotonic() + START_SECONDS
        processors = sorted(os.sched_getaffinity(0))
        arrived = []
        while len(arrived) < self.ranks:
            self._server.settimeout(0.2)
            try:
                channel = _Channel(self._server.accept()[0])
            except socket.timeout:
                if time.monotonic() > deadline or any(one.poll() is not None for one in self._processes):
                    raise Lost(f"only {len(arrived)} of {self.ranks} ranks started") from None
                continue
            if pin:
                channel.receive(deadline)
                channel.send({"processor": processors[len(arrived) % len(processors)]})
            arrived.append(channel)
        hellos = [(channel.receive(deadline), channel) for channel in arrived]
        hellos.sort(key=lambda pair: pair[0]["rank"])
        ranks = [(hello["rank"], hello["ranks"]) for hello, _ in hellos]
        if ranks != [(rank, self.ranks) for rank in range(self.ranks)]:
            raise Lost(f"the ranks are {ranks}: each is on its own?")
        self._channels = [channel for _, channel in hellos]
        self.pids = [hello["pid"] for hello, _ in hellos]
        self.version = hellos[0][0]["version"]

    def order(self, what: dict, timeout: float) -> List[dict]:
        """Orders all ranks the same and returns their answers, in rank order."""
        deadline = time.monotonic() + timeout
        self._resume()
        try:
            for channel in self._channels:
                channel.send(what)
            answers = [channel.receive(deadline) for channel in self._channels]
        except (Lost, OSError) as error:
            words = self.last_words()
            self.kill()
            raise Lost(f"{error}; {words}") from error
        self._pause()
        return answers

    def last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        # A launcher goes on talking after the rank that failed.
        lines = [line for line in lines if "Error" in line] or lines
        return f"its last words: {lines[-1][:200]} ({self._log.name})" if lines else "it said nothing"

    def _pause(self) -> None:
        if self.launch.polls_when_idle:
            for pid in self.pids:
                os.kill(pid, signal.SIGSTOP)

    def _resume(self) -> None:
        if self.launch.polls_when_idle:
            for pid in self.pids:
                os.kill(pid, signal.SIGCONT)

    def leave(self) -> None:
        """Ends the job in order; by force if it does not."""
        try:
            self._resume()
            for channel in self._channels:
                channel.send({"do": "leave"})
            for process in self._processes:
                process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            # A launcher that is told so ends its ranks, in whatever session it put them; the rest is ours.
            for sign, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
                try:
                    os.killpg(process.pid, sign)
                    process.wait(patience)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass
        for pid in self.pids:
            if _is_worker(pid):
                os.kill(pid, signal.SIGKILL)
        for channel in self._channels:
            channel.close()
        self._server.close()
        self._line.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


class _Channel:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)

    def send(self, what: dict) -> None:
        self._connection.sendall(json.dumps(what).encode() + b"\n")

    def receive(self, deadline: float) -> dict:
        while b"\n" not in self._rest:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise Lost("no answer in time")
            more = self._connection.recv(1 << 16)
            if not more:
                raise Lost("a rank has ended")
            self._rest += more
        text, self._rest = self._rest.split(b"\n", 1)
        return json.loads(text)

    def close(self) -> None:
        self._selector.close()
        self._connection.close()


def be_nice(pid: int, nice: int) -> None:
    """Gives a rank, with all its threads, its place among other programs."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
    # Where the kernel shares processors among sessions, niceness means nothing outside of one; this does.
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists():
        group.write_text(str(nice))


def free_port(count: int) -> int:
    """The first of so many ports in a row that nobody listens on now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        try:
            for server in [socket.create_server(("127.0.0.1", port + i)) for i in range(count)]:
                server.close()
            return port
        except (OSError, OverflowError):
            continue


def _is_worker(pid: int) -> bool:
    try:
        return b"peers.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def processor_seconds(pids: List[int]) -> float:
    """What these processes have used so far."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")

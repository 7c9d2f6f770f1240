"""One rank: `python -m peers.worker LIBRARY`. It holds the library and does what the runner orders, line by line."""

from __future__ import annotations

import gc
import json
import mmap
import os
import socket
import sys
from time import perf_counter_ns
from typing import Any, Callable, Dict, List

# The library joins the job in here; before that, the processor is chosen for all threads that it starts.
PIN = os.environ.get("PEERS_PIN")
LINE_BYTES = 64


class StartLine:
    """Where all ranks wait for one another: the same for all libraries, so that none is favoured by its barrier.

    A counter for each rank in shared memory, watched without sleeping.
    """

    def __init__(self, path: str, rank: int, ranks: int) -> None:
        with open(path, "r+b") as file:
            self._counters = memoryview(mmap.mmap(file.fileno(), ranks * LINE_BYTES)).cast("q")
        words = LINE_BYTES // 8
        self._mine = rank * words
        self._others = [other * words for other in range(ranks) if other != rank]
        self._turn = 0

    def wait(self) -> None:
        self._turn += 1
        counters, turn = self._counters, self._turn
        counters[self._mine] = turn
        for other in self._others:
            looks = 0
            while counters[other] < turn:
                looks += 1
                if looks > 200:
                    os.sched_yield()


class Rank:
    def __init__(self, library: Any, line: StartLine) -> None:
        self._library = library
        self._line = line
        self._work: Any = None
        self._inputs: List[Any] = []
        self._outputs: List[Any] = []
        self._ways: Dict[str, Callable] = {}

    def prepare(self, order: dict) -> dict:
        """Makes the tensors and says in which ways the work can be done."""
        from .libraries import Cannot
        from .workloads import Work

        self.free({})
        library = self._library
        work = Work(order["name"], order["kind"], tuple(order["counts"]), order["repeats"])
        share = work.counts[0] // library.ranks
        sizes_in = [share] if work.kind == "allgather" else work.counts
        self._inputs = [library.empty(count).zero_() for count in sizes_in]
        self._outputs = {
            "allgather": lambda: [library.empty(share * library.ranks).zero_()],
            "alltoall": lambda: [library.empty(share * library.ranks).zero_()],
            "reducescatter": lambda: [library.empty(share).zero_()],
        }.get(work.kind, lambda: self._inputs)()
        self._work = work
        try:
            self._ways = library.ways(work.kind, self._inputs, self._outputs)
        except Cannot as reason:
            return {"cannot": str(reason), "ways": []}
        return {"ways": list(self._ways)}

    def check(self, order: dict) -> dict:
        """Does the work once on known values and counts those that come out wrong."""
        from . import pattern
        from .libraries import Cannot

        rank, ranks = self._library.rank, self._library.ranks
        for tensor, stretch in zip(self._inputs, pattern.given(self._work, rank, ranks)):
            pattern.fill(tensor, stretch)
        self._line.wait()
        try:
            made = self._ways[order["way"]]()
        except Cannot as reason:
            return {"cannot": str(reason)}
        wrong = 0
        for tensor, stretches in zip(made or self._outputs, pattern.expected(self._work, rank, ranks)):
            wrong += sum(pattern.wrong(tensor, stretch) for stretch in stretches)
        # The timed calls add in place again and again; zeros stay zeros.
        for tensor in self._inputs:
            tensor.zero_()
        return {"wrong": wrong}

    def block(self, order: dict) -> dict:
        """Times some samples; each is so many calls back to back from the start line on."""
        call, repeats, wait = self._ways[order["way"]], order["repeats"], self._line.wait
        times = []
        for _ in range(order["warm"]):
            call()
        gc.collect()
        gc.disable()
        for _ in range(order["samples"]):
            wait()
            start = perf_counter_ns()
            for _ in range(repeats):
                call()
            times.append((perf_counter_ns() - start) // repeats)
        gc.enable()
        return {"times": times}

    def free(self, _: dict) -> dict:
        self._ways = {}
        self._inputs = self._outputs = []
        gc.collect()
        return {}


def main() -> None:
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(os.environ["PEERS_SOCKET"])
    lines = channel.makefile("rw", encoding="utf-8")

    def say(what: dict) -> None:
        lines.write(json.dumps(what) + "\n")
        lines.flush()

    if PIN is not None:
        # The place in the job is known only after joining it, so the order of arrival decides.
        say({"arrived": os.getpid()})
        os.sched_setaffinity(0, {json.loads(lines.readline())["processor"]})
    import torch

    from .libraries import join

    torch.set_num_threads(1)
    library = join(sys.argv[1])
    line = StartLine(os.environ["PEERS_LINE"], library.rank, library.ranks)
    say({"rank": library.rank, "ranks": library.ranks, "pid": os.getpid(), "version": library.version})
    # What was imported stays: looking through it takes longer than most blocks.
    gc.freeze()
    rank = Rank(library, line)
    for text in lines:
        order = json.loads(text)
        if order["do"] == "leave":
            library.leave()
            return
        say(getattr(rank, order["do"])(order))


if __name__ == "__main__":
    main()

"""Goes round the libraries, a short block each, several rounds for each piece of work.

Whatever else the machine does then hits all of them alike, and what changes over minutes does not favour one.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from .jobs import Job, Launch, Lost, processor_seconds
from .workloads import Work

# A library that is lost so often with a number of ranks is left out from then on.
LOST_MAX = 2
# Calls that take longer than this leave no trace of the one before in the caches, so a block needs no warm-up.
COLD_SECONDS = 0.02
# Ways of Carole's that do the work as one call, so that one call for each tensor is not to be held against them.
ASIDES = ("grouped", "planned")
# With less memory than this share of what is free, all libraries keep their tensors for all rounds.
KEEP_SHARE = 0.4


@dataclass(frozen=True)
class Plan:
    rounds: int
    block_seconds: float
    samples_least: int
    samples_most: int
    answer_seconds: float
    # In how many of the rounds carole-perf runs, which has to start its ranks each time.
    perf_rounds: int
    # A way that is at first so many times slower than the library's best is not gone again, unless it is the first that
    # the library names.
    hopeless: float
    # No new work is begun after so long.
    seconds: float
    pin: bool = False
    nice: int = 0


@dataclass
class Result:
    """What one library did with one piece of work in one way. Times in nanoseconds."""

    library: str
    version: str
    transport: str
    ranks: int
    work: str
    kind: str
    size: int
    way: str
    blocks: List[List[int]] = field(default_factory=list)
    wrong: Optional[int] = None
    note: str = ""

    def medians(self) -> List[float]:
        return [statistics.median(block) for block in self.blocks]

    def record(self) -> dict:
        every = sorted(time for block in self.blocks for time in block)
        found = {key: value for key, value in self.__dict__.items() if key != "blocks"}
        if every:
            medians = self.medians()
            found.update(
                median_ns=statistics.median(medians),
                least_block_ns=min(medians),
                most_block_ns=max(medians),
                p10_ns=every[len(every) // 10],
                p90_ns=every[len(every) * 9 // 10],
                samples=len(every),
                block_medians_ns=medians,
            )
        return found


def measure(
    launches: List[Launch], works: List[Work], ranks: int, plan: Plan, until: float, perf: Optional[Launch], logs: Path
) -> Tuple[List[Result], List[dict]]:
    """Everything at one number of ranks. Returns the results, and for each piece of work how busy others were."""
    crew = _Crew(launches, ranks, plan, logs)
    results: List[Result] = []
    loads: List[dict] = []
    try:
        crew.start()
        for work in works:
            if time.monotonic() > until:
                _say(f"{work.name}: no time left")
                loads.append({"ranks": ranks, "work": work.name, "skipped": "no time left"})
                continue
            began = _Clock(crew)
            found = _one_work(crew, work, plan, perf)
            results.extend(found)
            loads.append({"ranks": ranks, "work": work.name, "others": began.others(), "seconds": began.seconds()})
            _say(_summary(work, ranks, found, loads[-1]["others"]))
    finally:
        crew.leave()
    return results, loads


class _Crew:
    """The jobs that live while one number of ranks is measured."""

    def __init__(self, launches: List[Launch], ranks: int, plan: Plan, logs: Path) -> None:
        self.launches = launches
        self.ranks = ranks
        self.jobs: Dict[str, Job] = {}
        self.lost: Dict[str, int] = {}
        self.notes: Dict[str, str] = {}
        self._plan = plan
        self._logs = logs

    def start(self) -> None:
        """Starts what is not running and has not failed too often."""
        for launch in self.launches:
            name = launch.name
            if name in self.jobs or self.lost.get(name, 0) >= LOST_MAX:
                continue
            try:
                log = self._logs / f"{name}-{self.ranks}.log"
                self.jobs[name] = Job(launch, self.ranks, self._plan.pin, self._plan.nice, log)
            except (Lost, OSError) as error:
                self.lose(name, str(error))

    def lose(self, name: str, why: str) -> None:
        self.jobs.pop(name, None)
        self.lost[name] = self.lost.get(name, 0) + 1
        self.notes[name] = why
        _say(f"{name} with {self.ranks} ranks is lost: {why}")

    def order(self, name: str, what: dict) -> List[dict]:
        try:
            return self.jobs[name].order(what, self._plan.answer_seconds)
        except Lost as error:
            self.lose(name, f"{what['do']}: {error}")
            raise

    def leave(self) -> None:
        for job in self.jobs.values():
            job.leave()

    def pids(self) -> List[int]:
        return [pid for job in self.jobs.values() for pid in job.pids]


def _one_work(crew: _Crew, work: Work, plan: Plan, perf: Optional[Launch]) -> List[Result]:
    crew.start()
    order = {"do": "prepare", "name": work.name, "kind": work.kind, "counts": work.counts, "repeats": work.repeats}
    keep = work.size * 2 * crew.ranks * len(crew.jobs) < KEEP_SHARE * _memory_free()
    found: Dict[Tuple[str, str], Result] = {}
    pace: Dict[Tuple[str, str], float] = {}
    for launch in crew.launches:
        if launch.name not in crew.jobs:
            found[launch.name, ""] = _result(crew, launch, work, "", crew.notes.get(launch.name, "not started"))
            continue
        try:
            _first_look(crew, launch, work, order, found, pace)
            if not keep and launch.name in crew.jobs:
                crew.order(launch.name, {"do": "free"})
        except Lost:
            found[launch.name, ""] = _result(crew, launch, work, "", crew.notes[launch.name])
    perf_result = _perf_first(perf, work, crew.ranks)
    for turn in range(plan.rounds):
        # Each round starts with another library, so that none always follows the same one.
        shift = turn % max(1, len(crew.launches))
        for launch in crew.launches[shift:] + crew.launches[:shift]:
            try:
                _one_round(crew, launch, work, plan, found, pace, None if keep else order)
            except Lost:
                found[launch.name, ""] = _result(crew, launch, work, "", crew.notes[launch.name])
        if perf is not None and perf_result is not None and turn < plan.perf_rounds:
            _perf_block(perf, work, plan, crew.ranks, perf_result)
    for name in list(crew.jobs):
        try:
            crew.order(name, {"do": "free"})
        except Lost:
            pass
    return [*found.values(), *([perf_result] if perf_result else [])]


def _first_look(crew: _Crew, launch: Launch, work: Work, order: dict, found: dict, pace: dict) -> None:
    """Lets a library make its tensors, checks each of its ways, and times one call of each."""
    answers = crew.order(launch.name, order)
    if "cannot" in answers[0]:
        found[launch.name, ""] = _result(crew, launch, work, "", answers[0]["cannot"])
    for way in answers[0]["ways"]:
        result = found[launch.name, way] = _result(crew, launch, work, way)
        if not launch.limit:
            checks = crew.order(launch.name, {"do": "check", "way": way})
            if any("cannot" in check for check in checks):
                result.note = next(check["cannot"] for check in checks if "cannot" in check)
                continue
            result.wrong = sum(check["wrong"] for check in checks)
        # Carole's calls are at their pace only when they have been repeated.
        pace[launch.name, way] = _block(crew, launch.name, way, samples=1, repeats=1, warm=5)[0] / 1e9


def _one_round(
    crew: _Crew, launch: Launch, work: Work, plan: Plan, found: dict, pace: dict, order: Optional[dict]
) -> None:
    ways = [way for (name, way) in pace if name == launch.name]
    if launch.name not in crew.jobs or not ways:
        return
    if order is not None:
        crew.order(launch.name, order)
    best = min(pace[launch.name, way] for way in ways if way not in ASIDES)
    for place, way in enumerate(ways):
        result, seconds = found[launch.name, way], pace[launch.name, way]
        if place > 0 and seconds > plan.hopeless * best:
            result.note = "given up: slower than another way"
            continue
        # The first call after a pause is no measure, so the pace is that of the block before.
        count = int(plan.block_seconds / max(seconds * work.repeats, 1e-7))
        count = max(plan.samples_least, min(plan.samples_most, count))
        warm = int(seconds < COLD_SECONDS) if count < 10 else min(50, count // 10) * work.repeats
        times = _block(crew, launch.name, way, count, work.repeats, warm)
        result.blocks.append(times)
        pace[launch.name, way] = statistics.median(times) / 1e9
    if order is not None:
        crew.order(launch.name, {"do": "free"})


def _block(crew: _Crew, name: str, way: str, samples: int, repeats: int, warm: int) -> List[int]:
    order = {"do": "block", "way": way, "samples": samples, "repeats": repeats, "warm": warm}
    answers = crew.order(name, order)
    # A call has taken as long as its slowest rank.
    return [max(times) for times in zip(*(answer["times"] for answer in answers))]


def _result(crew: _Crew, launch: Launch, work: Work, way: str, note: str = "") -> Result:
    version = crew.jobs[launch.name].version if launch.name in crew.jobs else ""
    return Result(launch.name, version, launch.transport, crew.ranks, work.name, work.kind, work.size, way, note=note)


def _perf_first(perf: Optional[Launch], work: Work, ranks: int) -> Optional[Result]:
    """The result to be of `carole-perf`, which calls Carole from Rust; it knows single tensors only."""
    if perf is None or work.kind == "set":
        return None
    return Result(perf.name, "", perf.transport, ranks, work.name, work.kind, work.size, "from Rust", wrong=0)


def _perf_block(perf: Launch, work: Work, plan: Plan, ranks: int, result: Result) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        assert perf.launcher is not None
        words = [*perf.launcher(ranks), work.kind, "-np", str(ranks), "--min", str(work.size), "--max", str(work.size)]
        words += ["--json", str(file)] + (["--in-place"] if work.kind == "allreduce" else [])
        try:
            done = subprocess.run(
                words, env={**os.environ, **perf.environment}, capture_output=True, text=True, check=False,
                timeout=plan.answer_seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            result.note = "no answer in time"
            return
        try:
            row = json.loads(file.read_text())["rows"][0]
        except (OSError, ValueError, LookupError):
            result.note = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
            return
        result.blocks.append([int(row["median_us"] * 1000)])
        result.wrong = (result.wrong or 0) + row["wrong"]


class _Clock:
    """How long something took, and how many processors others kept busy meanwhile."""

    def __init__(self, crew: _Crew) -> None:
        self._crew = crew
        self._began = time.monotonic()
        self._busy = _busy_seconds()
        self._ours = self._our_seconds()

    def _our_seconds(self) -> float:
        mine = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
                   for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # fmt: skip
        return mine + processor_seconds(self._crew.pids())

    def seconds(self) -> float:
        return round(time.monotonic() - self._began, 1)

    def others(self) -> float:
        busy = _busy_seconds() - self._busy - (self._our_seconds() - self._ours)
        return round(max(0.0, busy) / max(1e-3, time.monotonic() - self._began), 2)


def _busy_seconds() -> float:
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(word) for word in file.readline().split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:7])) / os.sysconf("SC_CLK_TCK")


def _memory_free() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def _summary(work: Work, ranks: int, found: List[Result], others: float) -> str:
    best: Dict[str, float] = {}
    for result in found:
        if result.blocks:
            best[result.library] = min(best.get(result.library, 1e18), statistics.median(result.medians()))
    times = ", ".join(f"{name} {time / 1e3:.4g}" for name, time in sorted(best.items(), key=lambda pair: pair[1]))
    return f"{ranks} ranks, {work.name} (us): {times}; others use {others} processors"


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)

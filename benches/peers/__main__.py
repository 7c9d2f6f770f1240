"""`benches/peers/run`: installs, measures, reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List

from . import install, jobs, report, runner, workloads

QUICK = runner.Plan(
    rounds=3, block_seconds=0.06, samples_least=1, samples_most=150, answer_seconds=20, perf_rounds=1, hopeless=1.2,
    seconds=120,
)  # fmt: skip
FULL = runner.Plan(
    rounds=7, block_seconds=0.25, samples_least=3, samples_most=500, answer_seconds=90, perf_rounds=7, hopeless=3.0,
    seconds=1e9,
)  # fmt: skip
# Left out of a quick run unless asked for by name: over TCP, Gloo is what people use.
NOT_QUICK = ("openmpi-tcp", "mpich-tcp")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches/peers/run", description="Measures Carole beside its peers.")
    parser.add_argument("--quick", action="store_true", help="2 ranks, short blocks: at most 3 minutes once installed")
    parser.add_argument("--ranks", default="", help="numbers of ranks, as in 2,4,8 (all of these by default)")
    parser.add_argument("--only", default="", help="work whose name has one of these words, as in '64 MiB,ResNet'")
    parser.add_argument("--libraries", default="", help="measure these only, as in carole,openmpi,copy")
    parser.add_argument("--rounds", type=int, help="rounds for each piece of work")
    parser.add_argument("--minutes", type=float, help="begin no new work after so many minutes of measuring")
    parser.add_argument("--pin", action="store_true", help="rank r stays on processor r, in all libraries alike")
    parser.add_argument("--nice", type=int, default=0, help="below 0: ahead of other work (needs root)")
    parser.add_argument("--venv", type=Path, help="an environment to use; what it lacks is installed into it")
    parser.add_argument("--wheel", type=Path, help="Carole's wheel, rather than building one")
    parser.add_argument("--mpi", choices=["system", "wheels"], default="system", help="whose Open MPI and MPICH")
    parser.add_argument("--horovod", choices=["no", "if-built", "build"], default="", help="builds unless --quick")
    parser.add_argument("--out", type=Path, default=install.TARGET, help="folder of peers.json, peers.md, peers.png")
    parser.add_argument("--install-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    # So that being told to end leaves no ranks and no files behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    install.TARGET.mkdir(parents=True, exist_ok=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    python = install.environment(asked.venv)
    launches = [
        *install.carole(python, asked.wheel),
        *install.mpis(python, asked.mpi == "wheels"),
        *install.gloo_and_limits(python),
        *install.horovod(asked.horovod or ("if-built" if asked.quick else "build")),
    ]
    perf = install.carole_perf(python)
    if asked.install_only:
        return
    names = [name for name in asked.libraries.split(",") if name]
    if asked.quick and not names:
        launches = [launch for launch in launches if launch.name not in NOT_QUICK]
    if names:
        launches = [launch for launch in launches if launch.name in names]
    if asked.nice:
        # For what is started from here on; and see jobs.be_nice.
        jobs.be_nice(os.getpid(), asked.nice)
    plan = plan_of(asked)
    counts = [int(word) for word in (asked.ranks or ("2" if asked.quick else "2,4,8")).split(",")]
    works = workloads.chosen(asked.only)
    logs = install.TARGET / "logs"
    logs.mkdir(exist_ok=True)
    found = about(plan, asked)
    until = time.monotonic() + plan.seconds
    for ranks in counts:
        use_perf = perf if not names or perf.name in names else None
        results, loads = runner.measure(launches, works, ranks, plan, until, use_perf, logs)
        found["results"] += [result.record() for result in results]
        found["loads"] += loads
        # Written after each number of ranks: a long run that is cut short has not been for nothing.
        write(found, asked.out, python)
    print((asked.out / "peers.md").read_text())
    sys.exit(1 if any(row.get("wrong") for row in found["results"]) else 0)


def plan_of(asked: argparse.Namespace) -> runner.Plan:
    plan = QUICK if asked.quick else FULL
    changes = {"pin": asked.pin, "nice": asked.nice}
    if asked.rounds:
        changes["rounds"] = asked.rounds
    if asked.minutes:
        changes["seconds"] = asked.minutes * 60
    return runner.Plan(**{**plan.__dict__, **changes})


def about(plan: runner.Plan, asked: argparse.Namespace) -> dict:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=install.ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()  # fmt: skip
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "commit": commit,
        "processor": model,
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "load_before": os.getloadavg(),
        "nice": asked.nice,
        "plan": plan.__dict__,
        "results": [],
        "loads": [],
    }


def write(found: dict, folder: Path, python: Path) -> None:
    (folder / "peers.json").write_text(json.dumps(found, indent=1))
    (folder / "peers.md").write_text(report.markdown(found))
    drawing: List[str] = [str(python), "-m", "peers.plot", str(folder / "peers.json"), str(folder / "peers.png")]
    if subprocess.run(drawing, check=False).returncode != 0:
        install.say("the plot could not be drawn")


if __name__ == "__main__":
    main()

"""Training steps with carole.torch and with Horovod, one job after the other, in turns. See README.md beside this file.

    target/peers/horovod/bin/python benches/horovod_training.py --carole target/peers/carole [--rounds N]

`benches/peers/run --horovod build` makes both folders. Prints the median step of each over all jobs, their spread, and
the ratio to Carole's; and a step that reduces nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List

EXAMPLES = Path(__file__).parent.parent / "bindings" / "python" / "examples"
STEPS, WARM_UP = 10, 3


def resnet():
    """ResNet-50 and a batch of 2 images of 64 x 64."""
    import torch
    from resnet_synthetic import resnet as make

    return make("resnet50"), torch.randn(2, 3, 64, 64), torch.randint(0, 1000, (2,)), lambda out: out


def gpt():
    """A GPT of 10.9 million parameters and a batch of 2 x 128 tokens."""
    import torch
    from gpt import GPT

    options = argparse.Namespace(width=384, heads=6, layers=6, length=128)
    tokens = torch.randint(0, 256, (2, options.length + 1))
    return GPT(options), tokens[:, :-1], tokens[:, 1:].flatten(), lambda out: out.flatten(0, 1)


MODELS = {"resnet": resnet, "gpt": gpt}


def train(library: str, name: str) -> None:
    """One rank: prints the seconds of each step on rank 0."""
    import torch

    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    hvd = importlib.import_module("horovod.torch" if library.startswith("horovod") else "carole.torch")
    hvd.init()
    torch.manual_seed(hvd.rank())
    model, inputs, labels, shape = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if library != "none":
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    seconds = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(shape(model(inputs)), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    if hvd.rank() == 0:
        print("steps", *seconds[WARM_UP:])
    hvd.shutdown()


def job(library: str, name: str, carole: Path) -> List[float]:
    """Two ranks of this file; the seconds of their steps."""
    binaries = Path(sys.executable).parent
    launch = {
        "horovod-gloo": [binaries / "horovodrun", "--gloo", "--network-interfaces", "lo"],
        "horovod-mpi": ["mpirun", "--oversubscribe", "--bind-to", "none", "--allow-run-as-root"],
    }.get(library, [carole / "bin" / "carolerun"])
    if launch[0] != "mpirun":
        launch.insert(0, sys.executable)
    command = [*map(str, launch), "-np", "2", sys.executable, __file__, "--library", library, "--only", name]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": str(carole.resolve())}
    if library.startswith("horovod"):
        environment["HOROVOD_CYCLE_TIME"] = "0.1"
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    line = next(line for line in out.splitlines() if "steps " in line)
    return [float(word) for word in line.split("steps ")[1].split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--carole", type=Path, default=Path("target/peers/carole"))
    parser.add_argument("--only", default="", help=f"models whose names contain this: {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        return train(options.library, options.only)
    for name, make in MODELS.items():
        if options.only not in name:
            continue
        steps: Dict[str, List[float]] = {}
        for _ in range(options.rounds):
            for library in ("carole", "horovod-gloo", "horovod-mpi", "none"):
                steps.setdefault(library, []).extend(job(library, name, options.carole))
        print(make.__doc__)
        for library, seconds in steps.items():
            median = statistics.median(seconds)
            ratio = median / statistics.median(steps["carole"])
            spread = f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
            print(f"  {library:<14} {median * 1e3:7.1f} ms a step ({spread}), {ratio:.2f} x Carole's", flush=True)


if __name__ == "__main__":
    main()

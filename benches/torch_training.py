"""Carole under PyTorch against Gloo: calls, communication, and training steps. See README.md beside this file.

    python benches/torch_training.py [--only NAME] [--rounds N]

Starts two ranks of itself. Both backends live in the same processes, in turns, so that what else the machine does meets
both. Prints medians, their spread over the rounds, and the ratio.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List

EXAMPLES = Path(__file__).parent.parent / "bindings" / "python" / "examples"
Contestants = Dict[str, Callable[[], None]]


def show_time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    return ""


class Bench:
    """Rounds in which every contestant runs once, and what came out."""

    def __init__(self, rounds: int, quiet: bool) -> None:
        self.rounds, self.quiet = rounds, quiet

    def say(self, words: str) -> None:
        if not self.quiet:
            print(words, flush=True)

    def measure(self, title: str, contestants: Contestants, calls: int, before: Callable[[], None],
                rounds: int = 0) -> Dict[str, List[float]]:  # fmt: skip
        """Seconds a call, one value a round; `before` brings the ranks together."""
        times: Dict[str, List[float]] = {name: [] for name in contestants}
        for number in range((rounds or self.rounds) + 1):
            for name, call in contestants.items():
                before()
                started = time.perf_counter()
                for _ in range(calls):
                    call()
                seconds = (time.perf_counter() - started) / calls
                if number:
                    times[name].append(seconds)
        self.say(title)
        for name, values in times.items():
            spread = f"{show_time(min(values))} to {show_time(max(values))}"
            self.say(f"  {name:<34} {show_time(statistics.median(values)):>9}   ({spread})")
        return times

    def ratio(self, words: str, above: List[float], below: List[float], target: str) -> None:
        """Of the medians, and the median of the rounds' ratios."""
        whole = statistics.median(above) / max(statistics.median(below), 1e-12)
        pairs = statistics.median([a / max(b, 1e-12) for a, b in zip(above, below)])
        self.say(f"  {words}: {whole:.2f} (median of the rounds' ratios {pairs:.2f}); target {target}")


def calls(bench: Bench, gloo, rank: int) -> None:
    """The price of one small call."""
    import torch
    import torch.distributed as dist

    barrier = dist.barrier
    one = torch.zeros(1)
    alone = {name: dist.new_group([0], backend=name) for name in ("carole", "gloo")}
    if rank == 0:
        times = bench.measure(
            "dist.all_reduce of 4 bytes, world size 1",
            {name: (lambda group=group: dist.all_reduce(one, group=group)) for name, group in alone.items()},
            2000, lambda: None,
        )  # fmt: skip
        bench.ratio("gloo / carole", times["gloo"], times["carole"], "carole at most 9 us")
    barrier()
    times = bench.measure(
        "dist.all_reduce of 4 bytes, 2 ranks",
        {"carole": lambda: dist.all_reduce(one), "gloo": lambda: dist.all_reduce(one, group=gloo)}, 300, barrier,
    )  # fmt: skip
    bench.ratio("gloo / carole", times["gloo"], times["carole"], "at least 20")


def thousand(bench: Bench, gloo, rank: int) -> None:
    """Many small tensors, one by one and as a group, by carole.torch."""
    import torch
    import torch.distributed as dist

    import carole.torch as hvd

    tensors = [torch.ones(64) for _ in range(1000)]
    names = [f"gradient.{number}" for number in range(1000)]
    me = hvd.add_process_set([0])

    def each() -> None:
        handles = [hvd.allreduce_async_(tensor, op=hvd.Sum, name=name) for tensor, name in zip(tensors, names)]
        for handle in handles:
            hvd.synchronize(handle)

    def over_gloo() -> None:
        for work in [dist.all_reduce(tensor, group=gloo, async_op=True) for tensor in tensors]:
            work.wait()

    contestants = {
        "carole.torch, each": each,
        "carole.torch, grouped": lambda: hvd.grouped_allreduce_(tensors, op=hvd.Sum, name="all"),
        "gloo, each": over_gloo,
    }
    times = bench.measure("1000 tensors of 256 bytes, 2 ranks", contestants, 5, dist.barrier)
    bench.ratio("gloo / carole, each", times["gloo, each"], times["carole.torch, each"], "about 1 ms in all")
    if rank == 0:

        def by_itself() -> None:
            for handle in [
                hvd.allreduce_async_(tensor, op=hvd.Sum, name=name, process_set=me)
                for tensor, name in zip(tensors, names)
            ]:
                hvd.synchronize(handle)

        bench.measure("1000 tensors of 256 bytes, a process set of one rank", {"each": by_itself}, 5, lambda: None)
    dist.barrier()


def gradients(bench: Bench, gloo, rank: int) -> None:
    """DDP's own communication of ResNet-50's gradients: a step less the same step without communication."""
    import torch
    import torch.distributed as dist

    sys.path.insert(0, str(EXAMPLES))
    from resnet_synthetic import resnet

    class Sums(torch.nn.Module):
        """The parameters, with next to no work on them."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ParameterList([p.detach().clone() for p in resnet("resnet50").parameters()])

        def forward(self) -> torch.Tensor:
            return sum(part.sum() for part in self.parts)

    models = {
        name: torch.nn.parallel.DistributedDataParallel(Sums(), process_group=group, gradient_as_bucket_view=True)
        for name, group in (("carole", None), ("gloo", gloo))
    }

    def step(name: str) -> None:
        models[name]().backward()

    def off() -> None:
        with models["carole"].no_sync():
            step("carole")

    times = bench.measure(
        "DDP, ResNet-50's gradients (25.6 million float32), 2 ranks",
        {"carole": lambda: step("carole"), "gloo": lambda: step("gloo"), "no communication": off}, 2, dist.barrier,
    )  # fmt: skip
    exposed(bench, times, ["carole"], "gloo", "at least 3", False)


def exposed(bench: Bench, times: Dict[str, List[float]], ours: List[str], theirs: str, target: str,
            steps: bool = True) -> None:  # fmt: skip
    """Steps less the steps of the same round without communication."""
    cost = {
        name: [max(a - b, 1e-9) for a, b in zip(times[name], times["no communication"])] for name in [*ours, theirs]
    }
    for name, values in cost.items():
        bench.say(f"  communication, {name:<19} {show_time(statistics.median(values)):>9}")
    for name in ours:
        bench.ratio(f"communication, {theirs} / {name}", cost[theirs], cost[name], target)
        if steps:
            bench.ratio(f"step, {theirs} / {name}", times[theirs], times[name], "at least 1")


def training(bench: Bench, gloo, make, loss_of, title: str) -> None:
    """One model three ways: DDP on Carole, DDP on Gloo, and carole.torch's optimizer; and without communication."""
    import torch
    import torch.distributed as dist

    import carole.torch as hvd

    def trainer(kind: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if kind in ("DDP on carole", "DDP on gloo"):
            group = gloo if kind.endswith("gloo") else None
            model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
        elif kind.startswith("carole.torch"):
            named = [(f"{title}.{kind}.{n}", p) for n, p in model.named_parameters()]
            optimizer = hvd.DistributedOptimizer(optimizer, named, gradient_as_bucket_view="views" in kind)

        def step() -> None:
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

        return step

    kinds = ["DDP on carole", "carole.torch", "carole.torch, views", "DDP on gloo", "no communication"]
    times = bench.measure(title, {kind: trainer(kind) for kind in kinds}, 2, dist.barrier)
    exposed(bench, times, kinds[:3], "DDP on gloo", "at least 2")


def resnet_steps(bench: Bench, gloo, rank: int) -> None:
    import torch

    sys.path.insert(0, str(EXAMPLES))
    from resnet_synthetic import resnet

    torch.manual_seed(rank)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 1000, (2,))
    training(
        bench, gloo, lambda: resnet("resnet50"),
        lambda model: torch.nn.functional.cross_entropy(model(images), labels),
        "ResNet-50, 2 images of 64 x 64 a rank, 2 ranks",
    )  # fmt: skip


def gpt_steps(bench: Bench, gloo, rank: int) -> None:
    import torch

    sys.path.insert(0, str(EXAMPLES))
    from gpt import GPT

    options = argparse.Namespace(width=384, heads=6, layers=6, length=128)
    torch.manual_seed(rank)
    tokens = torch.randint(0, 256, (2, options.length + 1))
    training(
        bench, gloo, lambda: GPT(options),
        lambda model: torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()),
        "GPT of 10.9 million parameters, 2 x 128 tokens a rank, 2 ranks",
    )  # fmt: skip


PARTS = {"calls": calls, "thousand": thousand, "gradients": gradients, "resnet": resnet_steps, "gpt": gpt_steps}


def work(options: argparse.Namespace) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    import carole.torch_backend  # noqa: F401 (registers the backend)

    torch.set_num_threads(1)
    dist.init_process_group("carole")
    gloo = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    bench = Bench(options.rounds, quiet=rank != 0)
    bench.say(f"torch {torch.__version__}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for name, part in PARTS.items():
        if options.only in name:
            part(bench, gloo, rank)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"parts whose names contain this; there are {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if "RANK" in os.environ:
        return work(options)
    # A job for each part, so that none finds the groups of another.
    sys.exit(max(job(name, options.rounds) for name in PARTS if options.only in name))


def job(part: str, rounds: int) -> int:
    """Two ranks that run one part; their worse exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--only", part, "--rounds", str(rounds)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_PORT": port,
                 "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    main()

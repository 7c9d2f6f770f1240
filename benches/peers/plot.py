"""Bus bandwidth of an allreduce over size, one panel for each number of ranks and transport: JSON in, PNG out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import List

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from . import workloads  # noqa: E402
from .report import ORDER, OURS, TITLES  # noqa: E402

COLOURS = {
    "Carole": "#c1121f",
    "Carole, shared tensors": "#780000",
    "Carole from Rust": "#f4978e",
    "Open MPI": "#1d4e89",
    "MPICH": "#00b2ca",
    "Gloo": "#e07a00",
    "Horovod/Gloo": "#7b2d8b",
    "Horovod/MPI": "#b388c9",
    "copying at once": "black",
    "raw stream": "black",
}
LIMITS = ("copy", "stream")


def draw(found: dict, path: Path) -> None:
    rows = [row for row in found["results"] if row["kind"] == "allreduce" and "median_ns" in row]
    panels = []
    for ranks in sorted({row["ranks"] for row in rows}):
        for transport in ("shm", "tcp"):
            mine = [row for row in rows if row["ranks"] == ranks and row["transport"] in (transport, "both")]
            if any(row["library"] in OURS for row in mine):
                panels.append((ranks, transport, mine))
    if not panels:
        print("there is no allreduce of Carole to draw", file=sys.stderr)
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), sharey=True, squeeze=False)
    for axis, (ranks, transport, mine) in zip(axes[0], panels):
        for name in sorted({row["library"] for row in mine}, key=ORDER.index):
            _line(axis, ranks, name, [row for row in mine if row["library"] == name])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{ranks} ranks, {'shared memory' if transport == 'shm' else 'TCP over loopback'}")
        sizes = sorted({row["size"] for row in mine})
        axis.set_xticks(sizes, [workloads.size_words(size) for size in sizes], rotation=30)
        axis.set_xlabel("allreduce of float32 (Gloo: always TCP)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("bus bandwidth, GB/s (bands: least to most of the blocks)")
    figure.suptitle(
        f"{found['processor']}, {found['processors']} processors, {found['date']}, commit {found['commit']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _line(axis: plt.Axes, ranks: int, name: str, rows: List[dict]) -> None:
    rows = sorted(rows, key=lambda row: row["size"])
    sizes = [row["size"] for row in rows]
    share = 2 * (ranks - 1) / ranks
    speed = lambda key: [row["size"] * share / row[key] for row in rows]  # noqa: E731
    title, dashes = TITLES[name], "--" if name in LIMITS else "-"
    axis.plot(sizes, speed("median_ns"), dashes, color=COLOURS[title], label=title, marker="o", markersize=3)
    axis.fill_between(sizes, speed("most_block_ns"), speed("least_block_ns"), color=COLOURS[title], alpha=0.12)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

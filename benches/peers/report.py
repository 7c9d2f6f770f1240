"""What was found, as Markdown tables: one for each number of ranks and transport."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

from . import targets, workloads

TITLES = {
    "carole": "Carole",
    "carole-shared": "Carole, shared tensors",
    "carole-tcp": "Carole",
    "carole-perf": "Carole from Rust",
    "openmpi": "Open MPI",
    "openmpi-tcp": "Open MPI",
    "mpich": "MPICH",
    "mpich-tcp": "MPICH",
    "gloo": "Gloo",
    "horovod-gloo": "Horovod/Gloo",
    "horovod-mpi": "Horovod/MPI",
    "copy": "copying at once",
    "stream": "raw stream",
}
ORDER = list(TITLES)
OURS = ("carole", "carole-tcp")
# The same with tensors in memory that the ranks share.
SHARED = "carole-shared"
NOT_PEERS = (*OURS, SHARED, "carole-perf", "copy", "stream")
# What counts for Carole, one tensor after the other by name; the other ways are printed for what they are.
OUR_WAYS = ("by name", "each", "blocking", "new output", "into output")

Row = dict


def markdown(found: dict) -> str:
    loads = {(load["ranks"], load["work"]): load for load in found["loads"]}
    busy = [load["others"] for load in found["loads"] if "others" in load]
    text = [
        f"{found['date']}, commit {found['commit']}, {found['processors']} processors ({found['processor']}); "
        f"load before {found['load_before'][0]:.1f}; while measuring, other programs kept {_range(busy)} processors "
        f"busy. {found['plan']['rounds']} rounds; median of the blocks' medians (least to most)."
    ]
    if found["nice"]:
        text.append(f"Ran with nice {found['nice']}.")
    versions = {row["library"]: row["version"] for row in found["results"] if row["version"]}
    text.append("Versions: " + ", ".join(f"{TITLES[name]} {version}" for name, version in sorted(versions.items())
                                         if not name.endswith("-tcp")) + ".")  # fmt: skip
    missed: List[str] = []
    for ranks in sorted({row["ranks"] for row in found["results"]}):
        for transport in ("shm", "tcp"):
            text.append(_table(found["results"], ranks, transport, loads, missed))
    met = "Every target measured here is met." if not missed else "Behind a target: " + "; ".join(missed) + "."
    notes = sorted({_note(row) for row in found["results"] if row["note"] and not _trivial(row)})
    text += [met, *(["Notes:\n" + "\n".join(f"- {note}" for note in notes)] if notes else [])]
    skipped = [f"{load['work']} ({load['ranks']} ranks)" for load in found["loads"] if "skipped" in load]
    if skipped:
        text.append("Not measured, for lack of time: " + ", ".join(skipped) + ".")
    return "\n\n".join(part for part in text if part) + "\n"


def _note(row: Row) -> str:
    way = f", {row['way']}" if row["way"] else ""
    return f"{TITLES[row['library']]}, {row['ranks']} ranks, {row['work']}{way}: {row['note']}"


def _trivial(row: Row) -> bool:
    """Notes that say nothing new: a limit without a measure for this work, a way that was given up as slow."""
    return row["library"] in ("copy", "stream") or row["note"].startswith("given up")


def _table(results: List[Row], ranks: int, transport: str, loads: dict, missed: List[str]) -> str:
    rows = [row for row in results if row["ranks"] == ranks and row["transport"] in (transport, "both")]
    ours = "carole" if transport == "shm" else "carole-tcp"
    if not any(row["library"] == ours for row in rows):
        return ""
    names = sorted({row["library"] for row in rows}, key=ORDER.index)
    heads = ["work", *(TITLES[name] for name in names), "ahead of the best peer", "targets", "wrong", "others' load"]
    lines = [f"**{ranks} ranks, {'shared memory' if transport == 'shm' else 'TCP over loopback'}**", ""]
    lines += ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for work in dict.fromkeys(row["work"] for row in rows):
        mine = [row for row in rows if row["work"] == work]
        # In the table for TCP, work that only Gloo's one column would fill says nothing.
        best = {name: _best(mine, name) for name in names}
        if best[ours] is None and transport == "tcp":
            continue
        cells = [_cell(best[name], mine, name) for name in names]
        ratio, verdicts = _judge(work, ranks, transport, ours, best, missed)
        wrong = [f"{TITLES[row['library']]} {row['wrong']}" for row in mine if row["wrong"]]
        load = loads.get((ranks, work), {}).get("others", "")
        lines.append("| " + " | ".join([work, *cells, ratio, verdicts, ", ".join(wrong) or "none", str(load)]) + " |")
    aside = _asides(rows, ours)
    return "\n".join(lines) + (f"\n\n{aside}" if aside else "")


def _best(rows: List[Row], name: str) -> Optional[Row]:
    """The library's fastest way; for Carole the way that was asked for."""
    mine = [row for row in rows if row["library"] == name and "median_ns" in row]
    if name in (*OURS, SHARED):
        mine = [row for row in mine if row["way"] in OUR_WAYS]
    return min(mine, key=lambda row: row["median_ns"], default=None)


def _cell(row: Optional[Row], rows: List[Row], name: str) -> str:
    if row is None:
        notes = [one["note"] for one in rows if one["library"] == name and one["note"]]
        lost = any(word in note for note in notes for word in ("no answer", "has ended", "started"))
        return "did not finish" if lost else "-"
    return f"{duration(row['median_ns'])} ({duration(row['least_block_ns'])} to {duration(row['most_block_ns'])})"


def _judge(
    work: str, ranks: int, transport: str, ours: str, best: Dict[str, Optional[Row]], missed: List[str]
) -> Tuple[str, str]:
    mine = best[ours]
    peers = {name: row["median_ns"] for name, row in best.items() if row is not None and name not in NOT_PEERS}
    if mine is None or not peers:
        return "-", "-"
    first = min(peers, key=lambda name: peers[name])
    ratio = f"{peers[first] / mine['median_ns']:.2f} x {TITLES[first]}"
    every = {name: row["median_ns"] for name, row in best.items() if row is not None}
    verdicts = []
    one = next(each for each in workloads.ALL if each.name == work)
    for target in targets.targets(one, ranks, transport):
        against = [every[name] for name in (target.against or peers) if name in every]
        if not against:
            continue
        reached = min(against) / mine["median_ns"]
        met = reached >= target.least
        verdicts.append(f"{target.words} {reached:.2f} of {target.least:.2f}: {'met' if met else '**not met**'}")
        if not met:
            missed.append(f"{ranks} ranks {transport}, {work} ({target.words} {reached:.2f} of {target.least:.2f})")
    if not verdicts and min(peers.values()) < mine["median_ns"]:
        missed.append(f"{ranks} ranks {transport}, {work} (no target; {ratio})")
    return ratio, "; ".join(verdicts) or "-"


def _asides(rows: List[Row], ours: str) -> str:
    """Carole's other ways."""
    others = [row for row in rows if row["library"] == ours and row["way"] not in OUR_WAYS and "median_ns" in row]
    if not others:
        return ""
    return "Carole otherwise: " + "; ".join(
        f"{row['work']} {row['way']} {duration(row['median_ns'])}"
        f" ({duration(row['least_block_ns'])} to {duration(row['most_block_ns'])})" for row in others
    ) + "."  # fmt: skip


def duration(nanoseconds: float) -> str:
    for unit, words in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if nanoseconds >= unit:
            value = nanoseconds / unit
            return f"{value:.3g} {words}" if value < 999.5 else f"{value:.0f} {words}"
    return f"{nanoseconds:.0f} ns"


def _range(values: List[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}" if values else "an unknown number of"

"""The work, as data. All values are float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Tuple

KIB = 1 << 10
MIB = 1 << 20
VALUE_BYTES = 4


@dataclass(frozen=True)
class Work:
    """Something that all libraries do."""

    name: str
    # allreduce, allgather, broadcast, reducescatter or alltoall of one tensor; "set" is an allreduce of many.
    kind: str
    counts: Tuple[int, ...]
    # Calls that follow one another between two looks at the clock: small ones would drown in the start line.
    repeats: int = 1

    @property
    def size(self) -> int:
        """Bytes: what a rank has, or for an allgather what it ends up with (as nccl-tests count)."""
        return sum(self.counts) * VALUE_BYTES

    def bus_bytes(self, ranks: int) -> float:
        """Bytes that must cross the link of a rank, as nccl-tests count them."""
        share = (ranks - 1) / ranks
        return self.size * {"allreduce": 2 * share, "set": 2 * share, "broadcast": 1.0}.get(self.kind, share)


def single(kind: str, size: int) -> Work:
    repeats = 20 if size <= KIB else 5 if size <= 64 * KIB else 1
    return Work(f"{kind} {size_words(size)}", kind, (size // VALUE_BYTES,), repeats)


def size_words(size: int) -> str:
    for unit, words in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {words}"
    return f"{size} B"


def resnet50() -> Tuple[int, ...]:
    """The parameters of ResNet-50, in the order in which backward finishes their gradients."""
    counts: List[int] = []

    def convolution(outputs: int, inputs: int, width: int) -> None:
        # Each is followed by a batch norm with a weight and a bias.
        counts.extend([outputs * inputs * width * width, outputs, outputs])

    convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)
            inputs = 4 * width
    counts.extend([2048 * 1000, 1000])
    assert (len(counts), sum(counts)) == (161, 25_557_032)
    return tuple(reversed(counts))


def gpt2_small() -> Tuple[int, ...]:
    """The parameters of GPT-2 small, in the order in which backward finishes their gradients."""
    d = 768
    layer = [d, d, d * 3 * d, 3 * d, d * d, d, d, d, d * 4 * d, 4 * d, 4 * d * d, d]
    counts = [50257 * d, 1024 * d, *(layer * 12), d, d]
    assert (len(counts), sum(counts)) == (148, 124_439_808)
    return tuple(reversed(counts))


RESNET50 = Work("ResNet-50", "set", resnet50())
GPT2 = Work("GPT-2 small", "set", gpt2_small())
THOUSAND = Work("1000 x 256 B", "set", (64,) * 1000)

ALLREDUCES = [single("allreduce", size) for size in (4, KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB)]
OTHERS = [
    single(kind, size)
    for kind in ("allgather", "reducescatter", "broadcast", "alltoall")
    for size in (4 * KIB, MIB, 64 * MIB)
]
# The longest comes last: where time runs out, only it is lost.
ALL = [*ALLREDUCES, THOUSAND, RESNET50, *OTHERS, GPT2]


def chosen(only: str) -> List[Work]:
    """The work whose name has one of these words, separated by commas."""
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    return [work for work in ALL if not words or any(word in work.name.lower() for word in words)]

"""Values whose sums are small integers, exact in float32, and differ from place to place and rank to rank."""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Tuple

import torch

from .workloads import Work

PERIOD = 61
_TILE = (torch.arange(PERIOD * 8192) % PERIOD + 1).to(torch.float32)
_STEP = _TILE.numel() - PERIOD


class Stretch(NamedTuple):
    """Values `factor * pattern[start + i]` for `count` values of a tensor from `at` on."""

    at: int
    count: int
    start: int
    factor: int


def _pieces(tensor: torch.Tensor, stretch: Stretch) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    flat = tensor.view(-1)
    for done in range(0, stretch.count, _STEP):
        count = min(_STEP, stretch.count - done)
        first = (stretch.start + done) % PERIOD
        yield flat[stretch.at + done : stretch.at + done + count], _TILE[first : first + count]


def fill(tensor: torch.Tensor, stretch: Stretch) -> None:
    for piece, tile in _pieces(tensor, stretch):
        torch.mul(tile, stretch.factor, out=piece)


def wrong(tensor: torch.Tensor, stretch: Stretch) -> int:
    """How many values are not what they should be."""
    return sum(int((piece != tile * stretch.factor).sum()) for piece, tile in _pieces(tensor, stretch))


def given(work: Work, rank: int, ranks: int) -> List[Stretch]:
    """What each input tensor of this rank holds."""
    if work.kind == "allgather":
        return [Stretch(0, count // ranks, 0, rank + 1) for count in work.counts]
    factor = rank + 1 if work.kind != "broadcast" else int(rank == 0)
    return [Stretch(0, count, 13 * i, factor) for i, count in enumerate(work.counts)]


def expected(work: Work, rank: int, ranks: int) -> List[List[Stretch]]:
    """What each output tensor of this rank holds afterwards."""
    total = ranks * (ranks + 1) // 2
    count = work.counts[0]
    share = count // ranks
    if work.kind == "allgather":
        return [[Stretch(r * share, share, 0, r + 1) for r in range(ranks)]]
    if work.kind == "alltoall":
        return [[Stretch(r * share, share, rank * share, r + 1) for r in range(ranks)]]
    if work.kind == "reducescatter":
        return [[Stretch(0, share, rank * share, total)]]
    factor = 1 if work.kind == "broadcast" else total
    return [[Stretch(0, count, 13 * i, factor)] for i, count in enumerate(work.counts)]

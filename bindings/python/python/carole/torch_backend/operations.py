"""How values of the ranks are combined: c10d's operations, as the engine knows them."""

from __future__ import annotations

import functools
from typing import Any, Sequence, Tuple

import torch
import torch.distributed as dist

from .._errors import UsageError
from .._submit import Average, BitAnd, BitOr, Max, Min, Product, Sum

# The engine has no such operation: the ranks' values are brought together, and combined here.
BIT_XOR = -1

_OPERATIONS = [
    (getattr(dist.ReduceOp, name), op)
    for name, op in (
        ("SUM", Sum), ("AVG", Average), ("MAX", Max), ("MIN", Min), ("PRODUCT", Product), ("BAND", BitAnd),
        ("BOR", BitOr), ("BXOR", BIT_XOR),
    )
    if hasattr(dist.ReduceOp, name)
]  # fmt: skip

# Not every torch computes with the wide unsigned types; their bits are the same as those of the signed ones.
_AS_SIGNED = {
    getattr(torch, f"uint{bits}"): getattr(torch, f"int{bits}")
    for bits in (16, 32, 64)
    if hasattr(torch, f"uint{bits}")
}


def operation(options: Any) -> Tuple[int, float]:
    """The operation of the engine, or BIT_XOR, and the factor before it."""
    wanted = Sum if options is None else options.reduceOp
    for theirs, ours in _OPERATIONS:
        if wanted == theirs:
            return ours, 1.0
    if options is None:
        return Sum, 1.0
    if hasattr(dist.ReduceOp, "PREMUL_SUM") and wanted == dist.ReduceOp.PREMUL_SUM:
        _, factor = wanted.__getstate__()
        return Sum, float(factor)
    # An operation prints itself as an object at an address.
    name = getattr(getattr(wanted, "op", wanted), "name", wanted)
    raise UsageError(f"{name} is none of SUM, AVG, MIN, MAX, PRODUCT, BAND, BOR, BXOR, PREMUL_SUM")


def check_bits(tensors: Sequence[torch.Tensor]) -> None:
    """Refuses what BXOR has no meaning for, before any rank waits."""
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            raise UsageError(f"BXOR combines the bits of integers and booleans, not of {tensor.dtype}")


def bit_xor(rows: torch.Tensor) -> torch.Tensor:
    """All rows as one."""
    signed = _AS_SIGNED.get(rows.dtype)
    if signed is not None:
        return bit_xor(rows.view(signed)).view(rows.dtype)
    return functools.reduce(torch.bitwise_xor, rows.unbind())

"""Tensors that live in memory which the ranks of a host share."""

from __future__ import annotations

from typing import Any, Sequence, Tuple, Union

from . import _native
from ._arrays import wrap


def shared_zeros(*shape: Union[int, Sequence[int]], dtype: Any = "float32") -> Any:
    """Zeros as a NumPy array in memory that the ranks of this host share.

        gradients = carole.shared_zeros(25_600_000)
        carole.allreduce_(gradients)            # no byte is copied

    An allreduce of at least 64 KiB whose arrays and results lie there on all ranks of the host reads and writes them
    where they are, which saves two copies of each. Everything else works as with any array; where ranks share no memory
    (other hosts, `CAROLE_TRANSPORT=tcp`, one rank) it is ordinary memory. The memory counts against `CAROLE_MEMORY`, in
    whole pages, and is given back with the last array that uses it. A forked child shares it, as it does torch's shared
    tensors.

    When a rank fails while such an array is reduced, the array stays where it is but is shared no more; after
    `carole.reform()` or another `carole.init()` allocate again, since what was allocated before is ordinary memory then.

    Args:
        shape: its sizes, one by one or as one sequence.
        dtype: its type, as a name or of NumPy or ml_dtypes.

    Raises:
        UsageError: before `carole.init()`; a type that no collective takes; more than `CAROLE_MEMORY` allows.
    """
    return wrap(allocate(shape, dtype))


def allocate(shape: Tuple[Union[int, Sequence[int]], ...], dtype: Any) -> _native.Output:
    """The memory of `shared_zeros`; `dtype` may be torch's, too."""
    if len(shape) == 1 and not hasattr(shape[0], "__index__"):
        shape = tuple(shape[0])  # type: ignore[arg-type]
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype)).rpartition(".")[2].rstrip("_")
    return _native.shared_zeros(shape, name)  # type: ignore[arg-type]

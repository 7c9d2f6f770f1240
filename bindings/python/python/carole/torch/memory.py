"""Tensors that live in memory which the ranks of a host share."""

from __future__ import annotations

from typing import Any, Optional

import torch

from .._arrays import to_torch
from .._shared import allocate


def shared_zeros(*size: Any, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """`torch.zeros` on the CPU, in memory that the ranks of this host share: see `carole.shared_zeros`.

    Raises:
        UsageError: before `init()`; a type that no collective takes; more memory than `CAROLE_MEMORY` allows.
    """
    tensor: torch.Tensor = to_torch(allocate(size, dtype or torch.get_default_dtype()))
    return tensor

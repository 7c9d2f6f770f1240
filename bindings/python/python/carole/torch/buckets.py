"""Gradients as views of flat regions, each of which is reduced as one tensor, in place."""

from __future__ import annotations

from typing import Dict, Iterator, List, Sequence

import torch

from .._errors import UsageError
from .memory import shared_zeros

# As torch's DDP: few reductions, and the first of them early.
FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20


class Bucket:
    """Parameters of one type whose gradients lie one behind the other."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = list(parameters)
        self.ready = 0
        self.flat = _zeros(sum(p.numel() for p in self.parameters), self.parameters[0].dtype)
        self.views: Dict[torch.Tensor, torch.Tensor] = {}
        start = 0
        for parameter in self.parameters:
            view = self.flat[start : start + parameter.numel()].view(parameter.shape)
            self.views[parameter] = view
            start += parameter.numel()
            if parameter.grad is not None:
                self.take(parameter)
            else:
                parameter.grad = view

    def take(self, parameter: torch.Tensor) -> None:
        """Makes the gradient the view again, with its values, where something else has put another in its place."""
        view, grad = self.views[parameter], parameter.grad
        if grad is view or (grad is not None and grad.data_ptr() == view.data_ptr() and grad.shape == view.shape):
            return
        with torch.no_grad():
            if grad is None:
                view.zero_()
            else:
                view.copy_(grad.to_dense() if grad.is_sparse else grad)
        parameter.grad = view

    def zero(self) -> None:
        """Clears the gradients."""
        self.flat.zero_()
        for parameter, view in self.views.items():
            parameter.grad = view


def _zeros(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that the ranks share, where there is so much of it."""
    try:
        return shared_zeros(elements, dtype=dtype)
    except UsageError:
        return torch.zeros(elements, dtype=dtype)


def split(parameters: Sequence[torch.Tensor]) -> Iterator[List[torch.Tensor]]:
    """Buckets in the order in which a backward pass roughly computes gradients: the last parameters first."""
    limit = FIRST_BUCKET_BYTES
    open_: Dict[torch.dtype, List[torch.Tensor]] = {}
    sizes: Dict[torch.dtype, int] = {}
    for parameter in reversed(parameters):
        kind = parameter.dtype
        open_.setdefault(kind, []).append(parameter)
        sizes[kind] = sizes.get(kind, 0) + parameter.numel() * parameter.element_size()
        if sizes[kind] >= limit:
            yield open_.pop(kind)
            del sizes[kind]
            limit = BUCKET_BYTES
    yield from open_.values()


def by_type(parameters: Sequence[torch.Tensor]) -> List[List[torch.Tensor]]:
    """The parameters of each type."""
    kinds: Dict[torch.dtype, List[torch.Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.dtype, []).append(parameter)
    return list(kinds.values())

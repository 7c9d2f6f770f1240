"""Training that outlives its ranks: `run`, `TorchState` and `ElasticSampler`, with Horovod's names."""

from __future__ import annotations

from typing import Any, Callable

from ..._elastic import ObjectState, State, rejoin, run_fn
from .sampler import ElasticSampler
from .state import (
    ModelStateHandler,
    OptimizerStateHandler,
    SamplerStateHandler,
    StateHandler,
    TorchState,
    get_handler_registry,
    set_handler_registry,
)

__all__ = [
    "ElasticSampler",
    "ModelStateHandler",
    "ObjectState",
    "OptimizerStateHandler",
    "SamplerStateHandler",
    "State",
    "StateHandler",
    "TorchState",
    "get_handler_registry",
    "run",
    "set_handler_registry",
]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a training function `func(state, ...)`: after the loss of a rank it is called again, with the state
    of the last commit, in the job that is left; after a change of hosts with its present state."""
    return run_fn(func, rejoin)

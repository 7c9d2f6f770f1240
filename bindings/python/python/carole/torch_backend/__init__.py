"""Carole as a backend of `torch.distributed`.

    import carole.torch_backend
    torch.distributed.init_process_group("carole")

Works under torchrun, carolerun, or any other way in which `init_process_group` finds its store. Tensors are in host
memory. Everything in torch that goes through process groups goes through Carole then: DDP, FSDP, DTensor, pipelines.

Where no launcher of ours gave the ranks a secret, they exchange one through torch's store, which is trusted as far
as that store is. Errors name the rank at fault; after a timeout or the loss of a rank the job is broken, as with
other backends.

On torch before 2.0 process groups written in Python have no `*_coalesced`, all-to-all, gather, scatter or reduce.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .. import _arrays
from . import desync, group, operations, rings, start, work
from .group import CaroleProcessGroup
from .start import ensure_set, join

__all__ = ["CaroleProcessGroup"]


def _create(options: Any, backend_options: Any = None) -> CaroleProcessGroup:
    del backend_options
    ranks = list(options.global_ranks_in_group)
    timeout_s = options.timeout.total_seconds()
    if not ranks:
        join(options.store, options.group_rank, options.group_size, timeout_s)
        ranks = list(range(options.group_size))
    return CaroleProcessGroup(options.store, options.group_rank, ranks, timeout_s, ensure_set(ranks))


def _make_sets_with_all_ranks() -> None:
    """All ranks call `new_group`, but torch calls a backend on the group's members only, and a process set of the
    engine is made by all. So the function that all ranks come through is wrapped."""
    inner = distributed_c10d._new_process_group_helper

    @functools.wraps(inner)
    def helper(group_size, group_rank, global_ranks_in_group, backend, *args, **kwargs):
        ranks = list(global_ranks_in_group or ())
        if ranks and "carole" in str(backend).lower() and dist.is_initialized():
            ensure_set(ranks)
        made = inner(group_size, group_rank, global_ranks_in_group, backend, *args, **kwargs)
        group = made[0] if isinstance(made, tuple) else made
        if isinstance(group, CaroleProcessGroup):
            group.ready()
        return made

    distributed_c10d._new_process_group_helper = helper


def _keep_from_compiler() -> None:
    """torch.compile looks at every Python frame that runs beside a graph, and takes process groups for objects of C++
    without attributes. Our functions are to run as they are."""
    try:
        from torch._C._dynamo import eval_frame

        # Not by torch._dynamo, whose import takes seconds.
        strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
        set_strategy = eval_frame.set_code_exec_strategy
    except (ImportError, AttributeError):
        # An older torch, whose compiler does not look into process groups.
        return

    def skip(code: types.CodeType) -> None:
        set_strategy(code, strategy)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                skip(constant)

    for module in (desync, group, operations, rings, start, work, _arrays):
        for value in vars(module).values():
            members = vars(value).values() if isinstance(value, type) else [value]
            for member in members:
                if isinstance(member, types.FunctionType) and member.__module__ == module.__name__:
                    skip(member.__code__)


def _register() -> None:
    if hasattr(dist.Backend, "CAROLE"):
        return
    _keep_from_compiler()
    try:
        dist.Backend.register_backend("carole", _create, extended_api=True, devices=["cpu", "cuda"])
    except TypeError:
        # Before torch 2.0 a backend serves all devices.
        dist.Backend.register_backend("carole", _create, extended_api=True)
    _make_sets_with_all_ranks()


if not dist.is_available():
    raise ImportError(f"this build of torch ({torch.__version__}) has no torch.distributed")
_register()

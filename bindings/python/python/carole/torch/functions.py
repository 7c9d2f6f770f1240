"""Broadcasts of parameters, optimizer state and any Python objects.

Objects travel pickled over the connections of the job, which are authenticated: unpickling trusts the ranks of
the job and nobody else.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from typing import Any, Dict, List

import torch

from .._errors import UsageError
from .._sets import ProcessSet, global_process_set
from . import ops


def _dumps(value: Any) -> torch.Tensor:
    buffer = io.BytesIO()
    try:
        # Functions and classes of the main script can be sent where cloudpickle is installed.
        import cloudpickle

        cloudpickle.dump(value, buffer)
    except ImportError:
        pickle.dump(value, buffer, protocol=pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _loads(tensor: torch.Tensor) -> Any:
    # Not by tensor.numpy(), which needs NumPy.
    return pickle.loads(ctypes.string_at(tensor.data_ptr(), tensor.numel()))


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str = None, process_set: ProcessSet = global_process_set
) -> Any:
    """The root's object, on every rank (on the root: `obj` itself).

    Args:
        obj: anything that can be pickled; looked at on the root only.
        root_rank: the rank, of the whole job, whose object it is.
        name: a name, the same on all ranks.
        process_set: the ranks that take part.
    """
    from .. import rank

    base = "broadcast_object" if name is None else f"broadcast_object.{name}"
    if rank() == root_rank:
        data = _dumps(obj)
        ops.broadcast_(torch.tensor([data.numel()]), root_rank, f"{base}.sz", process_set)
        ops.broadcast_(data, root_rank, f"{base}.t", process_set)
        return obj
    length = ops.broadcast_(torch.tensor([0]), root_rank, f"{base}.sz", process_set)
    data = torch.empty(int(length.item()), dtype=torch.uint8)
    ops.broadcast_(data, root_rank, f"{base}.t", process_set)
    return _loads(data)


def allgather_object(obj: Any, name: str = None, process_set: ProcessSet = global_process_set) -> List[Any]:
    """All ranks' objects, in rank order, on every rank."""
    base = f"allgather_object.{name}" if name is not None else "allgather_object"
    data = _dumps(obj)
    lengths = ops.synchronize(ops.allgather_async(torch.tensor([data.numel()]), f"{base}.sz", process_set))
    everything = ops.synchronize(ops.allgather_async(data, f"{base}.t", process_set))
    return [_loads(part.contiguous()) for part in everything.split(lengths.tolist())]


def broadcast_parameters(params: Any, root_rank: int) -> None:
    """Gives all ranks the root's parameters, in place: `broadcast_parameters(model.state_dict(), root_rank=0)`.

    Args:
        params: a dict of tensors (`state_dict()`), or (name, tensor) pairs (`named_parameters()`), or a list of
            parameters; the same names in every rank.
        root_rank: whose values they get.
    """
    if isinstance(params, dict):
        pairs = sorted(params.items())
    elif isinstance(params, (list, tuple)) or hasattr(params, "__iter__"):
        pairs = [p if isinstance(p, tuple) else (None, p) for p in params]
    else:
        raise UsageError(f"parameters are a dict or a list, and not {type(params).__name__}")
    waiting = []
    for number, (name, tensor) in enumerate(pairs):
        if tensor is None or not isinstance(tensor, torch.Tensor):
            continue
        target = tensor.data
        dense = target if target.is_contiguous() else target.contiguous()
        label = f"parameters.{number if name is None else name}"
        waiting.append((target, dense, ops.broadcast_async_(dense, root_rank, label)))
    for target, dense, handle in waiting:
        ops.synchronize(handle)
        if dense is not target:
            target.copy_(dense)


class _Slot:
    """Stands for a tensor in the broadcast structure of an optimizer's state."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


def _take_tensors(value: Any, tensors: List[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Slot(value)
    if isinstance(value, dict):
        return {key: _take_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take_tensors(item, tensors) for item in value)
    return value


def _put_tensors(value: Any, tensors: List[torch.Tensor]) -> Any:
    if isinstance(value, _Slot):
        tensors.append(torch.empty(value.shape, dtype=value.dtype))
        return tensors[-1]
    if isinstance(value, dict):
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_put_tensors(item, tensors) for item in value)
    return value


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: Any = None) -> None:
    """Gives all ranks the root's optimizer state: options and all state tensors.

    Only the root's state need exist; no step is taken to make it on the others.

    Args:
        optimizer: the optimizer, wrapped or not, with the same parameters on all ranks.
        root_rank: whose state they get.
        model: accepted for Horovod's sake.
    """
    from .. import rank

    del model
    tensors: List[torch.Tensor] = []
    if rank() == root_rank:
        state: Dict[str, Any] = _take_tensors(optimizer.state_dict(), tensors)
        broadcast_object(state, root_rank, "optimizer")
        tensors = [tensor.detach().contiguous() for tensor in tensors]
    else:
        state = _put_tensors(broadcast_object(None, root_rank, "optimizer"), tensors)
    handles = [ops.broadcast_async_(tensor, root_rank, f"optimizer.{number}") for number, tensor in enumerate(tensors)]
    for handle in handles:
        ops.synchronize(handle)
    if rank() != root_rank:
        optimizer.load_state_dict(state)

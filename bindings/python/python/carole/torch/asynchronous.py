"""The asynchronous collectives on torch tensors, and the handles that they return."""

from __future__ import annotations

import warnings
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch

from .. import _arrays, _native, _timeline
from .._errors import HorovodInternalError, UsageError
from .._native import Handle
from .._sets import ProcessSet, global_process_set, set_id
from .._submit import ALLGATHER, ALLREDUCE, ALLTOALL, BROADCAST, REDUCESCATTER, Average, Sum, checked

# torch's types by the codes that cross the binding; the unsigned ones are missing in older versions of torch.
_CODES = {
    getattr(torch, name): code
    for code, name in enumerate(
        ["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool",
         "bfloat16", "uint32", "uint64", "complex64", "complex128"]
    )
    if hasattr(torch, name)
}  # fmt: skip

_native.learn_torch(
    torch.Tensor, list(_CODES.items()), torch.strided, torch.empty_like, _arrays.to_torch, global_process_set
)
_start = _native.start

# As the timeline calls the collectives, by their codes.
_OPERATIONS = ("ALLREDUCE", "ALLGATHER", "BROADCAST", "REDUCESCATTER", "ALLTOALL", "REDUCE", "GATHER", "SCATTER",
               "BARRIER", "JOIN")  # fmt: skip


def handle_average_backwards_compatibility(op: Optional[int], average: Optional[bool]) -> int:
    """The operation that `op` and the older `average` mean together."""
    if op is not None:
        if average is not None:
            raise ValueError("give either op or average, not both; op is the newer one")
        return op
    if average is None:
        return Average
    warnings.warn("average= is deprecated; use op=Average or op=Sum", DeprecationWarning, stacklevel=3)
    return Average if average else Sum


def poll(handle: Handle) -> bool:
    """Whether `synchronize` would return at once. As in Horovod, a handle that was synchronized is one no more."""
    if checked(handle, "poll").taken:
        raise UsageError(f"{handle} was synchronized already, and poll() takes a handle only as long as it was not")
    return handle.poll()


def synchronize(handle: Handle) -> Any:
    """Waits for an operation and returns its result. A second call returns None."""
    return checked(handle, "synchronize").synchronize()


_watches = False
# Whether somebody looks on, so that the short way into the engine is not taken: a timeline, or the search for writes.
_observed = False


def _observe(*_: Any) -> None:
    global _observed
    _observed = _watches or _timeline.active is not None
    _native.observe(_observed)


_timeline.listeners.append(_observe)


def detect_mutation(enabled: bool = True) -> None:
    """Debugging: `synchronize` raises HorovodInternalError where a tensor was written by torch while it was on its way,
    which makes sums silently wrong. A write to another part of the same storage counts, too. `DistributedOptimizer`
    watches the gradients themselves, whatever they are compressed to: what is written to one on its way would be
    lost."""
    global _watches
    _watches = enabled
    _observe()


def _check_unwritten(watched: Sequence[Tuple[torch.Tensor, int]], name: Optional[str]) -> None:
    for number, (tensor, version) in enumerate(watched):
        writes = tensor._version - version
        if writes:
            of = "" if name is None else f" of '{name}'"
            raise HorovodInternalError(
                f"tensor {number}{of} (shape {tuple(tensor.shape)}, {tensor.dtype}) was written {writes} "
                "times while it was being reduced or sent: its result is not to be trusted; call synchronize() before"
            )


def watch(tensor: torch.Tensor, name: str, now: Callable[[], Any]) -> Optional[Callable[[], None]]:
    """Debugging: what checks, when the operation has ended, that a tensor was not written meanwhile which is on its way
    as something else (compressed, say), and which the result is to replace. `now` gives what is in its place then."""
    if not _watches:
        return None
    version = tensor._version

    def check() -> None:
        if now() is not tensor:
            raise HorovodInternalError(
                f"the tensor of '{name}' (shape {tuple(tensor.shape)}, {tensor.dtype}) was replaced by another while "
                "it was being reduced; call synchronize() before"
            )
        _check_unwritten([(tensor, version)], name)

    return check


def _end_of(
    lane: Optional[int], watched: Sequence[Tuple[torch.Tensor, int]], name: Optional[str]
) -> Callable[[bool], None]:
    """What to do when an operation has ended, with whether it failed."""

    def ended(failed: bool) -> None:
        timeline = _timeline.active
        if timeline is not None and lane is not None:
            timeline.end(lane, failed)
        if not failed:
            _check_unwritten(watched, name)

    return ended


def _note_begin(collective: int, name: Optional[str], inputs: Sequence[Any]) -> Optional[int]:
    timeline = _timeline.active
    if timeline is None:
        return None
    operation = _OPERATIONS[collective]
    dtype = str(inputs[0].dtype).rpartition(".")[2] if inputs else "none"
    shapes = [tuple(tensor.shape) for tensor in inputs]
    return timeline.begin(name or f"{operation.lower()}.noname", operation, dtype, shapes)


def _refusal(tensors: Sequence[Any]) -> Optional[str]:
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            return f"{type(tensor).__name__} is not a torch.Tensor"
        if tensor.layout is not torch.strided:
            return "the tensor is sparse; use sparse_allreduce_async, or to_dense() first"
        if tensor.device.type not in ("cpu", "cuda"):
            return f"the tensor is on {tensor.device}; host memory and CUDA devices are taken: call .cpu() first"
        if tensor.device != tensors[0].device:
            return f"one tensor is on {tensors[0].device}, another on {tensor.device}; a group is on one device"
        if tensor.dtype not in _CODES:
            return f"tensors of type {tensor.dtype} cannot be sent"
        if not tensor.is_contiguous():
            return "the tensor is not contiguous; call .contiguous() first"
        if tensor.is_conj() or tensor.is_neg():
            return "the tensor is a view that is yet to be conjugated; call .resolve_conj().resolve_neg() first"
    return None


def submit(
    collective: int,
    inputs: Sequence[Any],
    outputs: Optional[Callable[[], Sequence[torch.Tensor]]],
    finish: Callable[[Any], Any],
    name: Optional[str],
    process_set: ProcessSet,
    op: int = Sum,
    pre: float = 1.0,
    post: float = 1.0,
    root: int = 0,
    splits: Optional[Sequence[int]] = None,
    refused: Optional[str] = None,
    waits: bool = False,
) -> Handle:
    """`outputs` makes (or names) the tensors for the results once the inputs are found good; None lets the
    engine allocate. `finish` turns the raw outcome into the result; it also keeps the outputs alive."""
    identifier = set_id(process_set)
    refused = refused or _refusal(inputs)
    if refused is not None:
        handle = _native.submit_raw(collective, [], None, name, identifier, op, pre, post, root, splits, refused)
        raise AssertionError(f"a refused call went through: {handle}")
    # An address of 0 would ask the engine to allocate, so an empty tensor's becomes another one.
    outs = list(outputs()) if outputs is not None else []
    where = [out.data_ptr() or 64 for out in outs] if outputs is not None else [0] * len(inputs)
    tensors = [
        (tensor.data_ptr(), out, _CODES[tensor.dtype], tuple(tensor.shape)) for tensor, out in zip(inputs, where)
    ]
    ended = None
    if _observed:
        watched = [(tensor, tensor._version) for tensor in inputs] if _watches else []
        ended = _end_of(_note_begin(collective, name, inputs), watched, name)
    return _native.submit_raw(
        collective, tensors, (inputs, outs), name, identifier, op, pre, post, root, splits, None, waits, finish, ended,
        _arrays.cuda_streams(inputs),
    )


def _named(operation: str, name: Optional[str]) -> Optional[str]:
    return None if name is None else f"{operation}.{name}"


def _tensors(outcome: Any) -> List[torch.Tensor]:
    return [_arrays.to_torch(output) for output in outcome[0]]


def _as_list(tensors: Any) -> Tuple[List[Any], Optional[str]]:
    if not isinstance(tensors, (list, tuple)) or not tensors:
        return [], "a grouped operation takes a list of at least one tensor"
    return list(tensors), None


def start_allreduce(tensor: Any, in_place: bool, name: Optional[str], op: int, pre: float, post: float,
                    process_set: ProcessSet, waits: bool = False) -> Handle:  # fmt: skip
    """Starts an allreduce of one tensor, in place or into a new one."""
    handle = _start(ALLREDUCE, tensor, in_place, "allreduce", name, process_set, op, pre, post, 0, waits)
    if handle is not None:
        return handle
    made: List[torch.Tensor] = []

    def outputs() -> List[torch.Tensor]:
        made.append(tensor if in_place else torch.empty_like(tensor))
        return made

    return submit(
        ALLREDUCE, [tensor], outputs, lambda _: made[0], _named("allreduce", name), process_set, op, pre, post,
        waits=waits,
    )  # fmt: skip


def allreduce_async(tensor, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
                    process_set=global_process_set) -> Handle:  # fmt: skip
    """Starts an allreduce of `tensor` into a new tensor."""
    if op is None or average is not None:
        op = handle_average_backwards_compatibility(op, average)
    return start_allreduce(_detached(tensor), False, name, op, prescale_factor, postscale_factor, process_set)


def allreduce_async_(tensor, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
                     process_set=global_process_set) -> Handle:  # fmt: skip
    """Starts an allreduce of `tensor` in place."""
    if op is None or average is not None:
        op = handle_average_backwards_compatibility(op, average)
    note_write(tensor)
    # The same again as start_allreduce, without a call more: training submits hundreds of tensors a step.
    handle = _start(
        ALLREDUCE, tensor, True, "allreduce", name, process_set, op, prescale_factor, postscale_factor, 0, False
    )
    if handle is not None:
        return handle
    return start_allreduce(tensor, True, name, op, prescale_factor, postscale_factor, process_set)


_increment_version = getattr(torch.autograd.graph, "increment_version", None)


def note_write(tensor: Any) -> None:
    """Tells autograd that a tensor which it may have saved is written, so that a backward pass that needs the former
    values fails instead of being wrong."""
    if getattr(tensor, "requires_grad", False) and not tensor.is_leaf and _increment_version is not None:
        _increment_version(tensor)


def _detached(tensor: Any) -> Any:
    # Only where the graph would otherwise be recorded; the call costs as much as the whole submit.
    return tensor.detach() if isinstance(tensor, torch.Tensor) and tensor.requires_grad else tensor


def start_grouped_allreduce(tensors: Any, in_place: bool, name: Optional[str], op: int, pre: float, post: float,
                       process_set: ProcessSet) -> Handle:  # fmt: skip
    tensors, refused = _as_list(tensors)
    if in_place:
        for tensor in tensors:
            note_write(tensor)
    else:
        tensors = [_detached(tensor) for tensor in tensors]
    if refused is None:
        handle = _start(ALLREDUCE, tensors, in_place, "grouped_allreduce", name, process_set, op, pre, post, 0, False)
        if handle is not None:
            return handle
    made: List[torch.Tensor] = []

    def outputs() -> List[torch.Tensor]:
        made.extend(tensors if in_place else [torch.empty_like(tensor) for tensor in tensors])
        return made

    return submit(
        ALLREDUCE, tensors, outputs, lambda _: made, _named("grouped_allreduce", name), process_set, op, pre,
        post, refused=refused,
    )  # fmt: skip


def grouped_allreduce_async(tensors, average=None, name=None, op=None, prescale_factor=1.0,
                            postscale_factor=1.0, process_set=global_process_set) -> Handle:  # fmt: skip
    """Starts an allreduce of several tensors as one operation, into new tensors."""
    op = handle_average_backwards_compatibility(op, average)
    return start_grouped_allreduce(tensors, False, name, op, prescale_factor, postscale_factor, process_set)


def grouped_allreduce_async_(tensors, average=None, name=None, op=None, prescale_factor=1.0,
                             postscale_factor=1.0, process_set=global_process_set) -> Handle:  # fmt: skip
    """Starts an allreduce of several tensors as one operation, in place."""
    op = handle_average_backwards_compatibility(op, average)
    return start_grouped_allreduce(tensors, True, name, op, prescale_factor, postscale_factor, process_set)


def sparse_allreduce_async(tensor, name, op, process_set=global_process_set) -> Callable[[], torch.Tensor]:
    """Starts an allreduce of a sparse COO tensor; the function returned waits and gives the sparse result.

    Average and Sum only. Indices and values of all ranks are gathered; equal indices add up.
    """
    if op not in (Average, Sum):
        raise ValueError("sparse tensors can be averaged or summed only")
    tensor = tensor.coalesce()
    # Gathered along the first dimension: one row per value.
    indices = allgather_async(tensor._indices().t().contiguous(), f"{name}.indices", process_set)
    values = allgather_async(tensor._values().contiguous(), f"{name}.values", process_set)

    def finish() -> torch.Tensor:
        all_values, all_indices = synchronize(values), synchronize(indices)
        if op == Average:
            all_values = all_values / process_set.size()
        return torch.sparse_coo_tensor(all_indices.t(), all_values, tensor.size()).coalesce()

    return finish


def start_allgather(tensor: Any, name: Optional[str], process_set: ProcessSet, waits: bool = False) -> Handle:
    """Starts an allgather of one tensor."""
    tensor = _detached(tensor)
    handle = _start(ALLGATHER, tensor, None, "allgather", name, process_set, Sum, 1.0, 1.0, 0, waits)
    if handle is not None:
        return handle
    return submit(
        ALLGATHER, [tensor], None, lambda outcome: _tensors(outcome)[0],
        _named("allgather", name), process_set, waits=waits,
    )  # fmt: skip


def allgather_async(tensor, name=None, process_set=global_process_set) -> Handle:
    """Starts an allgather."""
    return start_allgather(tensor, name, process_set)


def grouped_allgather_async(tensors, name=None, process_set=global_process_set) -> Handle:
    """Starts an allgather of several tensors as one operation."""
    tensors, refused = _as_list(tensors)
    return submit(
        ALLGATHER, [_detached(tensor) for tensor in tensors], None, _tensors,
        _named("grouped_allgather", name), process_set, refused=refused,
    )  # fmt: skip


def start_broadcast(tensor: Any, in_place: bool, root_rank: int, name: Optional[str], process_set: ProcessSet,
                    waits: bool = False) -> Handle:  # fmt: skip
    """Starts a broadcast of one tensor, in place or into a new one."""
    handle = _start(BROADCAST, tensor, in_place, "broadcast", name, process_set, Sum, 1.0, 1.0, root_rank, waits)
    if handle is not None:
        return handle
    made: List[torch.Tensor] = []

    def outputs() -> List[torch.Tensor]:
        made.append(tensor if in_place else torch.empty_like(tensor))
        return made

    return submit(
        BROADCAST, [tensor], outputs, lambda _: made[0], _named("broadcast", name), process_set,
        root=root_rank, waits=waits,
    )  # fmt: skip


def broadcast_async(tensor, root_rank, name=None, process_set=global_process_set) -> Handle:
    """Starts a broadcast into a new tensor."""
    return start_broadcast(_detached(tensor), False, root_rank, name, process_set)


def broadcast_async_(tensor, root_rank, name=None, process_set=global_process_set) -> Handle:
    """Starts a broadcast in place."""
    note_write(tensor)
    return start_broadcast(tensor, True, root_rank, name, process_set)


def start_alltoall(tensor: Any, splits: Any, name: Optional[str], process_set: ProcessSet,
              with_splits: bool, waits: bool = False) -> Handle:  # fmt: skip
    """Starts an alltoall of one tensor; with `with_splits` the result has the received splits beside it."""
    tensor = _detached(tensor)
    if splits is None and not with_splits:
        handle = _start(ALLTOALL, tensor, None, "alltoall", name, process_set, Sum, 1.0, 1.0, 0, waits)
        if handle is not None:
            return handle
    refused = None
    if isinstance(splits, torch.Tensor):
        if splits.dim() != 1 or splits.dtype.is_floating_point:
            refused = "splits is a list or a one-dimensional tensor of whole numbers"
        splits = splits.tolist()

    def finish(outcome: Any) -> Any:
        output = _tensors(outcome)[0]
        return (output, torch.tensor(outcome[1], dtype=torch.int32)) if with_splits else output

    return submit(
        ALLTOALL, [tensor], None, finish, _named("alltoall", name), process_set, splits=splits,
        refused=refused, waits=waits,
    )  # fmt: skip


def alltoall_async(tensor, splits=None, name=None, process_set=global_process_set) -> Handle:
    """Starts an alltoall."""
    return start_alltoall(tensor, splits, name, process_set, splits is not None)


def _reducescatter(tensors: List[Any], single: bool, name: Optional[str], op: int, pre: float, post: float,
                   process_set: ProcessSet, refused: Optional[str], waits: bool = False) -> Handle:  # fmt: skip
    tensors = [_detached(tensor) for tensor in tensors]
    if op not in (Average, Sum):
        refused = refused or "a reducescatter of torch tensors takes op=Average or op=Sum"
    # The engine's memory for results is used again, where a new tensor would cost a page fault for every page.
    return submit(
        REDUCESCATTER, tensors, None,
        lambda outcome: _tensors(outcome)[0] if single else _tensors(outcome), name, process_set, op, pre, post,
        refused=refused, waits=waits,
    )  # fmt: skip


def start_reducescatter(tensor: Any, name: Optional[str], op: int, pre: float, post: float, process_set: ProcessSet,
                        waits: bool = False) -> Handle:  # fmt: skip
    """Starts a reducescatter of one tensor."""
    tensor = _detached(tensor)
    if op in (Average, Sum):
        handle = _start(REDUCESCATTER, tensor, None, "reducescatter", name, process_set, op, pre, post, 0, waits)
        if handle is not None:
            return handle
    name = _named("reducescatter", name)
    return _reducescatter([tensor], True, name, op, pre, post, process_set, None, waits)


def reducescatter_async(tensor, name=None, op=Average, process_set=global_process_set, prescale_factor=1.0,
                        postscale_factor=1.0) -> Handle:  # fmt: skip
    """Starts a reducescatter."""
    return start_reducescatter(tensor, name, op, prescale_factor, postscale_factor, process_set)


def grouped_reducescatter_async(tensors, name=None, op=Average, process_set=global_process_set,
                                prescale_factor=1.0, postscale_factor=1.0) -> Handle:  # fmt: skip
    """Starts a reducescatter of several tensors as one operation."""
    tensors, refused = _as_list(tensors)
    name = _named("grouped_reducescatter", name)
    return _reducescatter(tensors, False, name, op, prescale_factor, postscale_factor, process_set, refused)

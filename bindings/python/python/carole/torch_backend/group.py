"""The process group: c10d's collectives and messages on one process set of the engine."""

from __future__ import annotations

import math
import zlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist

from .. import _arrays, _life, _native
from .._errors import BrokenError, TimeoutError, UsageError
from .._submit import (
    ALLGATHER, ALLREDUCE, ALLTOALL, BARRIER, BROADCAST, GATHER, REDUCE, REDUCESCATTER, SCATTER, Sum,
)  # fmt: skip
from ..torch.asynchronous import _CODES
from .operations import BIT_XOR, bit_xor, check_bits, operation
from .rings import Ring, Rings
from .work import AnySourceWork, CaroleWork, CoalescedWork, DoneWork

# Messages of our own have tags above the users'.
_TAG_BITS = 20

_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, whose bytes are its values one behind the other."""
    return tensor if _is_plain(tensor) else tensor.contiguous().resolve_conj().resolve_neg()


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _overlap(part: torch.Tensor, whole: torch.Tensor) -> bool:
    part_end, whole_end = (one.data_ptr() + one.numel() * one.element_size() for one in (part, whole))
    return part.data_ptr() < whole_end and whole.data_ptr() < part_end


def _asynchronous(options: Any) -> bool:
    return bool(getattr(options, "asyncOp", True))


# Where tensors may lie.
_DEVICES = ("cpu", "cuda")


class CaroleProcessGroup(dist.ProcessGroup):
    """A process group whose operations the engine carries out."""

    def __init__(self, store: Any, rank: int, ranks: List[int], timeout_s: float, number: int) -> None:
        super().__init__(rank, len(ranks))
        self._store = store
        self._rank, self._ranks, self._size = rank, ranks, len(ranks)
        self._timeout_s = timeout_s
        self._set = number
        # Members of a set are in the order of their ranks; a group may have them in another.
        self._ascending = sorted(ranks) == ranks
        # While torch sets the group up, it takes a group with devices for one of C++ and asks for its parts.
        self._devices: List[torch.device] = []
        self._name = ""
        self._desc = ""
        self._rings = Rings(store, rank, ranks)

    def ready(self) -> None:
        """Torch has set the group up."""
        self._devices = [torch.device(kind) for kind in _DEVICES]

    # What torch asks about the group itself.

    def getBackendName(self) -> str:
        return "carole"

    def _get_backend_name(self) -> str:
        return "carole"

    def name(self) -> str:
        return "carole"

    def _get_backend(self, device: Any) -> "CaroleProcessGroup":
        del device
        return self

    def _set_group_name(self, name: str) -> None:
        self._name = name
        self._rings.group = name

    setGroupName = _set_group_name

    def getGroupName(self) -> str:
        return self._name

    group_name = property(lambda self: self._name)

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    group_desc = property(lambda self: self._desc)
    bound_device_id = property(lambda self: None)
    _device_types = property(lambda self: self._devices)
    supports_coalescing = property(lambda self: False)
    supports_splitting = property(lambda self: False)
    supports_shrinking = property(lambda self: False)
    supports_time_estimate = property(lambda self: False)
    supports_reconfigure = property(lambda self: False)
    supports_window = property(lambda self: False)

    def get_group_store(self) -> Any:
        return self._store

    def _set_sequence_number_for_group(self) -> None:
        pass

    def _get_sequence_number_for_group(self) -> int:
        return self._rings.begun()

    def set_timeout(self, timeout: Any) -> None:
        self._timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """Leaves the job where this is the default group; others end with it."""
        if self._set == 0 and self._name in ("", "0", "default_pg") and _native.is_initialized():
            _life.shutdown()

    abort = shutdown

    # The way to the engine.

    def _start(
        self,
        collective: int,
        tensors: Sequence[Tuple[int, int, int, Sequence[int]]],
        keep: Any,
        outputs: List[torch.Tensor],
        finish: Optional[Callable[[Any], None]] = None,
        op: int = Sum,
        pre: float = 1.0,
        root: int = 0,
        splits: Optional[Sequence[int]] = None,
        options: Any = None,
        size: int = 0,
        place: Optional[Tuple[Ring, int]] = None,
    ) -> CaroleWork:
        ring, number = place or self._rings.next(collective, _DTYPES[tensors[0][2]] if tensors else None, size)
        handle = _native.submit_raw(
            collective, tensors, keep, ring.names[number], self._set, op, pre, 1.0, self._ranks[root], splits, None,
            not _asynchronous(options), streams=_arrays.cuda_streams(keep),
        )  # fmt: skip
        return self._work(ring, number, handle, outputs, finish, keep)

    def _work(self, ring: Ring, number: int, handle: Any, outputs: List[torch.Tensor],
              finish: Optional[Callable[[Any], None]], keep: Any) -> CaroleWork:  # fmt: skip
        work = CaroleWork(
            handle, outputs, finish, self._timeout_s, keep, stuck=lambda: self._rings.explain(ring, number)
        )
        ring.works[number] = work
        return work

    def _short(self, tensors: List[torch.Tensor], op: int, pre: float, options: Any,
               place: Tuple[Ring, int]) -> Optional[CaroleWork]:  # fmt: skip
        """An allreduce in place of one tensor that is as the engine wants it; None where it is not."""
        ring, number = place
        handle = _native.start(
            ALLREDUCE, tensors[0], True, "", ring.names[number], self._set, op, pre, 1.0, 0,
            not _asynchronous(options),
        )  # fmt: skip
        return None if handle is None else self._work(ring, number, handle, tensors, None, None)

    def _code(self, tensor: torch.Tensor) -> int:
        code = _CODES.get(tensor.dtype)
        if code is None or tensor.layout is not torch.strided or tensor.device.type not in _DEVICES:
            raise UsageError(
                f"a tensor of type {tensor.dtype}, layout {tensor.layout} on {tensor.device} cannot be sent; this "
                "build moves dense tensors in host memory and on CUDA devices"
            )
        return code

    def _reduced(self, collective: int, tensors: List[torch.Tensor], options: Any, root: int = 0) -> Any:
        op, pre = operation(options)
        if op == BIT_XOR:
            return self._xored(tensors, collective == ALLREDUCE or self._rank == root, options)
        if self._size == 1:
            for tensor in tensors if pre != 1.0 else ():
                tensor.mul_(pre)
            return DoneWork(tensors)
        size = tensors[0].numel() if len(tensors) == 1 else -2
        place = self._rings.next(collective, tensors[0].dtype, size)
        if collective == ALLREDUCE and size >= 0:
            work = self._short(tensors, op, pre, options, place)
            if work is not None:
                return work
        copies = [_plain(tensor) for tensor in tensors]
        takes = collective == ALLREDUCE or self._rank == root
        arguments = [
            (copy.data_ptr(), (copy.data_ptr() or 64) if takes else 0, self._code(copy), tuple(copy.shape))
            for copy in copies
        ]
        finish = None
        if any(copy is not tensor for copy, tensor in zip(copies, tensors)):

            def finish(_: Any) -> None:
                for copy, tensor in zip(copies, tensors):
                    if copy is not tensor and takes:
                        tensor.copy_(copy)

        return self._start(
            collective, arguments, copies, tensors, finish, op, pre, root, None, options, size, place
        )  # fmt: skip

    def _xored(self, tensors: List[torch.Tensor], takes: bool, options: Any) -> Any:
        """The reduction BXOR, on every rank that takes it."""
        check_bits(tensors)

        def place(number: int, rows: torch.Tensor) -> None:
            if takes:
                tensors[number].copy_(bit_xor(rows).reshape(tensors[number].shape))

        return self._gathered(tensors, place, tensors, options)

    def _xor_scattered(self, output: torch.Tensor, tensor: torch.Tensor, options: Any) -> Any:
        check_bits([tensor])

        def place(received: torch.Tensor) -> None:
            output.copy_(bit_xor(received.reshape(self._size, -1)).reshape(output.shape))

        parts = _plain(tensor.detach()).reshape(self._size, -1).unbind()
        return self._exchange(list(parts), place, [output], options)

    # The collectives.

    def allreduce(self, tensors: List[torch.Tensor], opts: Any = None) -> Any:
        return self._reduced(ALLREDUCE, tensors, opts)

    def allreduce_coalesced(self, tensors: List[torch.Tensor], opts: Any = None) -> Any:
        return self._reduced(ALLREDUCE, tensors, opts)

    def reduce(self, tensors: List[torch.Tensor], opts: Any = None) -> Any:
        return self._reduced(REDUCE, tensors, opts, opts.rootRank)

    def broadcast(self, tensors: List[torch.Tensor], opts: Any = None) -> Any:
        root = opts.rootRank
        if self._size == 1:
            return DoneWork(tensors)
        works = []
        for tensor in tensors:
            copy = _plain(tensor)
            finish = None if copy is tensor else (lambda _, tensor=tensor, copy=copy: tensor.copy_(copy))
            pointer = copy.data_ptr()
            arguments = [(pointer, pointer or 64, self._code(copy), tuple(copy.shape))]
            works.append(
                self._start(BROADCAST, arguments, copy, [tensor], finish, root=root, options=opts, size=copy.numel())
            )
        return works[0] if len(works) == 1 else CoalescedWork(works, tensors)

    def barrier(self, opts: Any = None) -> Any:
        if self._size == 1:
            return DoneWork([])
        return self._start(BARRIER, [], None, [], options=opts)

    def _gathered(self, inputs: List[torch.Tensor], place: Callable[[int, torch.Tensor], None],
                  outputs: List[Any], options: Any) -> Any:  # fmt: skip
        """Gathers all ranks' `inputs`; `place(i, rows)` gets one flat row per rank, in the order of the group."""
        flat = [_plain(tensor.detach()).reshape(1, -1) for tensor in inputs]
        arguments = [(one.data_ptr(), 0, self._code(one), tuple(one.shape)) for one in flat]

        def finish(outcome: Any) -> None:
            with torch.no_grad():
                for number, output in enumerate(outcome[0]):
                    place(number, self._ordered(_arrays.to_torch(output)))

        if self._size == 1:
            with torch.no_grad():
                for number, one in enumerate(flat):
                    place(number, one)
            return DoneWork(outputs)
        size = flat[0].numel() if len(flat) == 1 else -2
        return self._start(ALLGATHER, arguments, flat, outputs, finish, options=options, size=size)

    def _ordered(self, rows: torch.Tensor) -> torch.Tensor:
        if self._ascending:
            return rows
        ordered = sorted(self._ranks)
        return rows[[ordered.index(rank) for rank in self._ranks]]

    def allgather(self, outputs: List[List[torch.Tensor]], inputs: List[torch.Tensor], opts: Any = None) -> Any:
        def place(number: int, rows: torch.Tensor) -> None:
            for target, row in zip(outputs[number], rows):
                target.copy_(row.reshape(target.shape))

        return self._gathered(inputs, place, outputs, opts)

    def allgather_coalesced(self, outputs: List[List[torch.Tensor]], inputs: List[torch.Tensor],
                            opts: Any = None) -> Any:  # fmt: skip
        def place(number: int, rows: torch.Tensor) -> None:
            for target, row in zip(outputs, rows):
                target[number].copy_(row.reshape(target[number].shape))

        return self._gathered(inputs, place, outputs, opts)

    def all_gather_single_coalesced(self, outputs: List[torch.Tensor], inputs: List[torch.Tensor],
                                    opts: Any = None) -> Any:  # fmt: skip
        def place(number: int, rows: torch.Tensor) -> None:
            outputs[number].copy_(rows.reshape(outputs[number].shape))

        return self._gathered(inputs, place, outputs, opts)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Any:
        return self.all_gather_single_coalesced([output], [tensor], opts)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(self, outputs: List[torch.Tensor], inputs: List[List[torch.Tensor]], opts: Any = None) -> Any:
        works = []
        for output, parts in zip(outputs, inputs):
            if any(part.numel() != output.numel() for part in parts):
                works.append(self._uneven_reduce_scatter(output, parts, opts))
                continue
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            works.append(self.reduce_scatter_single(output, flat, opts))
        return works[0] if len(works) == 1 else CoalescedWork(works, outputs)

    def _uneven_reduce_scatter(self, output: torch.Tensor, parts: List[torch.Tensor], options: Any) -> Any:
        # All are copied before the output is written, which may be a part of the input.
        copies = [part.detach().clone() for part in parts]
        mine = output.detach()
        mine.copy_(copies[self._rank].reshape(output.shape))
        copies[self._rank] = mine
        works = [self._reduced(REDUCE, [copy], options, root) for root, copy in enumerate(copies)]
        return CoalescedWork(works, [output])

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs: List[torch.Tensor], inputs: List[torch.Tensor],
                                        opts: Any = None) -> Any:  # fmt: skip
        op, pre = operation(opts)
        if op == BIT_XOR:
            works = [self._xor_scattered(output, tensor, opts) for output, tensor in zip(outputs, inputs)]
            return works[0] if len(works) == 1 else CoalescedWork(works, outputs)
        if self._size == 1:
            with torch.no_grad():
                for output, tensor in zip(outputs, inputs):
                    output.copy_(tensor.reshape(output.shape)).mul_(pre) if pre != 1.0 else output.copy_(
                        tensor.reshape(output.shape)
                    )
            return DoneWork(outputs)
        rows = [self._by_rank(_plain(tensor.detach()).reshape(self._size, -1)) for tensor in inputs]
        # DeepSpeed's ZeRO 3 reduces into a part of the input.
        made = [
            one if _is_plain(one) and not _overlap(one, row)
            else torch.empty_like(one, memory_format=torch.contiguous_format)
            for one, row in zip(outputs, rows)
        ]  # fmt: skip
        arguments = [
            (row.data_ptr(), one.data_ptr() or 64, self._code(row), tuple(row.shape)) for row, one in zip(rows, made)
        ]
        finish = None
        if any(one is not output for one, output in zip(made, outputs)):

            def finish(_: Any) -> None:
                for one, output in zip(made, outputs):
                    if one is not output:
                        output.copy_(one)

        size = rows[0].numel() if len(rows) == 1 else -2
        return self._start(
            REDUCESCATTER, arguments, (rows, made), outputs, finish, op, pre, options=opts, size=size
        )  # fmt: skip

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _by_rank(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows in the order of the set, from rows in the order of the group."""
        if self._ascending:
            return rows
        return rows[[self._ranks.index(rank) for rank in sorted(self._ranks)]]

    def gather(self, outputs: List[List[torch.Tensor]], inputs: List[torch.Tensor], opts: Any = None) -> Any:
        row = _plain(inputs[0].detach()).reshape(1, -1)
        if self._size == 1:
            outputs[0][0].copy_(inputs[0])
            return DoneWork(outputs[0])

        def finish(outcome: Any) -> None:
            if self._rank != opts.rootRank:
                return
            with torch.no_grad():
                for target, one in zip(outputs[0], self._ordered(_arrays.to_torch(outcome[0][0]))):
                    target.copy_(one.reshape(target.shape))

        arguments = [(row.data_ptr(), 0, self._code(row), tuple(row.shape))]
        return self._start(
            GATHER, arguments, row, outputs, finish, root=opts.rootRank, options=opts, size=row.numel()
        )  # fmt: skip

    def scatter(self, outputs: List[torch.Tensor], inputs: List[List[torch.Tensor]], opts: Any = None) -> Any:
        output = outputs[0]
        if self._size == 1:
            output.copy_(inputs[0][0])
            return DoneWork(outputs)
        rows = None
        if self._rank == opts.rootRank:
            rows = self._by_rank(torch.stack([one.detach().reshape(-1) for one in inputs[0]]))
        made = output if _is_plain(output) else torch.empty_like(output, memory_format=torch.contiguous_format)
        finish = None if made is output else (lambda _: output.copy_(made))
        pointer = rows.data_ptr() if rows is not None else 0
        arguments = [(pointer, made.data_ptr() or 64, self._code(made), (self._size, made.numel()))]
        return self._start(
            SCATTER, arguments, (rows, made), outputs, finish, root=opts.rootRank, options=opts, size=made.numel()
        )  # fmt: skip

    def all_to_all_single(self, output: torch.Tensor, tensor: torch.Tensor, output_splits: Sequence[int],
                          input_splits: Sequence[int], opts: Any = None) -> Any:  # fmt: skip
        del output_splits
        rows = _plain(tensor.detach())
        rows = rows.reshape(rows.shape[0] if rows.dim() else 1, math.prod(rows.shape[1:]))
        splits = list(input_splits) or [rows.shape[0] // self._size] * self._size
        parts = list(rows.split(splits))
        return self._exchange(parts, lambda received: output.copy_(received.reshape(output.shape)), [output], opts)

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: List[torch.Tensor], inputs: List[torch.Tensor], opts: Any = None) -> Any:
        def place(received: torch.Tensor) -> None:
            for target, part in zip(outputs, received.reshape(-1).split([one.numel() for one in outputs])):
                target.copy_(part.reshape(target.shape))

        return self._exchange([one.detach().reshape(-1, 1) for one in inputs], place, outputs, opts)

    def _exchange(self, parts: List[torch.Tensor], place: Callable[[torch.Tensor], Any],
                  outputs: List[torch.Tensor], options: Any) -> Any:  # fmt: skip
        """Sends part i to the group's rank i; `place` gets what came, in the order of the group."""
        if self._size == 1:
            with torch.no_grad():
                place(parts[0])
            return DoneWork(outputs)
        ordered = sorted(self._ranks)
        sent = [parts[self._ranks.index(rank)] for rank in ordered]
        rows = torch.cat(sent).contiguous()
        splits = [len(part) for part in sent]

        def finish(outcome: Any) -> None:
            received = _arrays.to_torch(outcome[0][0])
            if not self._ascending:
                pieces = received.split(list(outcome[1]))
                received = torch.cat([pieces[ordered.index(rank)] for rank in self._ranks])
            with torch.no_grad():
                place(received)

        arguments = [(rows.data_ptr() or 64, 0, self._code(rows), tuple(rows.shape))]
        return self._start(ALLTOALL, arguments, rows, outputs, finish, splits=splits, options=options)

    # Messages between two ranks.

    def _message(self, sending: bool, tensors: List[torch.Tensor], peer: Optional[int], tag: int) -> Any:
        """`peer` is None to receive from any rank."""
        if not 0 <= tag < 1 << _TAG_BITS:
            raise UsageError(f"tag={tag} is not from 0 to {(1 << _TAG_BITS) - 1}")
        (tensor,) = tensors
        copy = _plain(tensor.detach())
        finish = None
        if not sending and copy.data_ptr() != tensor.data_ptr():

            def finish(_: Any) -> None:
                tensor.copy_(copy)

        self._code(copy)
        # As bytes: the two sides need not agree on a shape, and every type travels so.
        memory = copy.reshape(-1).view(torch.uint8) if copy.numel() else torch.empty(0, dtype=torch.uint8)
        whom = None if peer is None else self._ranks[peer]
        where = (whom, self._channel() | tag, self._set)
        streams = _arrays.cuda_streams(memory)
        if streams is None:
            handle = _native.transfer(sending, memory, *where)
        else:
            handle = _native.transfer_raw(sending, memory.data_ptr(), memory.numel(), memory, *where, streams)
        words = f"the {'send to' if sending else 'receive from'} {'any rank' if whom is None else f'rank {whom}'}"
        if peer is None:
            return AnySourceWork(
                handle, tensors, finish, self._timeout_s, (memory, copy), message=words, group_rank=self._ranks.index
            )
        source = -1 if sending else peer
        return CaroleWork(handle, tensors, finish, self._timeout_s, (memory, copy), source, message=words)

    def _channel(self) -> int:
        """Keeps the messages of groups of the same ranks apart."""
        return (zlib.crc32(self._name.encode()) & 0x7FF) << _TAG_BITS

    def send(self, tensors: List[torch.Tensor], peer: int, tag: int = 0) -> Any:
        return self._message(True, tensors, peer, tag)

    def recv(self, tensors: List[torch.Tensor], peer: int, tag: int = 0) -> Any:
        return self._message(False, tensors, peer, tag)

    def recv_anysource(self, tensors: List[torch.Tensor], tag: int = 0) -> Any:
        return self._message(False, tensors, None, tag)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """A barrier that says which ranks did not come: an error on rank 0 first, and on the others after it."""
        seconds = timeout.total_seconds() if timeout is not None else self._timeout_s
        here = torch.zeros(1, dtype=torch.uint8)
        tag = self._channel() | 1 << 31
        if self._rank != 0:
            _native.transfer(True, here, self._ranks[0], tag, self._set).wait(seconds)
            try:
                _native.transfer(False, here, self._ranks[0], tag, self._set).wait(seconds * 2)
            except TimeoutError:
                raise BrokenError(f"monitored_barrier: rank 0 gave no answer within {seconds * 2} s") from None
            return
        missing = []
        for peer in range(1, self._size):
            try:
                _native.transfer(False, here.clone(), self._ranks[peer], tag, self._set).wait(seconds)
            except TimeoutError:
                missing.append(self._ranks[peer])
                if not wait_all_ranks:
                    break
        if missing:
            words = ", ".join(str(rank) for rank in missing)
            raise BrokenError(f"monitored_barrier: rank {words} did not come within {seconds} s")
        for peer in range(1, self._size):
            _native.transfer(True, here, self._ranks[peer], tag, self._set).wait(seconds)

"""The gradients of one optimizer on their way through the ranks."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch

from .. import _life
from .._errors import Error
from .._sets import ProcessSet
from . import buckets, ops
from .asynchronous import watch
from .buckets import Bucket
from .compression import exchanging
from .ops import Average, Max

# How a gradient is laid out; ranks agree on the largest, so a rank without a gradient learns what others have.
_DENSE, _SPARSE = 1, 2
_all: "weakref.WeakSet[Reducer]" = weakref.WeakSet()


class Group:
    """Parameters that are reduced as one operation."""

    def __init__(self, number: int, parameters: List[torch.Tensor]) -> None:
        self.number = number
        self.parameters = parameters
        self.ready = 0


class Reducer:
    """Submits gradients as they are computed, and puts the results in their place."""

    def __init__(self, base, named, compression, backward_passes_per_step, op, gradient_predivide_factor, groups,
                 sparse_as_dense, process_set, as_views=False) -> None:  # fmt: skip
        # The class whose methods the wrapper extends.
        self.base = base
        self.names: Dict[torch.Tensor, str] = {parameter: name for name, parameter in named}
        self.compression = compression
        self.exchanging = exchanging(compression)
        self.backward_passes_per_step = backward_passes_per_step
        self.op = op
        # Average divides by the size in any case; the rest of the division is split around the sum.
        self.pre, self.post = 1.0, 1.0
        if op == Average:
            self.pre, self.post = 1.0 / gradient_predivide_factor, gradient_predivide_factor
        self.sparse_as_dense = sparse_as_dense
        self.process_set: ProcessSet = process_set
        self.lists = groups
        self.groups: Dict[torch.Tensor, Union[Group, Bucket]] = {}
        for number, members in enumerate(groups or []):
            group = Group(number, members)
            self.groups.update((parameter, group) for parameter in members)
        # Whether gradients are views of flat regions, and those regions.
        self.as_views = as_views
        self.buckets: List[Bucket] = []
        self.active = False
        # The optimizer's parameters, and those of them whose gradients are reduced.
        self.all: List[torch.Tensor] = []
        self.trained: List[torch.Tensor] = []
        self.passes_left: Dict[torch.Tensor, int] = {}
        # For each parameter submitted: a function that waits and puts the result into its gradient.
        self.waiting: Dict[torch.Tensor, Callable[[], None]] = {}
        self.layouts: Optional[Dict[torch.Tensor, int]] = None
        self.synchronized = False
        self.should_synchronize = True
        self.keep: List[Any] = []
        _all.add(self)

    def options(self) -> Dict[str, Any]:
        """What `DistributedOptimizer` makes another one like this from."""
        return {
            "named_parameters": [(name, parameter) for parameter, name in self.names.items()],
            "compression": self.exchanging or self.compression,
            "backward_passes_per_step": self.backward_passes_per_step,
            "op": self.op,
            "gradient_predivide_factor": self.post,
            "groups": self.lists,
            "sparse_as_dense": self.sparse_as_dense,
            "process_set": self.process_set,
            "gradient_as_bucket_view": self.as_views,
        }

    def hook(self, parameters: Sequence[torch.Tensor]) -> None:
        """Begins to reduce the gradients of these parameters."""
        self.active = True
        self.layouts = None
        # The parameter holds its hook, and must not hold the optimizer with it.
        me = weakref.ref(self)
        known = set(self.all)
        self.all += [one for one in parameters if one not in known]
        new = [one for one in parameters if one.requires_grad and one not in self.passes_left]
        if self.as_views:
            self.make_buckets(new)
        for parameter in new:
            self.trained.append(parameter)
            self.passes_left[parameter] = self.backward_passes_per_step
            # The node that accumulates the gradient, found through a view, and kept, since only the graph would.
            with torch.enable_grad():
                node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
            self.keep.append(node)
            # The first hook runs before the gradient changes, which may be on its way to the other ranks.
            if hasattr(parameter, "register_post_accumulate_grad_hook"):
                node.register_prehook(lambda _, parameter=weakref.ref(parameter): _expected(me, parameter()))
                parameter.register_post_accumulate_grad_hook(lambda arrived: _arrived(me, arrived))
            else:
                # Before torch 2.1. This one runs for `torch.autograd.grad`, too, which accumulates nothing.
                parameter.register_hook(lambda _, parameter=weakref.ref(parameter): _expected(me, parameter()))
                node.register_hook(lambda *_, parameter=parameter: _arrived(me, parameter))

    def make_buckets(self, parameters: Sequence[torch.Tensor]) -> None:
        """One flat region for each group and type; parameters without a group get regions by size."""
        grouped: Dict[int, List[torch.Tensor]] = {}
        for parameter in parameters:
            group = self.groups.get(parameter)
            if group is not None:
                grouped.setdefault(group.number, []).append(parameter)
        lists = [part for members in grouped.values() for part in buckets.by_type(members)]
        lists += buckets.split([parameter for parameter in parameters if parameter not in self.groups])
        for members in lists:
            bucket = Bucket(members)
            self.buckets.append(bucket)
            self.groups.update((parameter, bucket) for parameter in members)

    def expected(self, parameter: torch.Tensor) -> None:
        """A backward pass is about to accumulate into the gradient of `parameter`."""
        if self.passes_left[parameter] <= 0 or parameter in self.waiting:
            raise AssertionError(
                "gradients were computed more than backward_passes_per_step times before step() or "
                "synchronize(); raise backward_passes_per_step to accumulate gradients locally"
            )

    def arrived(self, parameter: torch.Tensor) -> None:
        """A backward pass has accumulated into the gradient of `parameter`."""
        self.passes_left[parameter] -= 1
        if self.passes_left[parameter] == 0:
            self.ready(parameter)

    def ready(self, parameter: torch.Tensor) -> None:
        group = self.groups.get(parameter)
        if group is None:
            self.submit(parameter)
            return
        group.ready += 1
        if group.ready == len(group.parameters):
            self.submit_group(group)

    def is_idle(self, parameter: torch.Tensor) -> bool:
        """Whether there is no gradient to reduce: it was frozen, or no rank has ever computed one. Left at None, the
        optimizer does not touch the parameter. The same on all ranks, where they freeze the same parameters."""
        if isinstance(self.groups.get(parameter), Bucket):
            # It is a part of a region that is reduced as a whole.
            return False
        never = self.layouts is not None and self.layouts.get(parameter) == 0
        return parameter.grad is None and (never or not parameter.requires_grad)

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient to send. A rank that did not compute one sends zeros, since others may have one."""
        if parameter.grad is None:
            sparse = self.layouts is not None and self.layouts.get(parameter) == _SPARSE
            zeros = torch.zeros_like(parameter)
            parameter.grad = _nothing(parameter) if sparse and not self.sparse_as_dense else zeros
        if parameter.grad.is_sparse and self.sparse_as_dense:
            parameter.grad = parameter.grad.to_dense()
        return parameter.grad

    def dense(self, parameter: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        compressed, ctx = self.compression.compress(self.gradient(parameter))
        return compressed.detach().contiguous(), ctx

    def submit(self, parameter: torch.Tensor) -> None:
        name = self.names[parameter]
        if self.gradient(parameter).is_sparse:
            self.waiting[parameter] = self.start_sparse(parameter, name)
            return
        if self.exchanging is not None:
            finish = self.exchanging.exchange(parameter.grad, name, self.op, self.pre, self.post, self.process_set)
            check = self.watch(parameter)
            self.waiting[parameter] = lambda: _replace(parameter.grad, finish(), check)
            return
        sent, ctx = self.dense(parameter)
        check = self.watch(parameter)
        handle = ops.allreduce_async_(
            sent, name=name, op=self.op, prescale_factor=self.pre, postscale_factor=self.post,
            process_set=self.process_set,
        )  # fmt: skip
        self.waiting[parameter] = lambda: self.put(parameter, ops.synchronize(handle), ctx, check)

    def watch(self, parameter: torch.Tensor) -> Optional[Callable[[], None]]:
        """While debugging: what checks that a gradient is as it was when it was submitted."""
        return watch(parameter.grad, self.names[parameter], lambda: parameter.grad)

    def start_sparse(self, parameter: torch.Tensor, name: str) -> Callable[[], None]:
        finish = ops.sparse_allreduce_async(parameter.grad, name, self.op, self.process_set)
        check, dtype = self.watch(parameter), parameter.grad.dtype

        def put() -> None:
            reduced = finish()
            if check is not None:
                check()
            # The two factors of a predivided average cancel, and values are not summed in between.
            parameter.grad = reduced.to(dtype)

        return put

    def submit_group(self, group: Group) -> None:
        """Submits a group: the dense gradients as one operation, the sparse ones beside it."""
        group.ready = 0
        if isinstance(group, Bucket):
            self.submit_bucket(group)
            return
        dense: List[torch.Tensor] = []
        for parameter in group.parameters:
            if self.is_idle(parameter):
                continue
            if self.gradient(parameter).is_sparse or self.exchanging is not None:
                self.submit(parameter)
            else:
                dense.append(parameter)
        if not dense:
            return
        pairs = [self.dense(parameter) for parameter in dense]
        handle = ops.grouped_allreduce_async_(
            [sent for sent, _ in pairs], name=f"group.{self.names[group.parameters[0]]}", op=self.op,
            prescale_factor=self.pre, postscale_factor=self.post, process_set=self.process_set,
        )  # fmt: skip
        reduced = _once(lambda: ops.synchronize(handle))
        for position, (parameter, (_, ctx)) in enumerate(zip(dense, pairs)):

            def put(position=position, parameter=parameter, ctx=ctx, check=self.watch(parameter)) -> None:
                self.put(parameter, reduced()[position], ctx, check)

            self.waiting[parameter] = put

    def submit_bucket(self, bucket: Bucket) -> None:
        for parameter in bucket.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse and not self.sparse_as_dense:
                raise ValueError(
                    "a sparse gradient cannot be a view of a flat region; use sparse_as_dense=True, or leave "
                    "gradient_as_bucket_view out"
                )
            bucket.take(parameter)
        name = f"bucket.{self.names[bucket.parameters[0]]}"
        if self.exchanging is not None:
            finish = self.exchanging.exchange(bucket.flat, name, self.op, self.pre, self.post, self.process_set)
        else:
            sent, ctx = self.compression.compress(bucket.flat)
            handle = ops.allreduce_async_(
                sent, name=name, op=self.op, prescale_factor=self.pre, postscale_factor=self.post,
                process_set=self.process_set,
            )  # fmt: skip

            def finish() -> torch.Tensor:
                return self.compression.decompress(ops.synchronize(handle), ctx)

        left = [finish]
        check = watch(bucket.flat, name, lambda: bucket.flat)

        def put() -> None:
            if left:
                reduced = left.pop()()
                if reduced.data_ptr() != bucket.flat.data_ptr():
                    _replace(bucket.flat, reduced, check)

        self.waiting.update((parameter, put) for parameter in bucket.parameters)

    def put(self, parameter: torch.Tensor, reduced: torch.Tensor, ctx: Any, check: Optional[Callable]) -> None:
        if check is not None:
            check()
        reduced = self.compression.decompress(reduced, ctx)
        # In place of the gradient itself, or of a copy that compression or contiguity had asked for.
        if reduced.data_ptr() != parameter.grad.data_ptr() or reduced.shape != parameter.grad.shape:
            parameter.grad.copy_(reduced)

    def synchronize(self) -> None:
        """Submits what no backward pass has reached, and waits for everything."""
        if not self.active:
            self.synchronized = True
            return
        try:
            # Parameters that were frozen when the optimizer was wrapped, and are not any more.
            late = [one for one in self.all if one.requires_grad and one not in self.passes_left]
            if late:
                self.hook(late)
            self.agree_on_layouts()
            # In the order of the parameters, which all ranks share. A group is submitted as a whole, or not at all.
            for parameter in self.trained:
                group = self.groups.get(parameter)
                if parameter in self.waiting or self.is_idle(parameter):
                    continue
                if group is None:
                    self.submit(parameter)
                else:
                    self.submit_group(group)
            self.finish()
        finally:
            # After a failure the rest is dropped: the operations end by themselves.
            self.reset()
        self.synchronized = True

    def finish(self) -> None:
        """Waits for everything, also when something has failed: until an operation is over its name is taken."""
        failure: Optional[Error] = None
        for parameter in self.trained:
            if parameter in self.waiting:
                try:
                    self.waiting[parameter]()
                except Error as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def agree_on_layouts(self) -> None:
        """Whether a parameter's gradients are sparse, for the ranks that have not computed one. Again and again, until
        each has been computed by some rank."""
        known = self.layouts or {}
        if self.layouts is not None and all(known.values()):
            return
        mine = [
            known.get(p) or (0 if p.grad is None else _SPARSE if p.grad.is_sparse else _DENSE) for p in self.trained
        ]
        name = f"layouts.{self.names[self.trained[0]]}.{len(mine)}" if self.trained else "layouts"
        agreed = torch.tensor(mine, dtype=torch.int32)
        ops.allreduce_(agreed, name=name, op=Max, process_set=self.process_set)
        self.layouts = dict(zip(self.trained, agreed.tolist()))

    def forget(self) -> None:
        """Waits for gradients that are on their way, since their names are taken until then, and forgets them."""
        for wait in self.waiting.values():
            # What has failed is over, too; an elastic job comes here to begin anew.
            with contextlib.suppress(Error):
                wait()
        self.reset()

    def reset(self) -> None:
        """Forgets gradients that are on their way."""
        self.waiting.clear()
        self.synchronized = False
        for parameter in self.trained:
            self.passes_left[parameter] = self.backward_passes_per_step
        for group in self.groups.values():
            group.ready = 0


def _once(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that is made once, and whose outcome all get, an error too."""
    outcome: List[Tuple[Any, Optional[Error]]] = []

    def get() -> Any:
        if not outcome:
            try:
                outcome.append((call(), None))
            except Error as error:
                outcome.append((None, error))
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    return get


def _replace(tensor: torch.Tensor, reduced: torch.Tensor, check: Optional[Callable[[], None]]) -> None:
    if check is not None:
        check()
    tensor.copy_(reduced)


def _begin_epoch() -> None:
    """A failure may have come in the middle of a backward pass, and ranks that are new know nothing yet."""
    for reducer in list(_all):
        reducer.reset()
        reducer.layouts = None


_life.after_reform.append(_begin_epoch)


def _expected(reducer: Any, parameter: Optional[torch.Tensor]) -> None:
    reducer = reducer()
    if reducer is not None and parameter is not None:
        reducer.expected(parameter)


def _arrived(reducer: Any, parameter: torch.Tensor) -> None:
    reducer = reducer()
    if reducer is not None:
        reducer.arrived(parameter)


def _nothing(parameter: torch.Tensor) -> torch.Tensor:
    """A sparse gradient without values, as an embedding that looked nothing up would have."""
    indices = torch.empty((1, 0), dtype=torch.int64)
    values = torch.empty((0, *parameter.shape[1:]), dtype=parameter.dtype)
    return torch.sparse_coo_tensor(indices, values, parameter.shape)

"""`DistributedOptimizer`: gradients are averaged over the ranks while the backward pass goes on."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from .. import _native
from .._sets import ProcessSet, global_process_set
from . import ops
from .compression import Compression
from .ops import Adasum, Average

# What the methods below keep on the optimizer; one object, so that nothing of the wrapped class is shadowed.
_STATE = "_carole"


class _Group:
    """Parameters that are reduced as one operation."""

    def __init__(self, number: int, parameters: List[torch.Tensor]) -> None:
        self.number = number
        self.parameters = parameters
        self.ready = 0


class _Reducer:
    """The gradients of one optimizer on their way."""

    def __init__(self, base, named, compression, backward_passes_per_step, op, gradient_predivide_factor, groups,
                 sparse_as_dense, process_set) -> None:  # fmt: skip
        # The class whose methods the wrapper extends.
        self.base = base
        self.names: Dict[torch.Tensor, str] = {parameter: name for name, parameter in named}
        self.compression = compression
        self.backward_passes_per_step = backward_passes_per_step
        self.op = op
        # Average divides by the size in any case; the rest of the division is split around the sum.
        self.pre, self.post = 1.0, 1.0
        if op == Average:
            self.pre, self.post = 1.0 / gradient_predivide_factor, gradient_predivide_factor
        self.sparse_as_dense = sparse_as_dense
        self.process_set: ProcessSet = process_set
        self.groups: Dict[torch.Tensor, _Group] = {}
        for number, members in enumerate(groups or []):
            group = _Group(number, members)
            self.groups.update((parameter, group) for parameter in members)
        self.trained: List[torch.Tensor] = []
        self.passes_left: Dict[torch.Tensor, int] = {}
        # For each parameter submitted: a function that waits and puts the result into its gradient.
        self.waiting: Dict[torch.Tensor, Callable[[], None]] = {}
        self.synchronized = False
        self.should_synchronize = True
        self.keep: List[Any] = []

    def hook(self, parameters: List[torch.Tensor]) -> None:
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            self.trained.append(parameter)
            self.passes_left[parameter] = self.backward_passes_per_step
            if hasattr(parameter, "register_post_accumulate_grad_hook"):
                parameter.register_post_accumulate_grad_hook(self.arrived)
            else:
                # Before torch 2.1: the node that accumulates the gradient, found through a view, and kept, since
                # only the graph would.
                node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
                node.register_hook(lambda *_, parameter=parameter: self.arrived(parameter))
                self.keep.append(node)

    def arrived(self, parameter: torch.Tensor) -> None:
        """A backward pass has accumulated into the gradient of `parameter`."""
        if self.passes_left[parameter] <= 0 or parameter in self.waiting:
            raise AssertionError(
                "gradients were computed more than backward_passes_per_step times before step() or "
                "synchronize(); raise backward_passes_per_step to accumulate gradients locally"
            )
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
            group.ready = 0
            self.submit_group(group)

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient to send. A rank that did not compute one sends zeros, since others may have one."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.is_sparse and self.sparse_as_dense:
            parameter.grad = parameter.grad.to_dense()
        return parameter.grad

    def dense(self, parameter: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        compressed, ctx = self.compression.compress(self.gradient(parameter))
        return compressed.detach().contiguous(), ctx

    def submit(self, parameter: torch.Tensor) -> None:
        name = self.names[parameter]
        if self.gradient(parameter).is_sparse:
            if self.op == Average and (self.pre, self.post) != (1.0, 1.0):
                raise NotImplementedError("gradient_predivide_factor does not go with sparse gradients")
            finish = ops.sparse_allreduce_async(parameter.grad, name, self.op, self.process_set)

            def put_sparse() -> None:
                parameter.grad = finish()

            self.waiting[parameter] = put_sparse
            return
        sent, ctx = self.dense(parameter)
        handle = ops.allreduce_async_(
            sent, name=name, op=self.op, prescale_factor=self.pre, postscale_factor=self.post,
            process_set=self.process_set,
        )  # fmt: skip

        def put() -> None:
            self.put(parameter, ops.synchronize(handle), ctx)

        self.waiting[parameter] = put

    def submit_group(self, group: _Group) -> None:
        if any(self.gradient(parameter).is_sparse for parameter in group.parameters):
            raise NotImplementedError("sparse gradients cannot be grouped; use sparse_as_dense=True")
        pairs = [self.dense(parameter) for parameter in group.parameters]
        handle = ops.grouped_allreduce_async_(
            [sent for sent, _ in pairs], name=f"group.{group.number}", op=self.op, prescale_factor=self.pre,
            postscale_factor=self.post, process_set=self.process_set,
        )  # fmt: skip
        reduced: List[torch.Tensor] = []
        for position, (parameter, (_, ctx)) in enumerate(zip(group.parameters, pairs)):

            def put(position=position, parameter=parameter, ctx=ctx) -> None:
                if not reduced:
                    reduced.extend(ops.synchronize(handle))
                self.put(parameter, reduced[position], ctx)

            self.waiting[parameter] = put

    def put(self, parameter: torch.Tensor, reduced: torch.Tensor, ctx: Any) -> None:
        reduced = self.compression.decompress(reduced, ctx)
        # In place of the gradient itself, or of a copy that compression or contiguity had asked for.
        if reduced.data_ptr() != parameter.grad.data_ptr() or reduced.shape != parameter.grad.shape:
            parameter.grad.copy_(reduced)

    def synchronize(self) -> None:
        if self.process_set.included() is False:
            self.synchronized = True
            return
        # In the order of the parameters, which all ranks share. A group is submitted as a whole, or not at all.
        for parameter in self.trained:
            if parameter in self.waiting:
                continue
            group = self.groups.get(parameter)
            if group is None:
                self.submit(parameter)
            else:
                self.submit_group(group)
        try:
            for parameter in self.trained:
                self.waiting[parameter]()
        finally:
            # After a failure the rest is dropped: the operations end by themselves.
            self.reset()
        self.synchronized = True

    def reset(self) -> None:
        self.waiting.clear()
        self.synchronized = False
        for parameter in self.trained:
            self.passes_left[parameter] = self.backward_passes_per_step
        for group in self.groups.values():
            group.ready = 0


class _DistributedOptimizer(torch.optim.Optimizer):
    """The methods that a distributed optimizer has beside those of the class it wraps."""

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sets how many backward passes are accumulated before gradients are sent."""
        reducer = getattr(self, _STATE)
        reducer.backward_passes_per_step = passes
        for parameter in reducer.passes_left:
            reducer.passes_left[parameter] = passes

    def load_state_dict(self, *args, **kwargs):
        """Loads a state, and forgets gradients that are on their way."""
        getattr(self, _STATE).reset()
        return getattr(self, _STATE).base.load_state_dict(self, *args, **kwargs)

    def synchronize(self) -> None:
        """Waits until all gradients are reduced (to clip them before `step`, say)."""
        getattr(self, _STATE).synchronize()

    @contextlib.contextmanager
    def skip_synchronize(self):
        """`step` in this context does not synchronize, since `synchronize` was called before."""
        reducer = getattr(self, _STATE)
        reducer.should_synchronize = False
        try:
            yield
        finally:
            reducer.should_synchronize = True

    def step(self, closure=None):
        """Waits for the gradients and takes a step of the wrapped optimizer."""
        reducer = getattr(self, _STATE)
        if reducer.should_synchronize:
            if reducer.synchronized:
                warnings.warn(
                    "step() synchronizes again after synchronize(); use `with optimizer.skip_synchronize(): "
                    "optimizer.step()` to avoid it",
                    stacklevel=2,
                )
            else:
                reducer.synchronize()
        reducer.synchronized = False
        return reducer.base.step(self, closure)

    def zero_grad(self, *args, **kwargs):
        """Clears the gradients; an error while they are on their way."""
        reducer = getattr(self, _STATE)
        if reducer.waiting:
            raise AssertionError(
                "zero_grad() was called after backward() and before step() or synchronize(): the gradients "
                "are being reduced"
            )
        return reducer.base.zero_grad(self, *args, **kwargs)


class _DistributedAdasumOptimizer(torch.optim.Optimizer):
    """Adasum combines what the optimizer would change, and not gradients: each rank takes its own step, and the
    differences are reduced."""

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accepted; here gradients are not sent, so they can be accumulated freely."""
        getattr(self, _STATE).backward_passes_per_step = passes

    def synchronize(self) -> None:
        """Nothing to wait for: reduction takes place in `step`."""

    @contextlib.contextmanager
    def skip_synchronize(self):
        """An error, as in Horovod: a step without reduction makes no sense here."""
        raise AssertionError("skip_synchronize() cannot be used with op=Adasum")
        yield

    def step(self, closure=None):
        """Takes a step of the wrapped optimizer and reduces what it changed."""
        reducer = getattr(self, _STATE)
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        before = [parameter.detach().clone() for parameter in parameters]
        loss = reducer.base.step(self, closure)
        pairs = []
        for parameter, start in zip(parameters, before):
            pairs.append(reducer.compression.compress((parameter.detach() - start).contiguous()))
        handles = [
            ops.allreduce_async_(delta, name=reducer.names[parameter], op=Adasum, process_set=reducer.process_set)
            for parameter, (delta, _) in zip(parameters, pairs)
        ]
        with torch.no_grad():
            for parameter, start, (_, ctx), handle in zip(parameters, before, pairs, handles):
                delta = reducer.compression.decompress(ops.synchronize(handle), ctx)
                parameter.copy_(start + delta)
        return loss


def _named(optimizer: torch.optim.Optimizer, named_parameters: Any) -> List[Tuple[str, torch.Tensor]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return [
            (f"allreduce.noname.{i}.{j}", parameter)
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        ]
    named = list(named_parameters)
    if any(not isinstance(pair, tuple) for pair in named):
        raise ValueError("named_parameters is a sequence of (name, parameter) tuples, as model.named_parameters()")
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"named_parameters has names twice: {', '.join(twice)}")
    known = {id(parameter) for _, parameter in named}
    unnamed = sum(1 for parameter in parameters if id(parameter) not in known)
    if unnamed:
        raise ValueError(
            f"named_parameters lacks {unnamed} of the optimizer's parameters; pass all of them, as "
            "model.named_parameters()"
        )
    return named


def _split(groups: Any, trained: List[torch.Tensor]) -> Optional[List[List[torch.Tensor]]]:
    if groups is None:
        return None
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups < 0:
            raise ValueError(f"groups={groups} is negative")
        if groups == 0 or not trained:
            return None
        count = min(groups, len(trained))
        size, more = divmod(len(trained), count)
        lists, start = [], 0
        for number in range(count):
            end = start + size + (1 if number < more else 0)
            lists.append(trained[start:end])
            start = end
        return lists
    if not isinstance(groups, list):
        raise ValueError("groups is a number or a list of lists of parameters")
    seen, lists = set(), []
    known = {id(parameter) for parameter in trained}
    for members in groups:
        if not isinstance(members, (list, tuple)):
            raise ValueError("groups is a list of lists of parameters")
        for parameter in members:
            if not isinstance(parameter, torch.Tensor):
                raise ValueError("groups has something that is not a parameter")
            if id(parameter) in seen:
                raise ValueError("groups has a parameter twice")
            seen.add(id(parameter))
        kept = [parameter for parameter in members if id(parameter) in known]
        if kept:
            lists.append(kept)
    return lists


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Any = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> torch.optim.Optimizer:
    """Wraps an optimizer so that gradients are averaged over the ranks before each step.

    The reduction of a gradient starts as soon as the backward pass has computed it. The result is an instance of
    the optimizer's own class, and shares its parameters and state.

    Args:
        optimizer: the optimizer to wrap; use only the result afterwards.
        named_parameters: `model.named_parameters()`. Names must be the same on all ranks.
        compression: `Compression.none`, `.fp16` or `.bf16`.
        backward_passes_per_step: how many backward passes are accumulated before gradients are sent.
        op: Average, Sum, Min, Max, Product, or Adasum (which reduces the steps, and not the gradients).
        gradient_predivide_factor: splits the division of Average: gradients are divided by it before the sum and
            multiplied with it afterwards.
        num_groups: deprecated; use `groups`.
        groups: how many groups of parameters are reduced as one operation each, or the groups themselves.
        sparse_as_dense: whether sparse gradients are made dense first.
        process_set: the ranks that train together.
    Raises:
        ValueError: for arguments that do not go together.
    """
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor goes with op=Average only")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step is at least 1")
    if num_groups != 0:
        warnings.warn("num_groups is deprecated; use groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    named = _named(optimizer, named_parameters)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    reducer = _Reducer(
        type(optimizer), named, compression, backward_passes_per_step, op, gradient_predivide_factor,
        _split(groups, trained), sparse_as_dense, process_set,
    )  # fmt: skip
    several = _native.world()["size"] > 1
    methods = _DistributedAdasumOptimizer if op == Adasum and several else _DistributedOptimizer
    kept = {key: value for key, value in vars(methods).items() if key not in ("__dict__", "__weakref__")}
    wrapped_class = type(type(optimizer).__name__, (type(optimizer),), kept)
    wrapped = wrapped_class.__new__(wrapped_class)
    wrapped.__dict__.update(optimizer.__dict__)
    # A learning-rate schedule made before leaves its own `step` on the instance, bound to the old object.
    wrapped.__dict__.pop("step", None)
    setattr(wrapped, _STATE, reducer)
    if several and methods is _DistributedOptimizer and process_set.included() is not False:
        reducer.hook(parameters)
    return wrapped

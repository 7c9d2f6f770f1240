"""`DistributedOptimizer`: gradients are averaged over the ranks while the backward pass goes on."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any, List, Optional, Tuple

import torch

from .. import _elastic, _native
from .._sets import ProcessSet, global_process_set
from . import ops
from .compression import Compression, exchanging
from .ops import Adasum, Average, Max
from .reducer import Reducer

# What the methods below keep on the optimizer; one object, so that nothing of the wrapped class is shadowed.
_STATE = "_carole"

# How `step` takes part in GradScaler's work; see there.
warnings.filterwarnings("ignore", message="GradScaler is going to stop passing itself", category=FutureWarning)


class _Copied:
    """How wrapped optimizers are pickled and copied: as what they wrap, with what they were wrapped with. The class of
    a wrapper is made at run time, so pickle would not find it."""

    def __reduce_ex__(self, protocol):
        reducer = getattr(self, _STATE)
        plain = reducer.base.__new__(reducer.base)
        plain.__dict__.update({key: value for key, value in self.__dict__.items() if key not in (_STATE, "step")})
        return _wrap_again, (plain, reducer.options())

    def __copy__(self):
        raise TypeError(
            "a shallow copy of a distributed optimizer would have the same parameters, and both would reduce their "
            "gradients; use copy.deepcopy, of the model and the optimizer together: copy.deepcopy((model, optimizer))"
        )


def _wrap_again(plain: torch.optim.Optimizer, options: Any) -> torch.optim.Optimizer:
    """What a pickled or copied optimizer becomes."""
    if not _native.is_initialized():
        warnings.warn(
            f"a distributed optimizer was loaded before init(), so it is a plain {type(plain).__name__} now; call "
            "init() first, or wrap it in DistributedOptimizer, to average gradients",
            stacklevel=3,
        )
        return plain
    return DistributedOptimizer(plain, **options)


class _DistributedOptimizer(torch.optim.Optimizer):
    """The methods that a distributed optimizer has beside those of the class it wraps."""

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sets how many backward passes are accumulated before gradients are sent."""
        if passes <= 0:
            raise ValueError("backward_passes_per_step is at least 1")
        reducer = getattr(self, _STATE)
        reducer.backward_passes_per_step = passes
        for parameter in reducer.passes_left:
            reducer.passes_left[parameter] = passes

    def load_state_dict(self, *args, **kwargs):
        """Loads a state, and forgets gradients that are on their way, once they have come."""
        getattr(self, _STATE).forget()
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

    # GradScaler then leaves it to `step` to divide the gradients by the scale, which must wait for them.
    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None):
        """Waits for the gradients and takes a step of the wrapped optimizer.

        With a closure, it runs as often as the wrapped optimizer wants (LBFGS), and each time the gradients are
        reduced. `grad_scaler` is what `torch.amp.GradScaler.step` passes.
        """
        reducer = getattr(self, _STATE)
        if closure is not None:
            closure = functools.partial(self._evaluate, closure)
        elif reducer.should_synchronize:
            if reducer.synchronized:
                warnings.warn(
                    "step() synchronizes again after synchronize(); use `with optimizer.skip_synchronize(): "
                    "optimizer.step()` to avoid it",
                    stacklevel=2,
                )
            else:
                reducer.synchronize()
        reducer.synchronized = False
        if grad_scaler is not None and self._overflowed(grad_scaler):
            return None
        return reducer.base.step(self) if closure is None else reducer.base.step(self, closure)

    def _evaluate(self, closure):
        reducer = getattr(self, _STATE)
        with torch.enable_grad():
            loss = closure()
        if reducer.should_synchronize:
            reducer.synchronize()
            reducer.synchronized = False
        return loss

    def _overflowed(self, grad_scaler):
        """Divides the gradients by the scale, unless that was done, and says whether they are not finite. They are
        the same on all ranks, and so is the answer."""
        state = grad_scaler._per_optimizer_states[id(self)]
        if state["stage"].name == "READY":
            grad_scaler.unscale_(self)
        return sum(float(found) for found in state["found_inf_per_device"].values()) > 0

    def add_param_group(self, param_group):
        """Adds a group of parameters, whose gradients are reduced from the next backward pass on.

        All ranks must do so at the same place. The parameters are named by their position.
        """
        reducer = getattr(self, _STATE)
        added = _add_named(self, reducer, param_group)
        if reducer.active:
            reducer.hook(added)

    def zero_grad(self, *args, **kwargs):
        """Clears the gradients; an error while they are on their way."""
        reducer = getattr(self, _STATE)
        if reducer.waiting:
            raise AssertionError(
                "zero_grad() was called after backward() and before step() or synchronize(): the gradients "
                "are being reduced"
            )
        if reducer.buckets:
            # The gradients stay where they are, also where they were to be set to None.
            for bucket in reducer.buckets:
                bucket.zero()
            return None
        return reducer.base.zero_grad(self, *args, **kwargs)


def _add_named(optimizer: Any, reducer: Reducer, param_group: Any) -> List[torch.Tensor]:
    """Adds a group to the wrapped optimizer, and names its parameters."""
    reducer.base.add_param_group(optimizer, param_group)
    number = len(optimizer.param_groups) - 1
    added = optimizer.param_groups[-1]["params"]
    for j, parameter in enumerate(added):
        reducer.names.setdefault(parameter, f"allreduce.noname.{number}.{j}")
    return added


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

    def add_param_group(self, param_group):
        """Adds a group of parameters, which take part from the next step on. All ranks must do so at the same place."""
        _add_named(self, getattr(self, _STATE), param_group)

    # GradScaler then leaves it to `step` to divide the gradients by the scale, and to skip a step.
    _step_supports_amp_scaling = True

    def _overflowed(self, grad_scaler):
        """Divides the gradients by the scale, unless that was done, and says whether those of any rank are not finite;
        the scaler learns that too, so that all ranks keep one scale."""
        state = grad_scaler._per_optimizer_states[id(self)]
        if state["stage"].name == "READY":
            grad_scaler.unscale_(self)
        found = list(state["found_inf_per_device"].values())
        for number, one in enumerate(found):
            ops.allreduce_(one, op=Max, name=f"overflow.{number}", process_set=getattr(self, _STATE).process_set)
        return sum(float(one) for one in found) > 0

    def step(self, closure=None, *, grad_scaler=None):
        """Takes a step of the wrapped optimizer and reduces what it changed. `grad_scaler` is what
        `torch.amp.GradScaler.step` passes."""
        reducer = getattr(self, _STATE)
        if grad_scaler is not None and self._overflowed(grad_scaler):
            return None
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
    gradient_as_bucket_view: bool = False,
) -> torch.optim.Optimizer:
    """Wraps an optimizer so that gradients are averaged over the ranks before each step.

    The reduction of a gradient starts as soon as the backward pass has computed it. The result is an instance of
    the optimizer's own class, and shares its parameters and state. It can be pickled and deep-copied as that can (copy
    or pickle the model together with it, so that the parameters stay the model's), and is then wrapped anew.

    Args:
        optimizer: the optimizer to wrap; use only the result afterwards.
        named_parameters: `model.named_parameters()`. Names must be the same on all ranks.
        compression: `Compression.none`, `.fp16`, `.bf16`, `.onebit`, or a compressor of your own.
        backward_passes_per_step: how many backward passes are accumulated before gradients are sent.
        op: Average, Sum, Min, Max, Product, or Adasum (which reduces the steps, and not the gradients).
        gradient_predivide_factor: splits the division of Average: gradients are divided by it before the sum and
            multiplied with it afterwards.
        num_groups: deprecated; use `groups`.
        groups: how many groups of parameters are reduced as one operation each, or the groups themselves.
        sparse_as_dense: whether sparse gradients are made dense first.
        process_set: the ranks that train together.
        gradient_as_bucket_view: whether gradients are views of flat regions (one for each group, else by size), which
            are reduced in place as one tensor each, in memory that the ranks of a host share as far as `CAROLE_MEMORY`
            allows. Saves copies and calls. `zero_grad` then writes zeros, and never sets gradients to None.
    Raises:
        ValueError: for arguments that do not go together.
    """
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor goes with op=Average only")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step is at least 1")
    if op == Adasum and exchanging(compression) is not None:
        raise ValueError("compression that exchanges by itself (onebit) reduces gradients; op=Adasum reduces steps")
    if num_groups != 0:
        warnings.warn("num_groups is deprecated; use groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    named = _named(optimizer, named_parameters)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    reducer = Reducer(
        type(optimizer), named, compression, backward_passes_per_step, op, gradient_predivide_factor,
        _split(groups, trained), sparse_as_dense, process_set, gradient_as_bucket_view,
    )  # fmt: skip
    # An elastic job may begin with one rank and grow.
    several = (_native.world()["size"] > 1 or _elastic.may_grow()) and process_set.included() is not False
    methods = _DistributedAdasumOptimizer if op == Adasum and several else _DistributedOptimizer
    kept = {**vars(_Copied), **vars(methods)}
    kept = {key: value for key, value in kept.items() if key not in ("__dict__", "__weakref__")}
    wrapped_class = type(type(optimizer).__name__, (type(optimizer),), kept)
    wrapped = wrapped_class.__new__(wrapped_class)
    wrapped.__dict__.update(optimizer.__dict__)
    # A learning-rate schedule made before leaves its own `step` on the instance, bound to the old object.
    wrapped.__dict__.pop("step", None)
    setattr(wrapped, _STATE, reducer)
    if several and methods is _DistributedOptimizer:
        reducer.hook(parameters)
    return wrapped

"""Saving, restoring and synchronizing models, optimizers and samplers."""

from __future__ import annotations

import copy
from typing import Any, Dict, List, Tuple, Type

import torch

from ... import _life
from ..._elastic import ObjectState
from ..functions import broadcast_object, broadcast_optimizer_state, broadcast_parameters
from .sampler import ElasticSampler


class StateHandler:
    """How a value of some kind is saved, restored and synchronized."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def set_value(self, value: Any) -> None:
        """Another value takes this one's place."""
        self.value = value
        self.save()

    def save(self) -> None:
        """Keeps a copy in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Goes back to the copy."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Gives all ranks the value of rank 0, without saving it."""
        raise NotImplementedError

    def sync(self) -> None:
        """Gives all ranks the value of rank 0, and saves it."""
        self.fetch()
        self.save()


class _StateDictHandler(StateHandler):
    """Handles what has a `state_dict`; how that travels is the subclass's."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        # A copy goes in: an optimizer would go on in the saved tensors.
        self.value.load_state_dict(copy.deepcopy(self._saved))


class ModelStateHandler(_StateDictHandler):
    """Handles `torch.nn.Module`."""

    def fetch(self) -> None:
        broadcast_parameters(self.value.state_dict(), root_rank=0)


class OptimizerStateHandler(_StateDictHandler):
    """Handles `torch.optim.Optimizer`."""

    def fetch(self) -> None:
        broadcast_optimizer_state(self.value, root_rank=0)


class SamplerStateHandler(StateHandler):
    """Handles `ElasticSampler`."""

    def __init__(self, sampler: ElasticSampler) -> None:
        super().__init__(sampler)
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        self.value.load_state_dict(self._saved)

    def fetch(self) -> None:
        self.value.load_state_dict(broadcast_object(self.value.state_dict(), 0, "elastic.sampler"))


Registry = List[Tuple[Type[Any], Type[StateHandler]]]

_registry: Registry = [
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (ElasticSampler, SamplerStateHandler),
]


def get_handler_registry() -> Registry:
    """Pairs of a type and its handler."""
    return _registry


def set_handler_registry(registry: Registry) -> None:
    """Replaces the pairs, for kinds of values that are not known here."""
    global _registry
    _registry = registry


def _split(values: Dict[str, Any]) -> Tuple[Dict[str, StateHandler], Dict[str, Any]]:
    handlers, rest = {}, {}
    for name, value in values.items():
        handler = next((handler for kind, handler in _registry if isinstance(value, kind)), None)
        if handler is None:
            rest[name] = value
        else:
            handlers[name] = handler(value)
    return handlers, rest


class TorchState(ObjectState):
    """The state of a training with PyTorch.

    Args:
        model, optimizer: what is trained, and what trains it.
        **kwargs: anything else, as attributes: models, optimizers and samplers by their state, the rest by value.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        kwargs.update(model=model, optimizer=optimizer)
        handlers, rest = _split({name: value for name, value in kwargs.items() if value is not None})
        rest.update({name: None for name, value in kwargs.items() if value is None})
        self._handlers = handlers
        for name, handler in handlers.items():
            super().__setattr__(name, handler.value)
        super().__init__(broadcast_object, _life.rank, **rest)

    def __setattr__(self, name: str, value: Any) -> None:
        handlers = self.__dict__.get("_handlers", {})
        if name in handlers:
            handlers[name].set_value(value)
        super().__setattr__(name, value)

    def save(self) -> None:
        """Keeps a copy of everything in memory."""
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        """Goes back to the last `save` or `sync`."""
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        """Gives all ranks the state of rank 0."""
        late = []
        for name in sorted(self._handlers):
            handler = self._handlers[name]
            # Nothing is saved before everything is here: a rank may be lost half-way, and what was saved before is
            # what all go back to. Handlers that only know how to do both at once do so.
            if type(handler).fetch is StateHandler.fetch:
                handler.sync()
            else:
                handler.fetch()
                late.append(handler)
        self._fetch()
        for handler in late:
            handler.save()
        ObjectState.save(self)

    def reset(self) -> None:
        """Samplers deal anew: there may be more or fewer ranks."""
        for handler in self._handlers.values():
            if isinstance(handler, SamplerStateHandler):
                handler.value.reset()

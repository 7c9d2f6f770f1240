"""Training that outlives its processes, for any framework.

    import carole, carole.elastic

    carole.init()
    state = carole.elastic.ObjectState(step=0, weights=weights)

    @carole.elastic.run
    def train(state):
        while state.step < 1000:
            state.weights = one_step(state.weights)
            state.step += 1
            state.commit()

    train(state)

Started as `carolerun --min-np 2 --max-np 8 --host-discovery-script ./hosts.sh python train.py`, it goes on when a
process is lost, with the state of the last commit and no process restarted; and with more when hosts are added, from
the next commit on. `carole.torch.elastic` has the same for PyTorch's models, optimizers and samplers.
"""

from __future__ import annotations

import pickle
from typing import Any, Callable, Optional

from . import _life
from ._elastic import HostUpdateResult, State, notification_manager, rejoin, run_fn
from ._elastic import ObjectState as _ObjectState
from ._errors import BrokenError, HorovodInternalError, HostsUpdatedInterrupt
from ._movements import broadcast_

__all__ = [
    "BrokenError",
    "HorovodInternalError",
    "HostUpdateResult",
    "HostsUpdatedInterrupt",
    "ObjectState",
    "State",
    "broadcast_object",
    "notification_manager",
    "run",
]


def broadcast_object(obj: Any, root: int = 0, name: str = "broadcast_object") -> Any:
    """The root's object, on every rank (on the root: `obj` itself). It travels pickled over the authenticated
    connections of the job: unpickling trusts the ranks of the job and nobody else."""
    mine = _life.rank() == root
    data = bytearray(pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)) if mine else bytearray()
    size = bytearray(len(data).to_bytes(8, "little"))
    broadcast_(size, root=root, name=f"{name}.size")
    if not mine:
        data = bytearray(int.from_bytes(size, "little"))
    broadcast_(data, root=root, name=f"{name}.data")
    return obj if mine else pickle.loads(data)


class ObjectState(_ObjectState):
    """State made of Python objects, which are attributes of it: anything that can be pickled and copied.

    Args:
        bcast_object, get_rank: as Horovod has them; not needed here.
        **kwargs: the attributes and their first values.

    `commit` keeps a copy in memory and looks whether hosts came or went; `restore` goes back to it; `sync` gives all
    ranks the attributes of rank 0.
    """

    def __init__(
        self,
        bcast_object: Optional[Callable[[Any], Any]] = None,
        get_rank: Optional[Callable[[], int]] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(bcast_object or broadcast_object, get_rank or _life.rank, **kwargs)


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a training function `func(state, ...)`: after the loss of a rank it is called again, with the state of
    the last commit, among the ranks that are left; after a change of hosts with its present state, and with the ranks
    that have come."""
    return run_fn(func, rejoin)

"""A sampler that goes on where the ranks were, even when there are more or fewer of them."""

from __future__ import annotations

import math
from typing import Any, Dict, Iterator, List, Sized

import torch

from ... import _native


class ElasticSampler(torch.utils.data.Sampler):
    """Deals the samples of a data set to the ranks, and remembers how many of them are done.

    Args:
        dataset: anything with a length.
        shuffle: whether the order is random, the same on all ranks, another in each epoch.
        seed: of the random order; the same on all ranks.

    Attributes:
        epoch: the epoch, of which the order depends.
        processed_num: how many samples of it all ranks together have done.
        remaining_indices: what is left of it.
        num_samples: how many samples are left for each rank.
        total_size: `num_samples` times the number of ranks: some samples come twice where it does not divide.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.processed_num = 0
        self.rank = 0
        self.num_replicas = 1
        self.remaining_indices: List[int] = []
        self.num_samples = 0
        self.total_size = 0
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch. Call it at the end of the one before, and not when a step is repeated after a failure."""
        self.epoch = epoch
        self.processed_num = 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Notes that every rank has done its batch number `batch_idx` of `batch_size` samples."""
        del batch_idx
        self.processed_num = min(self.processed_num + batch_size * self.num_replicas, len(self.dataset))

    def state_dict(self) -> Dict[str, Any]:
        """Epoch and progress."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.epoch = state_dict["epoch"]
        self.processed_num = state_dict["processed_num"]
        self.reset()

    def reset(self) -> None:
        """Deals what is left to the ranks that there are now."""
        if _native.is_initialized():
            world = _native.world()
            self.rank, self.num_replicas = world["rank"], world["size"]
        self.remaining_indices = self._order()[self.processed_num :]
        self.num_samples = math.ceil(len(self.remaining_indices) / self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def _order(self) -> List[int]:
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        indices = list(self.remaining_indices)
        while indices and len(indices) < self.total_size:
            indices += indices[: self.total_size - len(indices)]
        return iter(indices[self.rank : self.total_size : self.num_replicas])

    def __len__(self) -> int:
        return self.num_samples

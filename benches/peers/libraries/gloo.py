"""Gloo, through torch.distributed. It knows TCP only, within a host as well."""

from __future__ import annotations

from typing import Dict, List

import torch
import torch.distributed as dist

from . import Cannot, Library, Tensors, Way

# DistributedDataParallel's.
BUCKET_BYTES = 25 << 20


class Gloo(Library):
    def __init__(self) -> None:
        dist.init_process_group("gloo")
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.version = f"torch {torch.__version__}"

    def ways(self, kind: str, inputs: Tensors, outputs: Tensors) -> Dict[str, Way]:
        if kind == "set":
            return {"25 MiB buckets": self._buckets(inputs), "each": self._each(inputs)}
        if kind == "reducescatter" and not hasattr(dist, "reduce_scatter_tensor"):
            raise Cannot("this torch has no reduce_scatter_tensor")
        parts = list(outputs[0].chunk(self.ranks))
        calls = {
            "allreduce": lambda: dist.all_reduce(inputs[0]),
            "allgather": lambda: dist.all_gather(parts, inputs[0]),
            "reducescatter": lambda: dist.reduce_scatter_tensor(outputs[0], inputs[0]),
            "broadcast": lambda: dist.broadcast(inputs[0], 0),
            "alltoall": lambda: dist.all_to_all_single(outputs[0], inputs[0]),
        }

        def blocking() -> None:
            try:
                calls[kind]()
            except (RuntimeError, ValueError) as error:
                if "support" in str(error):
                    raise Cannot(str(error)) from error
                raise

        return {"blocking": blocking}

    def _each(self, tensors: Tensors) -> Way:
        def each() -> None:
            for handle in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                handle.wait()

        return each

    def _buckets(self, tensors: Tensors) -> Way:
        """As DistributedDataParallel does: packed, reduced while the next is packed, unpacked."""
        groups: List[Tensors] = [[]]
        size = 0
        for tensor in tensors:
            if groups[-1] and size + tensor.nbytes > BUCKET_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += tensor.nbytes
        flats = [torch.zeros(sum(tensor.numel() for tensor in group)) for group in groups]
        views = [flat.split([tensor.numel() for tensor in group]) for flat, group in zip(flats, groups)]

        def buckets() -> None:
            handles = []
            for flat, group in zip(flats, groups):
                torch.cat(group, out=flat)
                handles.append(dist.all_reduce(flat, async_op=True))
            for handle, group, parts in zip(handles, groups, views):
                handle.wait()
                torch._foreach_copy_(group, parts)

        return buckets

    def leave(self) -> None:
        dist.destroy_process_group()

"""A small GPT-style model on the text of Python's own library, with DDP or FSDP2 on the backend "carole".

    torchrun --nproc-per-node 2 gpt.py --wrap fsdp2
    carolerun -np 2 python gpt.py

At the end rank 0 trains once more, alone, on the whole batches, and compares the losses. Exits with 1 when they
differ. (carolerun sets rank and size; the ranks meet torch's store at MASTER_ADDR and MASTER_PORT.)
"""

import argparse
import os
import pydoc
import sys
import time

import torch
import torch.distributed as dist
from torch import nn


class Layer(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.mix(self.norms[0](x)).split(width, 2))
        scores = q @ k.transpose(2, 3) / shape[3] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = (scores.masked_fill(future, float("-inf")).softmax(3) @ v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.feed(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.tokens = nn.Embedding(256, options.width)
        self.places = nn.Embedding(options.length, options.width)
        self.layers = nn.ModuleList([Layer(options.width, options.heads) for _ in range(options.layers)])
        self.head = nn.Linear(options.width, 256)

    def forward(self, x):
        x = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batches(options):
    """Pieces of a file that every Python has, as bytes; the same on all ranks."""
    with open(pydoc.__file__, "rb") as file:
        text = torch.tensor(list(file.read()))
    generator = torch.Generator().manual_seed(1)
    for _ in range(options.steps):
        starts = torch.randint(0, len(text) - options.length - 1, (options.batch,), generator=generator)
        yield torch.stack([text[start : start + options.length + 1] for start in starts.tolist()])


def train(model, options, rank, size):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches(options):
        part = batch[rank::size]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / size)
    return losses


def wrap(model, kind):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", default="ddp", choices=["ddp", "fsdp2"])
    for name, value in (("width", 64), ("heads", 4), ("layers", 2), ("length", 64), ("batch", 16), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    import carole.torch_backend  # noqa: F401 (registers the backend)

    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    for theirs, ours in (("RANK", "CAROLE_RANK"), ("WORLD_SIZE", "CAROLE_SIZE")):
        os.environ.setdefault(theirs, os.environ.get(ours, {"RANK": "0", "WORLD_SIZE": "1"}[theirs]))
    dist.init_process_group("carole")
    rank, size = dist.get_rank(), dist.get_world_size()
    if options.batch % size:
        parser.error(f"--batch {options.batch} does not divide by {size} ranks")
    torch.manual_seed(0)
    started = time.perf_counter()
    losses = train(wrap(GPT(options), options.wrap), options, rank, size)
    seconds = time.perf_counter() - started
    difference = 0.0
    if rank == 0:
        torch.manual_seed(0)
        alone = train(GPT(options), options, 0, 1)
        difference = max(abs(a - b) for a, b in zip(losses, alone))
        tokens = options.steps * options.batch * options.length
        print(
            f"{options.wrap} on {size} ranks: loss {losses[0]:.4f} to {losses[-1]:.4f}, {tokens / seconds:.0f} tokens/s"
        )
        verdict = "agrees" if difference < 1e-3 else "DISAGREES"
        print(f"largest difference to the losses of one process: {difference:.2g}: {verdict}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if difference < 1e-3 else 1)


if __name__ == "__main__":
    main()

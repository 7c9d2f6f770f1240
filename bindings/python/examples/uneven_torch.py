"""Uneven data: ranks run out of batches at different times, and the rest go on.

    carolerun -np 3 python uneven_torch.py

A rank that has no more data calls `hvd.join()` and takes part in the others' reductions with zeros, until all have
joined. The last one to join has the newest weights and gives them to all.
"""

import argparse
import sys

import torch

import carole.torch as hvd


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20, help="of rank 0; each further rank has 5 more")
    options = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    generator = torch.Generator().manual_seed(hvd.rank())
    count, losses = options.batches + 5 * hvd.rank(), []
    for _ in range(count):
        x = torch.randn(16, 10, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    last = hvd.join()
    hvd.broadcast_parameters(model.state_dict(), root_rank=last)
    weights = model.weight.detach().flatten().tolist()
    same = all(one == weights for one in hvd.allgather_object(weights))
    for rank, (batches, first, final) in enumerate(hvd.allgather_object((count, losses[0], losses[-1]))):
        if hvd.rank() == 0:
            print(f"rank {rank}: {batches} batches, loss {first:.3f} to {final:.3f}")
    good = same and losses[-1] < losses[0]
    if hvd.rank() == 0:
        print(f"rank {last} joined last; same weights on all ranks: {'yes' if same else 'NO'}", flush=True)
    hvd.shutdown()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

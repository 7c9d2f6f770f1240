"""Local gradient accumulation: several backward passes, one reduction.

    carolerun -np 2 python accumulation_torch.py

With `backward_passes_per_step=4` the gradients of four small batches add up on each rank before they are averaged
over the ranks: a quarter of the communication, and the same step as with one batch of their size. Rank 0 checks that
against a training of its own, and all exit with 1 where it is not so.
"""

import argparse
import sys

import torch

import carole.torch as hvd


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))


def data(steps, rows):
    """Points of a plane with noise; the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, rows, 20, generator=generator)
    return x, x.sum(2, keepdim=True) + 0.1 * torch.randn(steps, rows, 1, generator=generator)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    rank, size = hvd.rank(), hvd.size()
    x, y = data(options.steps, 8 * options.passes * size)
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01), model.named_parameters(),
        backward_passes_per_step=options.passes,
    )  # fmt: skip
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    for inputs, targets in zip(x, y):
        optimizer.zero_grad()
        for part, wanted in zip(inputs[rank::size].chunk(options.passes), targets[rank::size].chunk(options.passes)):
            # Divided, since gradients add up over the passes.
            (torch.nn.functional.mse_loss(model(part), wanted) / options.passes).backward()
        optimizer.step()
    agrees = True
    if rank == 0:
        alone = network()
        optimizer = torch.optim.Adam(alone.parameters(), lr=0.01)
        for inputs, targets in zip(x, y):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(alone(inputs), targets)
            loss.backward()
            optimizer.step()
        far = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), alone.parameters()))
        agrees = far < 1e-3
        print(
            f"{options.steps} steps of {options.passes} passes on {size} ranks: loss {float(loss):.4f}; largest weight "
            f"difference to one process: {far:.2g}: {'agrees' if agrees else 'DISAGREES'}",
            flush=True,
        )
    agrees = hvd.broadcast_object(agrees, root_rank=0)
    hvd.shutdown()
    sys.exit(0 if agrees else 1)


if __name__ == "__main__":
    main()

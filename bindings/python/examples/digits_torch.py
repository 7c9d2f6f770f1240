"""Data-parallel training of a small network on scikit-learn's handwritten digits, with PyTorch and Carole.

    carolerun -np 4 python digits_torch.py

Where scikit-learn is not installed, it learns generated digits instead.
`DistributedOptimizer` averages the gradients while the backward pass goes on. At the end rank 0 trains once more,
alone, on the whole batches, and compares the weights; and all ranks compare theirs with each other, bit by bit.
Exits with 1 when either comparison fails.
"""

import argparse
import hashlib
import sys
import time

import torch
from digits_data import load_digits

import carole.torch as hvd

TEST_IMAGES = 360


def load():
    """The 1797 images of 8 x 8 pixels, shuffled alike on all ranks and split into training and held-out parts."""
    # As lists, since some builds of torch and NumPy do not fit together.
    images, labels, what = load_digits()
    images = torch.tensor(images, dtype=torch.float32) / 16.0
    labels = torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[TEST_IMAGES:], labels[TEST_IMAGES:]), (images[:TEST_IMAGES], labels[:TEST_IMAGES]), what


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )


def optimizer_of(model, options):
    return torch.optim.SGD(model.parameters(), lr=options.rate, momentum=0.9)


def batches(count, size, epoch):
    """The batches of an epoch, the same on all ranks: each is split among them, so `size` is the whole batch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 + epoch))
    return [order[start : start + size] for start in range(0, count - size + 1, size)]


def accuracy(model, images, labels):
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())


def train(options, model, data, test, what):
    rank, size = hvd.rank(), hvd.size()
    images, labels = data
    optimizer = hvd.DistributedOptimizer(optimizer_of(model, options), named_parameters=model.named_parameters())
    # A rank starts with its own weights, so that the broadcast shows.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    if rank == 0:
        print(
            f"{len(images)} {what} ({len(test[0])} more are held out), {size} ranks, "
            f"{options.batch} images a step over all of them\n"
            f"{'epoch':>5} {'loss':>9} {'held-out accuracy':>18} {'samples/s':>11} {'in communication':>17}",
            flush=True,
        )
    for epoch in range(options.epochs):
        started, losses, waiting, seen = time.perf_counter(), [], 0.0, 0
        for batch in batches(len(images), options.batch, epoch):
            part = batch[rank::size]
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[part]), labels[part])
            loss.backward()
            # What is left of communication when the backward pass is over; `step` would wait for it, too.
            before = time.perf_counter()
            optimizer.synchronize()
            waiting += time.perf_counter() - before
            with optimizer.skip_synchronize():
                optimizer.step()
            losses.append(float(loss.detach()))
            seen += len(batch)
        elapsed = time.perf_counter() - started
        summary = hvd.allreduce(torch.tensor([sum(losses) / len(losses), waiting / elapsed]), name="summary")
        if rank == 0:
            print(
                f"{epoch:>5} {summary[0]:>9.4f} {accuracy(model, *test):>18.4f} {seen / elapsed:>11.0f} "
                f"{100 * float(summary[1]):>16.1f}%",
                flush=True,
            )


def train_alone(options, model, data):
    """The same training in one process: the gradient of the whole batch, in one piece."""
    images, labels = data
    optimizer = optimizer_of(model, options)
    for epoch in range(options.epochs):
        for batch in batches(len(images), options.batch, epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def tolerance(model, steps):
    """How far the weights of two such trainings may be apart; digits_numpy.py has the reasons: a rounding of each
    weight per step and training, which add up like a square root, and a factor for what training makes of them."""
    largest = max(float(weight.detach().abs().max()) for weight in model.parameters())
    return 16 * 2**-24 * largest * steps**0.5


def compare(options, model, data):
    """Rank 0 compares with a training of its own; all ranks compare their bits. Returns whether both agree."""
    digest = hashlib.sha256(b"".join(bytes(weight.detach().contiguous().view(-1).view(torch.uint8).tolist())
                                     for weight in model.parameters()))  # fmt: skip
    same = len(set(hvd.allgather_object(digest.hexdigest(), name="digest"))) == 1
    if hvd.rank() != 0:
        return same
    verdict = "yes" if same else "NO"
    print(f"same bits in the weights of all {hvd.size()} ranks: {verdict} (sha256 {digest.hexdigest()[:16]})")
    alone = network(seed=0)
    train_alone(options, alone, data)
    pairs = zip(model.parameters(), alone.parameters())
    difference = max(float((a - b).detach().abs().max()) for a, b in pairs)
    steps = options.epochs * len(batches(len(data[0]), options.batch, 0))
    limit = tolerance(alone, steps)
    close = difference <= limit
    print(
        f"largest weight difference to a single process on the same {steps} batches: {difference:.3g} "
        f"(float rounding allows {limit:.3g}): {'agrees' if close else 'DISAGREES'}",
        flush=True,
    )
    return same and close


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=96, help="images per step, over all ranks")
    parser.add_argument("--rate", type=float, default=0.02)
    options = parser.parse_args()
    hvd.init()
    # One thread per rank: the ranks share this machine's cores.
    torch.set_num_threads(1)
    if options.batch % hvd.size():
        # The mean of the ranks' means is the mean of the batch only if all parts are equally large.
        parser.error(f"--batch {options.batch} does not divide by {hvd.size()} ranks")
    data, test, what = load()
    model = network(seed=hvd.rank())
    train(options, model, data, test, what)
    # All ranks end alike, and not before rank 0 has said what it found.
    agreed = all(hvd.allgather_object(compare(options, model, data), name="verdict"))
    hvd.shutdown()
    sys.exit(0 if agreed else 1)


if __name__ == "__main__":
    main()

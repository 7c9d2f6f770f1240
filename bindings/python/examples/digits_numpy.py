"""Data-parallel training of a small network on scikit-learn's handwritten digits, with NumPy and Carole.

    carolerun -np 4 python digits_numpy.py

Each rank computes the gradients of its part of every batch; they are averaged while the backward pass goes on. At
the end rank 0 trains once more, alone, on the whole batches, and compares the weights; and all ranks compare
theirs with each other, bit by bit. Exits with 1 when either comparison fails. Where scikit-learn is not installed, it
learns generated digits instead.
"""

import argparse
import hashlib
import sys
import time

import numpy as np
from digits_data import load_digits

import carole

LAYERS = (64, 128, 64, 10)
TEST_IMAGES = 360


def load():
    """The 1797 images of 8 x 8 pixels, shuffled alike on all ranks and split into training and held-out parts."""
    images, labels, what = load_digits()
    images, labels = np.array(images), np.array(labels)
    order = np.random.default_rng(0).permutation(len(images))
    images = (images[order] / 16.0).astype(np.float32)
    labels = labels[order]
    return (images[TEST_IMAGES:], labels[TEST_IMAGES:]), (images[:TEST_IMAGES], labels[:TEST_IMAGES]), what


class Network:
    """A multilayer perceptron with ReLU and cross entropy, trained by SGD with momentum, all in float32."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        self.weights = []
        for rows, columns in zip(LAYERS, LAYERS[1:]):
            scale = np.float32(np.sqrt(2.0 / rows))
            self.weights.append(random.standard_normal((rows, columns), dtype=np.float32) * scale)
            self.weights.append(np.zeros(columns, np.float32))
        self.momenta = [np.zeros_like(weight) for weight in self.weights]

    def forward(self, images):
        values = [images]
        for layer in range(0, len(self.weights), 2):
            value = values[-1] @ self.weights[layer] + self.weights[layer + 1]
            values.append(np.maximum(value, 0) if layer + 2 < len(self.weights) else value)
        return values

    def gradients(self, images, labels, ready=lambda index, gradient: None):
        """The mean loss and its gradients; `ready` is told of each gradient as soon as it is known."""
        values = self.forward(images)
        logits = values[-1] - values[-1].max(axis=1, keepdims=True)
        exponentials = np.exp(logits)
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        loss = float(-np.log(probabilities[rows, labels] + np.float32(1e-12)).mean())
        delta = probabilities
        delta[rows, labels] -= 1
        delta /= np.float32(len(labels))
        gradients = [None] * len(self.weights)
        for layer in range(len(self.weights) - 2, -1, -2):
            for index, gradient in ((layer, values[layer // 2].T @ delta), (layer + 1, delta.sum(axis=0))):
                gradients[index] = np.ascontiguousarray(gradient)
                ready(index, gradients[index])
            if layer:
                delta = (delta @ self.weights[layer].T) * (values[layer // 2] > 0)
        return loss, gradients

    def step(self, gradients, rate, momentum=np.float32(0.9)):
        for weight, moment, gradient in zip(self.weights, self.momenta, gradients):
            moment *= momentum
            moment += gradient
            weight -= np.float32(rate) * moment

    def accuracy(self, images, labels):
        return float((self.forward(images)[-1].argmax(axis=1) == labels).mean())


def batches(count, size, epoch):
    """The batches of an epoch, the same on all ranks: each is split among them, so `size` is the whole batch.
    The last images that do not fill a batch are left for another epoch's shuffle."""
    order = np.random.default_rng(1000 + epoch).permutation(count)
    return [order[start : start + size] for start in range(0, count - size + 1, size)]


def train(options, network, data, test, what):
    rank, size = carole.rank(), carole.size()
    images, labels = data
    # A rank starts with its own weights, so that the broadcast shows.
    for index, weight in enumerate(network.weights):
        carole.broadcast_(weight, root=0, name=f"weights.{index}")
    if rank == 0:
        print(
            f"{len(images)} {what} ({len(test[0])} more are held out), {size} ranks, "
            f"{options.batch} images a step over all of them\n"
            f"{'epoch':>5} {'loss':>9} {'held-out accuracy':>18} {'samples/s':>11} {'in communication':>17}",
            flush=True,
        )
    for epoch in range(options.epochs):
        started, losses, communicating, seen = time.perf_counter(), [], 0.0, 0
        for batch in batches(len(images), options.batch, epoch):
            part = batch[rank::size]
            handles = []
            in_submits = 0.0

            def ready(index, gradient):
                nonlocal in_submits
                before = time.perf_counter()
                handles.append(carole.allreduce_async_(gradient, op=carole.Average, name=f"gradient.{index}"))
                in_submits += time.perf_counter() - before

            loss, gradients = network.gradients(images[part], labels[part], ready)
            before = time.perf_counter()
            for handle in handles:
                carole.wait(handle)
            communicating += in_submits + time.perf_counter() - before
            network.step(gradients, options.rate)
            losses.append(loss)
            seen += len(batch)
        elapsed = time.perf_counter() - started
        summary = np.array([np.mean(losses), communicating / elapsed], np.float32)
        summary = carole.allreduce(summary, op=carole.Average, name="summary")
        if rank == 0:
            print(
                f"{epoch:>5} {summary[0]:>9.4f} {network.accuracy(*test):>18.4f} {seen / elapsed:>11.0f} "
                f"{100 * summary[1]:>16.1f}%",
                flush=True,
            )


def train_alone(options, network, data):
    """The same training in one process: the gradient of the whole batch, in one piece."""
    images, labels = data
    for epoch in range(options.epochs):
        for batch in batches(len(images), options.batch, epoch):
            _, gradients = network.gradients(images[batch], labels[batch])
            network.step(gradients, options.rate)


def tolerance(network, steps):
    """How far the weights of two such trainings may be apart.

    The mean of the ranks' gradients and the gradient of the whole batch are the same sum in another order, so they
    differ by units of float32 rounding: 2**-24 of their size. So does each step, which rounds the new weight to
    within 2**-24 of the weight; since a step changes a weight by far less than the weight itself, the latter is
    the larger of the two. Roundings are not one-sided, so that they add up like the square root of the number of
    steps. There are two trainings that round, and a factor of 8 is for the way in which training carries an early
    difference on (where a ReLU turns on one side and not on the other, a rounding becomes a small step): 16 in
    all. A gradient that is wrong in its third digit would show as a hundred times more.
    """
    largest = max(np.abs(weight).max() for weight in network.weights)
    return np.float32(16 * 2**-24) * largest * np.sqrt(np.float32(steps))


def compare(options, network, data):
    """Rank 0 compares with a training of its own; all ranks compare their bits. Returns whether both agree."""
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in network.weights)).digest()
    digests = carole.allgather(np.frombuffer(digest, np.uint8).reshape(1, -1), name="digests")
    same = bool((digests == digests[0]).all())
    if carole.rank() != 0:
        return same
    print(f"same bits in the weights of all {carole.size()} ranks: {'yes' if same else 'NO'} (sha256 {digest.hex()[:16]})")
    alone = Network(seed=0)
    train_alone(options, alone, data)
    difference = max(np.abs(a - b).max() for a, b in zip(network.weights, alone.weights))
    steps = options.epochs * len(batches(len(data[0]), options.batch, 0))
    limit = tolerance(alone, steps)
    close = bool(difference <= limit)
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
    carole.init()
    if options.batch % carole.size():
        # The mean of the ranks' means is the mean of the batch only if all parts are equally large.
        parser.error(f"--batch {options.batch} does not divide by {carole.size()} ranks")
    data, test, what = load()
    network = Network(seed=carole.rank())
    train(options, network, data, test, what)
    # All ranks end alike, and not before rank 0 has said what it found.
    agreed = bool(carole.allreduce(np.array([compare(options, network, data)]), op=carole.Min, name="verdict")[0])
    carole.shutdown()
    sys.exit(0 if agreed else 1)


if __name__ == "__main__":
    main()

"""The well-known synthetic benchmark: a ResNet on random images, in images a second.

    carolerun -np 2 python resnet_synthetic.py --model resnet18 --batch-size 8 --image-size 64

As Horovod's pytorch_synthetic_benchmark.py prints it: the rate of each iteration on rank 0, then mean and deviation
per rank and in total. `--no-communication` leaves the reduction out: the difference is what communication costs.
"""

import argparse
import time

import torch
from torch import nn

import carole.torch as hvd


class Block(nn.Module):
    """A residual block: two 3 x 3 convolutions, or 1 x 1, 3 x 3 and 1 x 1 where it is a bottleneck."""

    def __init__(self, channels_in, width, stride, bottleneck):
        super().__init__()
        out = width * 4 if bottleneck else width
        if bottleneck:
            shapes = [(channels_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            shapes = [(channels_in, width, 3, stride), (width, width, 3, 1)]
        layers = []
        for a, b, kernel, step in shapes:
            layers += [nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(name):
    depths, bottleneck = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}[name]
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for number in range(depth):
            layers.append(Block(channels, width, 2 if stage and number == 0 else 1, bottleneck))
            channels = width * 4 if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=["resnet18", "resnet50"])
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-warmup-batches", type=int, default=10)
    parser.add_argument("--num-batches-per-iter", type=int, default=10)
    parser.add_argument("--num-iters", type=int, default=10)
    parser.add_argument("--compression", default="none", choices=["none", "fp16", "bf16", "onebit"])
    parser.add_argument("--groups", type=int, default=0, help="reduce gradients in so many groups")
    parser.add_argument("--no-communication", action="store_true")
    options = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    model = resnet(options.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    if not options.no_communication:
        optimizer = hvd.DistributedOptimizer(
            optimizer, model.named_parameters(), compression=getattr(hvd.Compression, options.compression),
            groups=options.groups or None,
        )  # fmt: skip
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    labels = torch.randint(0, 1000, (options.batch_size,))

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def say(words):
        if hvd.rank() == 0:
            print(words, flush=True)

    say(f"Model: {options.model}\nBatch size: {options.batch_size}\nNumber of CPUs: {hvd.size()}\nRunning warmup...")
    for _ in range(options.num_warmup_batches):
        step()
    say("Running benchmark...")
    rates = []
    for number in range(options.num_iters):
        started = time.perf_counter()
        for _ in range(options.num_batches_per_iter):
            step()
        rates.append(options.batch_size * options.num_batches_per_iter / (time.perf_counter() - started))
        say(f"Iter #{number}: {rates[-1]:.1f} img/sec per CPU")
    # The mean over the ranks, and 1.96 deviations of rank 0's iterations, as Horovod prints them.
    mean = float(hvd.allreduce(torch.tensor(sum(rates) / len(rates)), name="rate"))
    deviation = 1.96 * float(torch.tensor(rates).std(unbiased=False))
    say(f"Img/sec per CPU: {mean:.1f} +-{deviation:.1f}")
    say(f"Total img/sec on {hvd.size()} CPU(s): {hvd.size() * mean:.1f} +-{hvd.size() * deviation:.1f}")
    hvd.shutdown()


if __name__ == "__main__":
    main()

"""Training that outlives its processes, with PyTorch.

    carolerun -np 4 --min-np 2 --max-np 4 python elastic_torch.py

Kill one of the processes (`kill -9`): the others train on within a fraction of a second, from the last commit, and no
process is restarted; some seconds later a new one takes its place. With `--host-discovery-script ./hosts.sh`, a program
that prints lines like `localhost:4`, processes come and go as its lines do.
"""

import argparse
import os
import time

import torch

import carole.torch as hvd

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--pause", type=float, default=0.0, help="seconds between two steps, to have time to kill something")
arguments = parser.parse_args()

hvd.init()
torch.set_num_threads(1)
torch.manual_seed(0)

# Points of two spirals, to be told apart.
turn = torch.linspace(0, 3, 2048)
angle = torch.stack([turn * 4, turn * 4 + torch.pi])
points = torch.stack([turn * torch.cos(angle), turn * torch.sin(angle)], dim=-1).reshape(-1, 2)
labels = torch.arange(2).repeat_interleave(len(turn))

model = torch.nn.Sequential(
    torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
)
optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), model.named_parameters())
sampler = hvd.elastic.ElasticSampler(points, seed=1)
# All that must survive: models, optimizers and samplers by their state, anything else by value.
state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0, loss=0.0)


def report(words):
    print(f"process {os.getpid()}, rank {hvd.rank()} of {hvd.size()}: {words}", flush=True)


@hvd.elastic.run
def train(state):
    report(f"begins with epoch {state.epoch}, {sampler.processed_num} samples of it done")
    while state.epoch < arguments.epochs:
        order = torch.tensor(list(sampler))
        for number, batch in enumerate(order.split(arguments.batch)):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(points[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            sampler.record_batch(number, len(batch))
            state.loss = loss.item()
            # A step that is committed is never lost. It costs a copy of the state; each tenth may be enough.
            state.commit()
            time.sleep(arguments.pause)
        state.epoch += 1
        sampler.set_epoch(state.epoch)
        state.commit()


# The learning rate follows the number of ranks.
state.register_reset_callbacks([lambda: optimizer.param_groups[0].update(lr=0.01 * (hvd.size() / 4) ** 0.5)])
train(state)
right = (model(points).argmax(dim=1) == labels).float().mean()
report(f"done; {100 * right:.0f} % of the points are told apart")

"""What the workers of `test_elastic.py` run: `elastic_program.py FOLDER [torch]`. Each writes what it does to a file of its
own in the folder, and all end at the same step when there is a file named `end`."""

import json
import os
import sys
import time
from array import array
from pathlib import Path

import carole
import carole.elastic

FOLDER = Path(sys.argv[1])
LOG = open(FOLDER / f"log.{os.getpid()}", "a", buffering=1)
started = time.time()


def note(**what):
    what.update(rank=carole.rank(), size=carole.size(), epoch=carole.epoch(), time=time.time())
    LOG.write(json.dumps(what) + "\n")


def fail_once():
    """The first worker to come here fails."""
    try:
        os.close(os.open(FOLDER / "fails", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    sys.exit(3)


def ends():
    here = array("i", [int((FOLDER / "end").exists())])
    return carole.allreduce(here, op=carole.Max, name="end")[0]


def plain():
    """Counts steps: what all have added up is the number of ranks."""
    state = carole.elastic.ObjectState(step=0, sizes=[])
    state.register_reset_callbacks([lambda: note(reset=True)])

    @carole.elastic.run
    def train(state):
        note(begins=state.step)
        while not ends():
            ones = array("d", [1.0] * 20000)
            total = carole.allreduce(ones, op=carole.Sum, name="step")
            assert total[0] == total[19999] == carole.size()
            state.step += 1
            state.sizes.append(carole.size())
            if state.step % 5 == 0:
                note(step=state.step)
            state.commit()
        return state.step

    note(started=started)
    steps = train(state)
    note(ended=steps, sizes=len(state.sizes))


def torch_():
    """Fits a line. After each step the weights are the same on all ranks."""
    import torch

    import carole.torch as hvd

    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    inputs = torch.randn(4096, 4, generator=torch.Generator().manual_seed(5))
    targets = inputs @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]]) + 0.25
    sampler = hvd.elastic.ElasticSampler(inputs, seed=1)
    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, step=0, passes=0)

    @hvd.elastic.run
    def train(state):
        note(begins=state.step)
        while True:
            batch = []
            for index in sampler:
                batch.append(index)
                if len(batch) < 16:
                    continue
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(inputs[batch]), targets[batch])
                loss.backward()
                optimizer.step()
                sampler.record_batch(0, len(batch))
                state.step += 1
                batch = []
                if state.step % 5 == 0:
                    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
                    assert torch.equal(hvd.allreduce(flat, op=hvd.Max, name="check"), flat)
                    note(step=state.step, loss=float(loss))
                state.commit()
                if ends():
                    return float(loss)
            state.passes += 1
            sampler.set_epoch(state.passes)

    note(started=started)
    loss = train(state)
    note(ended=state.step, loss=loss)


if "fails" in sys.argv:
    fail_once()
carole.init()
if "torch" in sys.argv:
    torch_()
else:
    plain()
carole.shutdown()

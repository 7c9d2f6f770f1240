"""Lightning, Accelerate and DeepSpeed on the backend "carole", each against the same training in one process.

Part of `ci/long`, which makes a virtual environment that has them; not named test_*.py, so that pytest finds it only
when it is told to: `pytest bindings/python/tests/long_trainers.py`.
"""

import os
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: no trainer is tested")

import torch.distributed as dist  # noqa: E402
from harness import free_port, run  # noqa: E402

SIZE = 2
STEPS = 6
BATCH = 8


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))


def data():
    """The batches of all ranks together."""
    generator = torch.Generator().manual_seed(5)
    wanted = torch.randn(16, 4, generator=generator)
    x = torch.randn(BATCH * SIZE, 16, generator=generator)
    return [(x, x @ wanted)] * STEPS


def loss_of(output, target):
    return torch.nn.functional.mse_loss(output, target)


def reference():
    """One process that sees all batches."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for x, y in data():
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def agrees(losses, tolerance=2e-5):
    expected = reference()
    assert len(losses) == len(expected)
    assert all(abs(a - b) <= tolerance for a, b in zip(losses, expected)), (losses, expected)
    assert expected[-1] < expected[0]


def mean(loss):
    """The mean over the ranks, through the backend itself."""
    shown = loss.detach().clone().float()
    dist.all_reduce(shown)
    return shown.item() / dist.get_world_size()


def samples():
    """One data set, in an order in which rank r's batch k is its part of batch k."""
    return torch.utils.data.TensorDataset(torch.cat([x for x, _ in data()]), torch.cat([y for _, y in data()]))


def run_trainer(body, *arguments):
    """As torchrun would start it."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return run(SIZE, body, *arguments, init=False, env=variables, timeout_s=600)


def as_torchrun():
    """Gives this process the variables of torchrun in place of carolerun's."""
    rank, size = os.environ.pop("CAROLE_RANK"), os.environ.pop("CAROLE_SIZE")
    for name in ("CAROLE_LOCAL_RANK", "CAROLE_LOCAL_SIZE", "CAROLE_JOB"):
        del os.environ[name]
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
    # DeepSpeed compiles a part of itself, with the ninja of this environment.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    torch.set_num_threads(1)
    import carole.torch_backend  # noqa: F401

    return int(rank), int(size)


def lightning_module(losses):
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def training_step(self, batch, _):
            loss = loss_of(self.model(batch[0]), batch[1])
            losses.append(mean(loss))
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Module()


def body_lightning():
    rank, size = as_torchrun()
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    losses = []
    strategy = DDPStrategy(process_group_backend="carole")
    sampler = torch.utils.data.DistributedSampler(samples(), size, rank, shuffle=False)
    loader = torch.utils.data.DataLoader(samples(), batch_size=BATCH, sampler=sampler)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=size, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        plugins=[LightningEnvironment()],
    )  # fmt: skip
    trainer.fit(lightning_module(losses), loader)
    assert dist.get_backend() == "carole"
    agrees(losses)


def test_lightning():
    pytest.importorskip("lightning", reason="lightning is not installed: NOT tested")
    run_trainer(body_lightning)


def body_accelerate():
    as_torchrun()
    from accelerate import Accelerator

    os.environ["ACCELERATE_USE_CPU"] = "true"
    # Accelerate knows the names of some backends only, but takes a default group that is there.
    dist.init_process_group("carole")
    accelerator = Accelerator(cpu=True)
    assert dist.get_backend() == "carole" and accelerator.num_processes == SIZE
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(samples(), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(mean(loss))
        gathered = accelerator.gather(loss.detach().reshape(1))
        assert abs(gathered.mean().item() - losses[-1]) < 1e-6
    agrees(losses)


def test_accelerate():
    pytest.importorskip("accelerate", reason="accelerate is not installed: NOT tested")
    run_trainer(body_accelerate)


def body_deepspeed(stage):
    rank, size = as_torchrun()
    os.environ.update(DS_ACCELERATOR="cpu", DS_SKIP_CUDA_CHECK="1")
    dist.init_process_group("carole")
    import deepspeed

    assert dist.get_backend() == "carole"
    model = network()
    config = {
        "train_batch_size": BATCH * size,
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01), config=config, dist_init_required=False
    )
    losses = []
    for x, y in data():
        part = slice(rank * BATCH, (rank + 1) * BATCH)
        loss = loss_of(engine(x[part]), y[part])
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
    agrees(losses)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed(stage):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: NOT tested")
    run_trainer(body_deepspeed, stage)

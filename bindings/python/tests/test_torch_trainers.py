"""What trains through `torch.distributed`, on the backend "carole", against the same training in one process.
SKIPPED AS A WHOLE where torch is not installed; most of it needs a torch of the present."""

import tempfile

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: DDP, FSDP and DTensor are NOT tested")

import torch.distributed as dist  # noqa: E402
from harness import run_forked  # noqa: E402
from test_torch_backend import begin, new_only, run_c10d  # noqa: E402

STEPS = 5
BATCH = 12


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)
    )


def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(STEPS, BATCH, 16, generator=generator), torch.randn(STEPS, BATCH, 4, generator=generator)


def train(model, rank=0, size=1, parameters=None, forward=None):
    """The mean loss over all ranks, step by step."""
    optimizer = torch.optim.Adam(parameters or model.parameters(), lr=0.01)
    losses = []
    for x, y in zip(*data()):
        optimizer.zero_grad()
        output = (model if forward is None else forward)(x[rank::size])
        loss = torch.nn.functional.mse_loss(output, y[rank::size])
        loss.backward()
        optimizer.step()
        shown = loss.detach().clone()
        if size > 1:
            dist.all_reduce(shown)
        losses.append(shown.item() / size)
    return losses


def agrees(losses, tolerance=2e-5):
    expected = train(network())
    assert all(abs(a - b) <= tolerance for a, b in zip(losses, expected)), (losses, expected)
    assert expected[-1] < expected[0]


def body_ddp(kind):
    rank, size = begin()
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if rank == 0 else 0.5)
    options = {}
    if kind == "small buckets":
        options = {"bucket_cap_mb": 0.001}
    elif kind == "find_unused":
        options = {"find_unused_parameters": True}
    elif kind == "views":
        options = {"gradient_as_bucket_view": True}
    wrapped = torch.nn.parallel.DistributedDataParallel(model, **options)
    if kind == "fp16 hook":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        wrapped.register_comm_hook(None, fp16_compress_hook)
    elif kind == "own hook":

        def hook(state, bucket):
            future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0] / size)

        wrapped.register_comm_hook(None, hook)
    elif kind == "powerSGD":
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    losses = train(wrapped, rank, size)
    agrees(losses, {"fp16 hook": 1e-2, "powerSGD": 0.3}.get(kind, 2e-5))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everyone = [torch.empty_like(weights) for _ in range(size)]
    dist.all_gather(everyone, weights)
    assert all(torch.equal(weights, one) for one in everyone)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "kind", ["plain", "small buckets", "find_unused", "views", "own hook", "fp16 hook", "powerSGD"]
)
def test_ddp(kind):
    run_c10d(2, body_ddp, kind)


def body_ddp_join():
    rank, size = begin()
    model = torch.nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Ranks have different numbers of batches.
    with model.join():
        for x, y in list(zip(*data()))[: 2 + rank]:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    dist.destroy_process_group()


@new_only
def test_ddp_join():
    run_c10d(3, body_ddp_join)


def body_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    rank, size = begin()
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    agrees(train(model, rank, size))
    dist.destroy_process_group()


@new_only
@pytest.mark.parametrize("size", [2, 3])
def test_fsdp1(size):
    run_c10d(size, body_fsdp1)


def body_fsdp2(hybrid):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, size = begin()
    shape, names = ((2, size // 2), ("replicate", "shard")) if hybrid else ((size,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = network()
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    agrees(train(model, rank, size))
    save_and_load(model, rank)
    dist.destroy_process_group()


def save_and_load(model, rank):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, 0)
    state = get_model_state_dict(model)
    before = {name: value.full_tensor().clone() for name, value in state.items()}
    checkpoint.save(state, checkpoint_id=folder[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = get_model_state_dict(model)
    checkpoint.load(state, checkpoint_id=folder[0])
    for name, value in state.items():
        assert torch.equal(value.full_tensor(), before[name]), name


@new_only
@pytest.mark.parametrize("size, hybrid", [(2, False), (3, False), (4, True)])
def test_fsdp2(size, hybrid):
    run_c10d(size, body_fsdp2, hybrid)


def body_tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rank, size = begin()
    mesh = init_device_mesh("cpu", (size,))
    x = torch.arange(16.0).reshape(4, 4)
    product = distribute_tensor(x, mesh, [Shard(0)]) @ distribute_tensor(torch.eye(4), mesh, [Replicate()])
    assert torch.equal(product.redistribute(mesh, [Shard(1)]).full_tensor(), x)
    assert distribute_tensor(x, mesh, [Shard(1)]).sum().full_tensor() == x.sum()
    model = parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    # Every rank has the whole batch, so its own loss is the reference's.
    agrees(train(model))
    dist.destroy_process_group()


@new_only
def test_tensor_parallel():
    run_c10d(2, body_tensor_parallel)


def body_pipeline():
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, size = begin()
    whole = network()
    part = whole[:2] if rank == 0 else whole[2:]
    stage = PipelineStage(part, rank, size, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=3, loss_fn=torch.nn.functional.mse_loss)
    optimizer = torch.optim.Adam(part.parameters(), lr=0.01)
    losses = []
    for x, y in zip(*data()):
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            parts = []
            schedule.step(target=y, losses=parts)
            losses.append(sum(one.item() for one in parts) / len(parts))
        optimizer.step()
    if rank == 1:
        agrees(losses, 1e-4)
    dist.destroy_process_group()


@new_only
def test_pipeline_parallel():
    run_c10d(2, body_pipeline)


def body_compile():
    import torch.distributed._functional_collectives as functional

    rank, size = begin()
    group = dist.group.WORLD
    compiled = torch.compile(
        lambda x: functional.all_reduce(x * 2, "sum", group) + 1, backend="aot_eager", fullgraph=True
    )
    assert compiled(torch.ones(2)).tolist() == [2.0 * size + 1] * 2
    gathered = functional.all_gather_tensor(torch.full((2,), float(rank)), 0, group)
    assert (gathered + 0).tolist() == [float(r) for r in range(size) for _ in range(2)]
    scattered = functional.reduce_scatter_tensor(torch.ones(size * 2), "sum", 0, group)
    assert (scattered + 0).tolist() == [float(size)] * 2
    model = torch.nn.parallel.DistributedDataParallel(network())
    agrees(train(model, rank, size, forward=torch.compile(model, backend="aot_eager")))
    dist.destroy_process_group()


@new_only
def test_compile():
    run_c10d(2, body_compile)


def body_zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank, size = begin()
    model = torch.nn.parallel.DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    losses = []
    for x, y in zip(*data()):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x[rank::size]), y[rank::size])
        loss.backward()
        optimizer.step()
        shown = loss.detach().clone()
        dist.all_reduce(shown)
        losses.append(shown.item() / size)
    agrees(losses)
    dist.destroy_process_group()


def test_zero_redundancy_optimizer():
    run_c10d(2, body_zero)


def body_alone():
    return train(network())


def test_reference_is_the_same_everywhere():
    here = run_forked(2, body_alone, init=False)
    assert here[0] == here[1]

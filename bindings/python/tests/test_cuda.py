"""Tensors on a CUDA device. All ranks share the first one, as NCCL refuses to."""

import os

import pytest
from harness import free_port, run

torch = pytest.importorskip("torch", reason="torch is not installed: nothing on a device is tested")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SIZES = [2, 4]


def same(name, got, want):
    assert got.device.type == "cuda", (name, got.device)
    wanted = want.dtype
    assert got.dtype == want.dtype and tuple(got.shape) == tuple(want.shape), (name, got.shape, want.shape)
    got, want = got.cpu().double(), want.double()
    # Sums of large numbers that cancel are as exact as the numbers.
    slack = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float32: 1e-5}.get(wanted, 1e-12) * 64
    assert got.shape == want.shape and bool(((got - want).abs() <= slack).all()), (name, got, want)


def collectives():
    import carole.torch as hvd

    rank, size = hvd.rank(), hvd.size()

    def value(member, shape, dtype):
        generator = torch.Generator().manual_seed(100 + member)
        return (torch.randn(shape, generator=generator) * 8).to(dtype)

    count = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8):
        for shape in ((), (1,), (5, 3), (1000, 33), (1 << 18,)):
            inputs = [value(member, shape, dtype) for member in range(size)]
            mine = inputs[rank].cuda()
            exact = [tensor.double() for tensor in inputs]
            total = sum(exact).to(dtype) if dtype != torch.uint8 else sum(t.int() for t in inputs).to(torch.uint8)
            same("sum", hvd.allreduce(mine, op=hvd.Sum), total)
            same("max", hvd.allreduce(mine, op=hvd.Max), torch.stack(inputs).max(0).values)
            same("input", mine, inputs[rank])
            in_place = mine.clone()
            hvd.allreduce_(in_place, op=hvd.Sum)
            same("in place", in_place, total)
            same("broadcast", hvd.broadcast(mine, root_rank=size - 1), inputs[size - 1])
            group = hvd.grouped_allreduce([mine, mine[None]], op=hvd.Sum)
            same("grouped", group[1], total[None])
            count += 5
            if shape:
                rows = [tensor[: len(tensor) - member % len(tensor)] for member, tensor in enumerate(inputs)]
                same("allgather", hvd.allgather(rows[rank].cuda()), torch.cat(rows))
                same("reducescatter", hvd.reducescatter(mine, op=hvd.Sum), total.tensor_split(size)[rank])
                count += 2
            if shape and shape[0] >= size:
                splits = [len(mine) // size] * size
                splits[0] += len(mine) % size
                got, received = hvd.alltoall(mine, splits=splits)
                same("alltoall", got, torch.cat([tensor.split(splits)[rank] for tensor in inputs]))
                assert received.tolist() == [splits[rank]] * size
                count += 1
    return count


def order():
    """Collectives are ordered with the streams that make their inputs and use their results."""
    import carole.torch as hvd

    rank, size = hvd.rank(), hvd.size()
    wrong = 0
    side = torch.cuda.Stream()
    for step in range(20):
        with torch.cuda.stream(side if step % 2 else torch.cuda.current_stream()):
            x = torch.zeros(1 << 20, device="cuda")
            torch.cuda._sleep(20_000_000)
            x += rank + step
            handle = hvd.allreduce_async_(x, op=hvd.Sum)
            y = hvd.synchronize(handle) * 2
            wrong += int((y != 2 * (sum(range(size)) + size * step)).sum())
            # Memory that is given out again at once must not be written by the copy of an operation before.
            del x, y
            z = torch.full((1 << 20,), 7.0, device="cuda")
            wrong += int((z != 7).sum())
    return wrong


class ByInterface:
    """A tensor of torch that is seen by `__cuda_array_interface__` alone, as an array of CuPy is."""

    def __init__(self, tensor):
        self.tensor = tensor

    @property
    def __cuda_array_interface__(self):
        stream = torch.cuda.current_stream(self.tensor.device).cuda_stream
        return {**self.tensor.__cuda_array_interface__, "version": 3, "stream": stream or 1}


class ByOldInterface(ByInterface):
    @property
    def __cuda_array_interface__(self):
        return {**self.tensor.__cuda_array_interface__, "version": 2}


class ByDlpack:
    """The same by DLPack alone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)


def plain_arrays(kind):
    """`carole` without `carole.torch`, on tensors as they are or as another library's arrays."""
    import carole

    rank, size = carole.rank(), carole.size()
    wrap = {"torch": lambda tensor: tensor}.get(kind) or globals()[kind]
    # Version 2 says nothing of streams, so its arrays are made on the default stream.
    stream = torch.cuda.default_stream() if kind == "ByOldInterface" else torch.cuda.Stream()

    def tensor_of(result):
        if kind == "torch":
            assert isinstance(result, torch.Tensor)
            return result
        assert isinstance(result, carole.DeviceOutput)
        taken = torch.from_dlpack(result)
        assert taken.data_ptr() == result.__cuda_array_interface__["data"][0]
        return taken

    with torch.cuda.stream(stream):
        for step in range(10):
            values = [torch.arange(30_000.0).reshape(-1, 3) % 100 + member + step for member in range(size)]
            torch.cuda._sleep(5_000_000)
            x = values[rank].cuda(non_blocking=True)
            same("sum", tensor_of(carole.allreduce(wrap(x), carole.Sum)), sum(values))
            same("input", x, values[rank])
            same("broadcast", tensor_of(carole.broadcast(wrap(x), size - 1)), values[-1])
            rows = [part[: 5 * (member < size - 1)] for member, part in enumerate(values)]
            same("gathered", tensor_of(carole.allgather(wrap(x[: len(rows[rank])]))), torch.cat(rows))
            out = torch.empty_like(x)
            assert carole.grouped_allreduce([wrap(x)], carole.Sum, out=[wrap(out)])
            same("out", out, sum(values))
            carole.allreduce_async_(wrap(out), carole.Max, name="later").wait()
            same("in place", out, sum(values))
    return True


def directly():
    """What goes from device to device is what the host makes, to the bit, and what torch makes."""
    import carole.torch as hvd

    rank, size = hvd.rank(), hvd.size()
    for _ in range(100):
        hvd.allreduce(torch.ones(1 << 16, device="cuda"), name="meet")
    # The ranks' output is a file.
    with open("/proc/self/fd/2", errors="replace") as output:
        assert "from device to device" in output.read()
    generator = torch.Generator().manual_seed(rank)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8):
        average = [hvd.Average] if dtype.is_floating_point else []
        for op in (hvd.Sum, hvd.Min, hvd.Max, hvd.Product, *average):
            for count in (1 << 15, (1 << 20) + 3):
                host = (torch.rand(count, generator=generator) * 8).to(dtype)
                want = hvd.allreduce(host, op=op)
                mine = host.cuda()
                got = hvd.allreduce(mine, op=op)
                assert torch.equal(got.cpu(), want), (dtype, op, count)
                assert torch.equal(mine.cpu(), host)
                hvd.allreduce_(mine, op=op)
                assert torch.equal(mine.cpu(), want), (dtype, op, count, "in place")
    many = [torch.full((997 * (i + 1),), float(rank + i), device="cuda") for i in range(100)]
    handles = [hvd.allreduce_async_(one, op=hvd.Sum, name=f"many.{i}") for i, one in enumerate(many)]
    for i, handle in enumerate(handles):
        got = hvd.synchronize(handle)
        assert (got == sum(range(size)) + size * i).all(), i
    return collectives()


def c10d():
    """torch.distributed on device tensors, DDP among them, against one process."""
    import torch.distributed as dist

    import carole.torch_backend  # noqa: F401

    rank, size = (int(os.environ[name]) for name in ("CAROLE_RANK", "CAROLE_SIZE"))
    dist.init_process_group("carole", init_method="env://", rank=rank, world_size=size)
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.full((1000,), rank + 1.0, device="cuda")
    dist.all_reduce(x)
    assert (x == size * (size + 1) / 2).all()
    rows = [torch.empty(3, device="cuda") for _ in range(size)]
    dist.all_gather(rows, torch.full((3,), float(rank), device="cuda"))
    assert [row[0].item() for row in rows] == list(range(size))
    part = torch.empty(4, device="cuda")
    dist.reduce_scatter_tensor(part, torch.arange(4.0 * size, device="cuda"))
    assert part.tolist() == [size * (4 * rank + i) for i in range(4)]
    mine = torch.empty(size, device="cuda")
    dist.all_to_all_single(mine, torch.arange(float(size), device="cuda") + 10 * rank)
    assert mine.tolist() == [rank + 10 * peer for peer in range(size)]
    got = torch.empty(5, device="cuda")
    send = dist.isend(torch.full((5,), float(rank), device="cuda"), (rank + 1) % size)
    dist.recv(got, (rank - 1) % size)
    send.wait()
    assert (got == (rank - 1) % size).all()
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert [one["rank"] for one in objects] == list(range(size))
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10)).cuda()
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def mean(loss):
        dist.all_reduce(loss)
        return loss.item() / size

    found = list(losses(model, optimizer, rank, size, 30, mean))
    dist.destroy_process_group()
    return found


def given_up():
    """Handles that nobody waits for, and memory that is freed meanwhile."""
    import carole.torch as hvd

    for step in range(20):
        hvd.allreduce_async_(torch.ones(1 << 18, device="cuda"), name=f"lost.{step}")
    hvd.barrier()
    return float(hvd.allreduce(torch.ones(4, device="cuda"), op=hvd.Sum).sum())


def mixed():
    import carole
    import carole.torch as hvd

    x = torch.ones(8, device="cuda" if hvd.rank() == 0 else "cpu")
    try:
        hvd.allreduce(x, name="mixed")
    except Exception as error:  # noqa: BLE001
        words = f"{type(error).__name__}: {error}"
    else:
        words = "nothing was raised"
    del carole
    # The group goes on.
    return words, float(hvd.allreduce(torch.ones(1, device="cuda"), op=hvd.Sum))


def train(steps):
    import carole.torch as hvd

    rank, size = hvd.rank(), hvd.size()
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    return list(losses(model, optimizer, rank, size, steps, lambda loss: hvd.allreduce(loss).item()))


def losses(model, optimizer, rank, size, steps, mean):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(64, 64, generator=generator)
        y = torch.randint(0, 10, (64,), generator=generator)
        mine = slice(rank * 64 // size, (rank + 1) * 64 // size)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[mine].cuda()), y[mine].cuda())
        loss.backward()
        optimizer.step()
        yield mean(loss.detach())


def dies(victim):
    import signal
    import time

    import carole.torch as hvd

    for step in range(1000):
        if step == 20 and hvd.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            hvd.allreduce(torch.ones(1 << 20, device="cuda"), name="step")
        except hvd.HorovodInternalError as error:
            return str(error), time.monotonic() - began
    return None


def rendezvous():
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_collective_gives_what_torch_gives(size, transport):
    counts = run(size, collectives, env={"CAROLE_TRANSPORT": transport})
    assert min(counts) == max(counts) > 200


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("memory", ["1M", "128M"])
def test_tensors_go_from_device_to_device(size, memory):
    env = {"CAROLE_DIRECT_BYTES": "4096", "CAROLE_DIRECT_MEMORY": memory, "CAROLE_LOG_LEVEL": "info"}
    counts = run(size, directly, env=env)
    assert min(counts) == max(counts) > 200


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("least", ["4096", "1T"])
def test_streams_are_waited_for(size, least):
    assert run(size, order, env={"CAROLE_DIRECT_BYTES": least}) == [0] * size


@pytest.mark.parametrize("kind", ["torch", "ByInterface", "ByOldInterface", "ByDlpack"])
def test_plain_carole_takes_arrays_of_a_device(kind):
    assert run(2, plain_arrays, kind) == [True] * 2


def test_handles_may_be_given_up():
    assert run(2, given_up) == [8.0, 8.0]


def test_a_tensor_on_the_host_does_not_meet_one_on_a_device():
    for words, total in run(2, mixed):
        assert "host memory" in words and "CUDA" in words and "rank 0" in words and "rank 1" in words, words
        assert total == 2


@pytest.mark.parametrize("way", ["DistributedOptimizer", "DDP"])
def test_training_gives_the_losses_of_one_process(way):
    together = run(2, train, 30) if way == "DistributedOptimizer" else run(2, c10d, init=False, env=rendezvous())
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    alone = list(losses(model, optimizer, 0, 1, 30, lambda loss: loss.item()))
    assert together[0] == together[1]
    assert all(abs(a - b) < 1e-4 for a, b in zip(together[0], alone)), (together[0], alone)


def test_a_death_is_told_to_those_who_wait_with_tensors_on_a_device():
    first, second, third = run(3, dies, 2, may_die=[2])
    assert third is None
    for words, seconds in (first, second):
        assert "rank 2" in words and seconds < 5, (words, seconds)

"""What `carole.torch` has around the collectives: optimizers, sync batch norm, compression, elastic state, timeline.
SKIPPED AS A WHOLE where torch is not installed."""

import copy
import json
import os
import pickle
import signal
import tempfile
import warnings

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training with carole.torch is NOT tested")

import carole.torch as hvd  # noqa: E402
from harness import catch  # noqa: E402
from harness import run_forked as run  # noqa: E402


def network():
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def batches(count=8):
    return torch.randn(count, 12, 6, generator=torch.Generator().manual_seed(1))


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def same_everywhere(tensor):
    return all(torch.equal(tensor, one) for one in hvd.allgather_object(tensor))


def sgd(model, **options):
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), **options)


def body_groups():
    me = hvd.rank()
    # Predivide with groups: the division is split, and the result is the average.
    for options in ({}, {"groups": 2}, {"groups": 2, "gradient_predivide_factor": 4.0}):
        model = network()
        optimizer = sgd(model, **options)
        model(batches()[0][me::2]).pow(2).mean().backward()
        optimizer.synchronize()
        mine = [parameter.grad.clone() for parameter in model.parameters()]
        alone = network()
        alone(batches()[0]).pow(2).mean().backward()
        for a, b in zip(mine, alone.parameters()):
            assert torch.allclose(a, b.grad, atol=1e-6), options
    # A group with a sparse gradient, and with parameters that one rank has no gradient for.
    for dense in (False, True):
        table = torch.nn.Embedding(6, 2, sparse=True)
        head, idle = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        parts = torch.nn.ModuleList([table, head, idle])
        hvd.broadcast_parameters(parts.state_dict(), 0)
        inner = torch.optim.SGD(parts.parameters(), lr=0.5)
        optimizer = hvd.DistributedOptimizer(
            inner, [(f"{dense}.{n}", p) for n, p in parts.named_parameters()], groups=1, sparse_as_dense=dense
        )
        for step in range(3):
            optimizer.zero_grad(set_to_none=True)
            if me == 0 or step == 2:
                head(table(torch.tensor([step, 3]))).sum().backward()
            else:
                # Rank 1 uses other parameters: no gradient at all for the table and the head.
                idle(torch.ones(1, 2)).sum().backward()
            optimizer.synchronize()
            assert table.weight.grad.is_sparse != dense
            with optimizer.skip_synchronize():
                optimizer.step()
            assert same_everywhere(weights(parts)), (dense, step)


def body_optimizers():
    me, size = hvd.rank(), hvd.size()
    # Parameter groups added later are reduced, too.
    first, second = network(), torch.nn.Linear(3, 2)
    hvd.broadcast_parameters(second.state_dict(), 0)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(first.parameters(), lr=0.1), first.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    second(first(batches()[0][me::size])).pow(2).mean().backward()
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.01})
    for batch in batches():
        optimizer.zero_grad(set_to_none=True)
        second(first(batch[me::size])).pow(2).mean().backward()
        optimizer.step()
    assert same_everywhere(torch.cat([weights(first), weights(second)]))
    assert len(optimizer.state_dict()["param_groups"]) == 2 and isinstance(optimizer, torch.optim.SGD)
    # A state goes into a fresh optimizer, and training goes on alike.
    model = network()
    optimizer = sgd(model)
    for batch in batches(3):
        optimizer.zero_grad()
        model(batch[me::size]).pow(2).mean().backward()
        optimizer.step()
    twin = network()
    twin.load_state_dict(model.state_dict())
    other = hvd.DistributedOptimizer(
        torch.optim.SGD(twin.parameters(), lr=0.7, momentum=0.9), [("t." + n, p) for n, p in twin.named_parameters()]
    )
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (twin, other)):
        its.zero_grad()
        one(batches()[5][me::size]).pow(2).mean().backward()
        its.step()
    assert torch.equal(weights(model), weights(twin))


def body_views():
    me, size = hvd.rank(), hvd.size()

    def train(make, steps=6, passes=1, **options):
        model, alone = network(), network()
        inner, reference = make(model.parameters()), make(alone.parameters())
        named = [(f"{options}.{n}", p) for n, p in model.named_parameters()]
        optimizer = hvd.DistributedOptimizer(
            inner, named, gradient_as_bucket_view=True, backward_passes_per_step=passes, **options
        )
        for number, batch in enumerate(batches(steps)):
            # Gradients that somebody else has set to None come back into the region.
            model.zero_grad(set_to_none=True) if number == 2 else optimizer.zero_grad(set_to_none=True)
            for piece in batch[me::size].chunk(passes):
                (model(piece).pow(2).mean() / passes).backward()
            optimizer.step()
            grads = [parameter.grad for parameter in model.parameters()]
            homes = {grad.storage().data_ptr() for grad in grads}
            assert len(homes) == len(set(getattr(optimizer, "_carole").buckets)) < len(grads), options
            reference.zero_grad()
            alone(batch).pow(2).mean().backward()
            reference.step()
        assert same_everywhere(weights(model)), options
        return (weights(model) - weights(alone)).abs().max()

    def momentum(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    for options in ({}, {"groups": 2}, {"groups": 2, "gradient_predivide_factor": 2.0}, {"passes": 2}):
        assert train(momentum, **options) < 1e-5, options
    assert train(momentum, compression=hvd.Compression.bf16) < 1e-1
    assert train(lambda parameters: torch.optim.AdamW(parameters, lr=0.01)) < 1e-5
    train(momentum, compression=hvd.Compression.onebit)
    # A parameter that only one rank uses, one that none uses, one that is added later, and another type.
    parts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double()])
    late = torch.nn.Linear(2, 2)
    for module in (parts, late):
        hvd.broadcast_parameters(module.state_dict(), 0)
    inner = torch.optim.SGD(parts.parameters(), lr=0.5)
    optimizer = hvd.DistributedOptimizer(inner, parts.named_parameters(), gradient_as_bucket_view=True)
    optimizer.add_param_group({"params": late.parameters()})
    assert len(getattr(optimizer, "_carole").buckets) == 3
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.ones(1, 2)
        (parts[0](x).sum() + late(x).sum() if me else parts[2](x.double()).sum()).backward()
        optimizer.synchronize()
        assert parts[0].bias.grad.tolist() == [0.5, 0.5] == late.bias.grad.tolist()
        assert parts[1].bias.grad.tolist() == [0.0, 0.0] and parts[2].bias.grad.tolist() == [0.5, 0.5]
        with optimizer.skip_synchronize():
            optimizer.step()
    # A sparse gradient adds to a region, but cannot take its place.
    table = torch.nn.Embedding(4, 2, sparse=True)
    hvd.broadcast_parameters(table.state_dict(), 0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(table.parameters(), lr=0.5), [("table", table.weight)], gradient_as_bucket_view=True
    )
    table(torch.tensor([me])).sum().backward()
    optimizer.step()
    assert table.weight.grad[:3].tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]
    table.weight.grad = None
    assert "sparse_as_dense" in catch(ValueError, lambda: table(torch.tensor([me])).sum().backward())


def body_compiled():
    if not hasattr(torch, "compile"):
        return "skipped"
    me, size = hvd.rank(), hvd.size()
    model, alone = network(), network()
    optimizer, reference = sgd(model, groups=2), torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    compiled = torch.compile(model, backend="aot_eager")
    for batch in batches():
        for one, its, rows in ((compiled, optimizer, batch[me::size]), (alone, reference, batch)):
            its.zero_grad()
            one(rows).pow(2).mean().backward()
            its.step()
    assert torch.allclose(weights(model), weights(alone), atol=1e-5)
    return "done"


def body_lbfgs():
    me, size = hvd.rank(), hvd.size()

    def train(rank, ranks, wrap):
        model = network()
        inner = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        optimizer = hvd.DistributedOptimizer(inner, model.named_parameters()) if wrap else inner
        for batch in batches(2):

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = model(batch[rank::ranks]).pow(2).mean()
                loss.backward()
                return hvd.allreduce(loss.detach()) if wrap else loss

            optimizer.step(closure)
        return weights(model)

    assert torch.allclose(train(me, size, True), train(0, 1, False), atol=1e-4)


def body_scaler():
    me, size = hvd.rank(), hvd.size()
    make = getattr(getattr(torch, "amp", None), "GradScaler", None)
    if make is None:
        return "skipped"
    model, alone = network(), network()
    optimizer = sgd(model)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    scaler = make("cpu", init_scale=1024.0)
    for number, batch in enumerate(batches()):
        optimizer.zero_grad()
        loss = model(batch[me::size]).pow(2).mean()
        # One rank overflows once: no rank takes that step.
        scaler.scale(loss * float("inf") if (number, me) == (3, 1) else loss).backward()
        if number % 2:
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        if number != 3:
            reference.zero_grad()
            alone(batch).pow(2).mean().backward()
            reference.step()
    assert scaler.get_scale() == 512.0
    assert torch.allclose(weights(model), weights(alone), atol=1e-5)
    assert same_everywhere(weights(model))
    return "done"


def body_compression():
    me, size = hvd.rank(), hvd.size()
    assert "onebit" in vars(hvd.Compression)
    compressor = hvd.Compression.onebit()
    # What is left out comes later: sums over many steps agree with the sum of what was asked for.
    generator = torch.Generator().manual_seed(me)
    wanted = [torch.randn(37, generator=generator) for _ in range(60)]
    got = sum(compressor.exchange(x, "x", hvd.Average, 1.0, 1.0, hvd.global_process_set)() for x in wanted)
    total = hvd.allreduce(sum(wanted))
    left = hvd.allreduce(compressor.state_dict()["x"])
    assert torch.allclose(got + left, total, atol=1e-4)
    assert left.abs().max() < 10
    fresh = hvd.Compression.onebit()
    fresh.load_state_dict(compressor.state_dict())
    pair = [one.exchange(wanted[0], f"y{i}", hvd.Sum, 1.0, 1.0, hvd.global_process_set)() for i, one in
            enumerate((compressor, fresh))]  # fmt: skip
    assert torch.equal(*pair)
    catch(ValueError, lambda: compressor.exchange(wanted[0], "z", hvd.Max, 1.0, 1.0, hvd.global_process_set))
    for options in ({}, {"groups": 2}):
        model = network()
        inner = torch.optim.SGD(model.parameters(), lr=0.02)
        named = [(f"{options}.{n}", p) for n, p in model.named_parameters()]
        optimizer = hvd.DistributedOptimizer(inner, named, compression=hvd.Compression.onebit, **options)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = model(batches()[0][me::size]).pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(float(hvd.allreduce(loss.detach())))
        assert losses[-1] < 0.5 * losses[0], losses
        assert same_everywhere(weights(model))


def body_batch_norm():
    me, size = hvd.rank(), hvd.size()
    for shape, kind in (((7, 4), torch.nn.BatchNorm1d), ((7, 4, 3), torch.nn.BatchNorm1d),
                        ((7, 4, 2, 3), torch.nn.BatchNorm2d)):  # fmt: skip
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3 + 5
        for affine, momentum in ((True, 0.1), (False, None)):
            reference = kind(4, affine=affine, momentum=momentum)
            mine = hvd.SyncBatchNorm(4, affine=affine, momentum=momentum)
            x = whole.clone().requires_grad_()
            (reference(x) ** 3).sum().backward()
            # Uneven parts.
            rows = slice(0, 2) if me == 0 else slice(2, 7) if me == 1 else slice(7, 7)
            part = whole[rows].clone().requires_grad_()
            (mine(part) ** 3).sum().backward()
            assert torch.allclose(part.grad, x.grad[rows], atol=1e-3), (shape, affine)
            assert torch.allclose(mine.running_mean, reference.running_mean, atol=1e-5)
            assert torch.allclose(mine.running_var, reference.running_var, atol=1e-4)
            if affine:
                for a, b in ((mine.weight, reference.weight), (mine.bias, reference.bias)):
                    assert torch.allclose(hvd.allreduce(a.grad, op=hvd.Sum), b.grad, rtol=1e-3, atol=1e-3)
            mine.eval(), reference.eval()
            assert torch.allclose(mine(whole), reference(whole), atol=1e-5)
    catch(ValueError, lambda: hvd.SyncBatchNorm(4)(torch.ones(4)))
    assert size


def body_elastic():
    me, size = hvd.rank(), hvd.size()
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(me)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sampler = hvd.elastic.ElasticSampler(list(range(10)), seed=3)
    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, batch=me, notes=[me])
    state.sync()
    assert same_everywhere(weights(model)) and state.batch == 0 and state.notes == [0]
    model(batches()[0]).sum().backward()
    optimizer.step()
    sampler.record_batch(0, 2)
    state.batch, kept = 5, weights(model)
    state.notes.append("kept")
    state.commit()
    optimizer.step()
    state.batch = 9
    state.notes.append("lost")
    sampler.record_batch(1, 2)
    state.restore()
    assert torch.equal(weights(model), kept) and state.batch == 5 and state.notes == [0, "kept"]
    assert sampler.processed_num == 2 * size
    assert all(s["momentum_buffer"] is not None for s in optimizer.state_dict()["state"].values())
    left = hvd.allgather_object(list(sampler))
    assert {i for part in left for i in part} == set(sampler.remaining_indices)
    assert len({len(part) for part in left}) == 1 == len({len(sampler), len(left[0])})
    # Rank 0 hears of new hosts: all ranks stop at the same commit.
    if me == 0:
        state.on_hosts_updated(100.0, 1)
    try:
        state.commit()
        raise AssertionError("no interrupt")
    except hvd.HostsUpdatedInterrupt as interrupt:
        assert interrupt.skip_sync
    # The loop: a failure goes back to the commit, and reset callbacks run.
    calls, resets = [], []
    state.register_reset_callbacks([lambda: resets.append(1)])

    @hvd.elastic.run
    def train(state, word):
        calls.append(state.batch)
        state.batch += 1
        if len(calls) < 3:
            raise hvd.HorovodInternalError("as if a rank were lost")
        return word

    assert train(state, "done") == "done"
    assert calls == [5, 5, 5] and len(resets) == 2 and hvd.size() == size


def body_mutation():
    x = torch.ones(100)
    hvd.detect_mutation()
    handle = hvd.allreduce_async_(x, name="m")
    x[3] = 7
    assert "was written 1 times" in catch(hvd.HorovodInternalError, lambda: hvd.synchronize(handle))
    assert (hvd.allreduce(torch.ones(3), op=hvd.Sum) == hvd.size()).all()
    hvd.detect_mutation(False)
    handle = hvd.allreduce_async_(x, name="m")
    x[3] = 7
    hvd.synchronize(handle)


def body_gradient_mutation():
    """What is written to a gradient that is on its way would be lost, whatever is really on its way."""
    me = hvd.rank()
    cases = [
        {}, {"compression": hvd.Compression.fp16}, {"compression": hvd.Compression.onebit}, {"groups": 1},
        {"groups": 1, "compression": hvd.Compression.fp16}, {"gradient_as_bucket_view": True},
        {"gradient_as_bucket_view": True, "compression": hvd.Compression.fp16},
        {"gradient_as_bucket_view": True, "compression": hvd.Compression.onebit},
    ]  # fmt: skip
    hvd.detect_mutation()
    for options in cases:
        model = network()
        optimizer = sgd(model, **options)

        def backward():
            optimizer.zero_grad()
            model(batches()[0][me::2]).pow(2).mean().backward()

        # Nothing is found where nothing is written.
        for _ in range(2):
            backward()
            optimizer.step()
        backward()
        model[0].weight.grad.mul_(2)
        text = catch(hvd.HorovodInternalError, optimizer.step)
        # Of a group or a region the name is that of its operation, which names one parameter.
        assert "was written 1 times" in text and any(name in text for name, _ in model.named_parameters()), text
        if "gradient_as_bucket_view" not in options and "compression" in options:
            backward()
            model[0].weight.grad = torch.zeros_like(model[0].weight)
            text = catch(hvd.HorovodInternalError, optimizer.step)
            assert "'0.weight'" in text and "was replaced" in text, text
    table = torch.nn.Embedding(6, 2, sparse=True)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(table.parameters(), lr=0.5), table.named_parameters())
    for writes in (False, True):
        optimizer.zero_grad()
        table(torch.tensor([me, 3])).sum().backward()
        if writes:
            table.weight.grad.mul_(2)
            assert "'weight'" in catch(hvd.HorovodInternalError, optimizer.step)
        else:
            optimizer.step()
    hvd.detect_mutation(False)


def body_copies():
    """A pickled or copied optimizer is one like the first, with its state, and of the model that went with it."""
    me, size = hvd.rank(), hvd.size()
    own = [hvd.add_process_set([rank]) for rank in range(size)][me]
    ways = [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))]
    for way in ways:
        for options in (
            {}, {"compression": hvd.Compression.onebit, "groups": 2}, {"gradient_as_bucket_view": True},
            {"op": hvd.Adasum}, {"gradient_predivide_factor": 2.0, "backward_passes_per_step": 2},
        ):  # fmt: skip
            model = network()
            optimizer = sgd(model, **options)
            torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

            def train(model, optimizer):
                for batch in batches(3):
                    optimizer.zero_grad()
                    for piece in batch[me::size].chunk(options.get("backward_passes_per_step", 1)):
                        model(piece).pow(2).mean().backward()
                    optimizer.step()

            train(model, optimizer)
            twin, other = way((model, optimizer))
            assert type(other).__name__ == "SGD" and isinstance(other, torch.optim.SGD)
            mine = {id(parameter) for parameter in twin.parameters()}
            assert all(id(parameter) in mine for group in other.param_groups for parameter in group["params"])
            assert torch.equal(weights(model), weights(twin))
            for one, its in ((model, optimizer), (twin, other)):
                train(one, its)
            assert torch.equal(weights(model), weights(twin)), options
            assert same_everywhere(weights(twin)), options
        assert way(hvd.global_process_set) is hvd.global_process_set and way(own) is own
        assert getattr(way(sgd(network(), process_set=own)), "_carole").process_set is own
    assert "deepcopy" in catch(TypeError, lambda: copy.copy(optimizer))
    # Loaded where there is no job, it is what was wrapped.
    saved = pickle.dumps((model, optimizer))
    hvd.shutdown()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, alone = pickle.loads(saved)
    assert type(alone) is torch.optim.SGD and len(alone.state) == 4
    assert any("before init()" in str(warning.message) for warning in caught), caught
    hvd.init()


def body_timeline(folder):
    me = hvd.rank()
    path = os.path.join(folder, "trace.json")
    hvd.start_timeline(path, mark_cycles=True)
    mine = path if me == 0 else os.path.join(folder, f"trace.{me}.json")
    for step in range(3):
        hvd.allreduce(torch.ones(4), name="x")
        events = json.load(open(mine))
        assert sum(event["ph"] == "E" for event in events) == step + 1
    handle = hvd.allgather_async(torch.ones(2, 3), name="y")
    events = json.load(open(mine))
    assert events[-1]["ph"] == "B" and events[-1]["name"] == "ALLGATHER" and events[-1]["args"]["shape"] == [[2, 3]]
    hvd.synchronize(handle)
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["allreduce.x", "allgather.y"]
    hvd.stop_timeline()
    size = os.path.getsize(mine)
    hvd.allreduce(torch.ones(4), name="x")
    assert os.path.getsize(mine) == size
    hvd.shutdown()
    os.environ["HOROVOD_TIMELINE"] = path
    hvd.init()
    hvd.barrier()
    if me == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "body", [body_groups, body_optimizers, body_lbfgs, body_scaler, body_compression, body_elastic, body_mutation,
     body_gradient_mutation, body_copies, body_compiled, body_views],
    ids=lambda body: body.__name__[5:],
)  # fmt: skip
def test_two_ranks(body):
    if run(2, body)[0] == "skipped":
        pytest.skip(f"torch {torch.__version__} has no GradScaler for the CPU, and no torch.compile")


@pytest.mark.parametrize("size", [1, 3])
def test_sync_batch_norm(size):
    if size == 1:
        hvd.init()
        try:
            x = torch.randn(5, 4)
            assert torch.allclose(hvd.SyncBatchNorm(4)(x), torch.nn.BatchNorm1d(4)(x), atol=1e-6)
        finally:
            hvd.shutdown()
    else:
        run(size, body_batch_norm)


def test_timeline():
    with tempfile.TemporaryDirectory() as folder:
        run(2, body_timeline, folder, may_die=(0, 1))
        # Rank 1 was killed, and its file is whole.
        assert json.load(open(os.path.join(folder, "trace.1.json")))
        assert json.load(open(os.path.join(folder, "trace.json")))


def test_timeline_needs_init():
    catch(ValueError, lambda: hvd.start_timeline("/nonexistent/x.json"))
    catch(ValueError, hvd.stop_timeline)

"""carole.torch on real processes. SKIPPED AS A WHOLE where torch is not installed."""

import warnings

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: carole.torch is NOT tested")

import carole  # noqa: E402
import carole.torch as hvd  # noqa: E402
from harness import catch  # noqa: E402
from harness import run_forked as run  # noqa: E402

TYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
         torch.bfloat16]  # fmt: skip


def values(rank, shape, dtype):
    count = 1
    for extent in shape:
        count *= extent
    return ((torch.arange(count) * 3 + rank) % 4).reshape(shape).to(dtype)


def body_tensors(watched):
    # Where somebody looks on, tensors go another way into the engine.
    hvd.detect_mutation(watched)
    me, size = hvd.rank(), hvd.size()
    for dtype in TYPES:
        for shape in ((), (0,), (5,), (2, 3)):
            what = (dtype, shape)
            inputs = [values(rank, shape, dtype) for rank in range(size)]
            wide = torch.float64 if dtype.is_floating_point else torch.int64
            total = sum(one.to(wide) for one in inputs).to(dtype)
            x = inputs[me].clone()
            for result in (
                hvd.allreduce(x, op=hvd.Sum), hvd.allreduce(x, average=False),
                hvd.synchronize(hvd.allreduce_async(x, op=hvd.Sum, name=f"a{what}")),
                hvd.grouped_allreduce([x, x], op=hvd.Sum)[1],
            ):  # fmt: skip
                assert result.dtype == dtype and torch.equal(result, total), (what, result, total)
            assert torch.equal(x, inputs[me])
            assert hvd.allreduce_(x, op=hvd.Sum) is x and torch.equal(x, total), what
            pair = [inputs[me].clone(), inputs[me].clone()]
            result = hvd.grouped_allreduce_(pair, op=hvd.Sum)
            assert all(a is b for a, b in zip(result, pair)) and torch.equal(pair[0], total)
            for root in range(size):
                x = inputs[me].clone()
                assert torch.equal(hvd.broadcast(x, root), inputs[root]) and torch.equal(x, inputs[me])
                assert hvd.broadcast_(x, root) is x and torch.equal(x, inputs[root])
        rows = [values(rank, (rank, 2), dtype) for rank in range(size)]
        assert torch.equal(hvd.allgather(rows[me]), torch.cat(rows))
        assert torch.equal(hvd.grouped_allgather([rows[me]])[0], torch.cat(rows))
        matrices = [values(rank, (size * 2 + 1, 2), dtype) for rank in range(size)]
        total = sum(one.to(torch.float64) for one in matrices).to(dtype)
        mine = total[me * 2 + min(me, 1) :][: 2 + (me == 0)]
        assert torch.equal(hvd.reducescatter(matrices[me], op=hvd.Sum), mine)
        assert torch.equal(hvd.grouped_reducescatter([matrices[me]], op=hvd.Sum)[0], mine)
        equal = [values(rank, (size, 3), dtype) for rank in range(size)]
        assert torch.equal(hvd.alltoall(equal[me]), torch.stack([one[me] for one in equal]))
        splits = torch.tensor([me + 1] * size, dtype=torch.int32)
        sent = [values(rank, (size * (rank + 1),), dtype) for rank in range(size)]
        output, received = hvd.alltoall(sent[me], splits)
        assert received.tolist() == [rank + 1 for rank in range(size)] and received.dtype == torch.int32
        parts = [sent[rank][me * (rank + 1) : (me + 1) * (rank + 1)] for rank in range(size)]
        assert torch.equal(output, torch.cat(parts))
    flags = hvd.allgather(torch.tensor([me % 2 == 0]))
    assert flags.dtype == torch.bool and flags.tolist() == [rank % 2 == 0 for rank in range(size)]
    handle = hvd.allreduce_async(torch.ones(2))
    hvd.synchronize(handle)
    assert hvd.synchronize(handle) is None
    assert "synchronized already" in catch(ValueError, lambda: hvd.poll(handle))
    for call in (hvd.poll, hvd.synchronize, carole.poll, carole.wait):
        assert "12345 is no handle" in catch(ValueError, lambda: call(12345))
    hvd.barrier()
    return hvd.join()


@pytest.mark.parametrize("size, watched", [(1, False), (2, False), (2, True), (3, False)])
def test_tensors(size, watched):
    assert len(set(run(size, body_tensors, watched))) == 1


def body_views():
    """Tensors whose bytes are not their values one behind the other; types without a test above."""
    me, size = hvd.rank(), hvd.size()
    z = torch.complex(torch.arange(3.0), torch.full((3,), me + 1.0))
    total = torch.complex(torch.arange(3.0) * size, torch.full((3,), size * (size + 1) / 2))
    assert torch.equal(hvd.allreduce(z, op=hvd.Sum), total)
    for lazy in (z.conj(), z[:1].conj().imag):
        assert "resolve_conj" in catch(ValueError, lambda lazy=lazy: hvd.allreduce(lazy, op=hvd.Sum))
        assert "resolve_conj" in catch(ValueError, lambda lazy=lazy: hvd.grouped_allreduce([lazy], op=hvd.Sum))
        hvd.barrier()
    assert torch.equal(hvd.allreduce(z.conj().resolve_conj(), op=hvd.Sum), total.conj())
    assert "on meta" in catch(ValueError, lambda: hvd.allreduce(torch.ones(2, device="meta")))
    hvd.barrier()
    part = torch.arange(12.0).reshape(3, 4)[1]
    hvd.allreduce_(part, op=hvd.Sum)
    assert torch.equal(part, torch.arange(4.0, 8.0) * size)
    weight = torch.nn.Parameter(torch.full((2,), me + 1.0))
    assert torch.equal(hvd.broadcast_(weight.data, size - 1), torch.full((2,), float(size)))
    assert hvd.allreduce(weight, op=hvd.Max).requires_grad and not hvd.synchronize(
        hvd.allreduce_async(weight, op=hvd.Max)
    ).requires_grad
    row = torch.ones(1, 3).expand(1, 3)[:, :2]
    assert torch.equal(hvd.allreduce(row, op=hvd.Sum), torch.full((1, 2), float(size)))
    for wrong in ({"op": 99}, {"prescale_factor": "x"}):
        catch((ValueError, TypeError), lambda wrong=wrong: hvd.allreduce_(torch.ones(2), **{"op": hvd.Sum, **wrong}))
        hvd.barrier()
    handles = [hvd.allreduce_async_(torch.ones(4), name=f"many.{i}", op=hvd.Sum) for i in range(300)]
    assert all(hvd.synchronize(handle)[0] == size for handle in handles)
    assert all(hvd.synchronize(handle) is None for handle in handles)
    assert all(handle.taken and handle.poll() for handle in handles)
    # Never waited for: it ends by itself, and its name is free again.
    hvd.allreduce_async_(torch.ones(4), name="dropped", op=hvd.Sum)
    hvd.barrier()
    assert hvd.allreduce(torch.ones(4), name="dropped", op=hvd.Sum)[0] == size


def test_views():
    run(2, body_views)


def body_options():
    me, size = hvd.rank(), hvd.size()
    x = torch.full((4,), float(me + 1))
    mean = (size + 1) / 2
    assert torch.allclose(hvd.allreduce(x), torch.full((4,), mean))
    for compression in (hvd.Compression.fp16, hvd.Compression.bf16):
        result = hvd.allreduce(x, compression=compression)
        assert result.dtype == torch.float32 and torch.allclose(result, torch.full((4,), mean), rtol=1e-2)
    assert torch.allclose(
        hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0),
        torch.full((4,), 4 * mean * size / 2),
    )
    assert hvd.allreduce(x, op=hvd.Max)[0] == size and hvd.allreduce(x, op=hvd.Min)[0] == 1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hvd.allreduce(x, average=True)
        assert any(issubclass(one.category, DeprecationWarning) for one in seen)
    catch(ValueError, lambda: hvd.allreduce(x, average=True, op=hvd.Sum))
    rows = hvd.sparse_allreduce_async(torch.eye(3)[me : me + 1].to_sparse(), "s", hvd.Sum)
    assert rows().to_dense().sum() == size
    assert hvd.broadcast_object({"rank": me, "list": [1, 2]}, root_rank=size - 1) == {
        "rank": size - 1,
        "list": [1, 2],
    }
    assert hvd.broadcast_object(None if me else "from 0", 0, name="some") == "from 0"
    assert hvd.allgather_object(("x" * me, me)) == [("x" * rank, rank) for rank in range(size)]
    first = hvd.add_process_set([0])
    if first.included():
        assert torch.equal(hvd.allreduce(x, op=hvd.Sum, process_set=first), x)
    hvd.barrier()
    assert hvd.remove_process_set(first)


def test_options():
    run(2, body_options)


def body_gradients():
    me, size = hvd.rank(), hvd.size()

    def gradient(function, shape=(4, 2)):
        x = torch.ones(shape, requires_grad=True)
        y = function(x)
        y.backward(torch.full_like(y, float(me + 1)))
        return x.grad

    total = size * (size + 1) / 2
    assert torch.allclose(gradient(lambda x: hvd.allreduce(x, op=hvd.Sum)), torch.full((4, 2), total))
    assert torch.allclose(gradient(lambda x: hvd.allreduce(x)), torch.full((4, 2), total / size))
    assert torch.allclose(gradient(lambda x: hvd.grouped_allreduce([x, x], op=hvd.Sum)[0]), torch.full((4, 2), total))
    assert torch.allclose(gradient(hvd.allgather, (me + 1, 2)), torch.full((me + 1, 2), total / size))
    assert torch.allclose(
        gradient(lambda x: hvd.grouped_allgather([x])[0], (me + 1, 2)), torch.full((me + 1, 2), total / size)
    )
    expected = torch.full((4, 2), total / size if me == 1 else 0.0)
    assert torch.allclose(gradient(lambda x: hvd.broadcast(x, 1)), expected)
    back = gradient(hvd.alltoall, (size, 3))
    assert torch.allclose(back, torch.arange(1.0, size + 1).reshape(size, 1).expand(size, 3))
    rows = torch.cat([torch.full((1, 2), float(rank + 1)) for rank in range(size)])
    assert torch.allclose(gradient(lambda x: hvd.reducescatter(x), (size, 2)), rows)
    assert torch.allclose(gradient(lambda x: hvd.reducescatter(x, op=hvd.Sum), (size, 2)), rows * size)


def test_gradients():
    run(2, body_gradients)


def body_errors():
    me = hvd.rank()
    x = torch.ones(4, 4)
    assert "contiguous" in catch(ValueError, lambda: hvd.allreduce(x.t()))
    assert "sparse" in catch(ValueError, lambda: hvd.allreduce(x.to_sparse()))
    assert "at least one" in catch(ValueError, lambda: hvd.grouped_allreduce_async([]))
    assert "Average or op=Sum" in catch(ValueError, lambda: hvd.reducescatter_async(x, op=hvd.Max))
    hvd.barrier()
    text = catch(hvd.HorovodInternalError, lambda: hvd.allreduce(torch.ones(4 + me), name="t"))
    assert "allreduce.t" in text
    assert issubclass(hvd.HorovodInternalError, RuntimeError)
    hvd.barrier()
    # Rank 1 is refused; rank 0 hears of it.
    if me:
        catch(ValueError, lambda: hvd.allreduce_(x.t(), name="r"))
    else:
        assert "contiguous" in catch(hvd.HorovodInternalError, lambda: hvd.allreduce_(x, name="r"))
    assert torch.equal(hvd.allreduce(torch.ones(2), op=hvd.Sum), torch.full((2,), 2.0))


def test_errors():
    run(2, body_errors)


def network():
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def examples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(10, 12, 6, generator=generator)


def loss_of(model, batch):
    return model(batch).pow(2).mean()


def train_alone(make):
    model = network()
    optimizer = make(model.parameters())
    for batch in examples():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def body_optimizer(kind, options):
    me, size = hvd.rank(), hvd.size()
    makers = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    }
    expected = train_alone(makers[kind])
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(me)
    if options.pop("fp16", False):
        options["compression"] = hvd.Compression.fp16
    if options.pop("lists", False):
        parameters = list(model.parameters())
        options["groups"] = [parameters[:1], parameters[2:]]
    inner = makers[kind](model.parameters())
    optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), **options)
    assert isinstance(optimizer, type(inner))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1000)
    passes = options.get("backward_passes_per_step", 1)
    for batch in examples():
        part = batch[me::size]
        optimizer.zero_grad()
        for piece in part.chunk(passes):
            (loss_of(model, piece) / passes).backward()
        optimizer.step()
        schedule.step()
    limit = 1e-2 if "compression" in options else 1e-5
    for actual, wanted in zip(model.parameters(), expected):
        assert (actual.detach() - wanted).abs().max() <= limit
    bits = [parameter.detach().flatten().tolist() for parameter in model.parameters()]
    assert all(one == bits for one in hvd.allgather_object(bits))
    # The state of rank 0, also for ranks that have none.
    fresh = optimizer if me == 0 else hvd.DistributedOptimizer(
        makers[kind](model.parameters()), named_parameters=model.named_parameters()
    )  # fmt: skip
    hvd.broadcast_optimizer_state(fresh, root_rank=0)
    state = [value.tolist() if isinstance(value, torch.Tensor) else value
             for one in fresh.state_dict()["state"].values() for value in one.values()]  # fmt: skip
    assert state and all(one == state for one in hvd.allgather_object(state))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"groups": 2}, {"groups": 100}, {"lists": True}, {"fp16": True}, {"backward_passes_per_step": 2},
        {"gradient_predivide_factor": 2.0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizer_equals_one_process(kind, options):
    run(2, body_optimizer, kind, options)


def body_protocol():
    me = hvd.rank()
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters()
    )
    batch = examples()[0]
    loss_of(model, batch).backward()
    assert "zero_grad" in catch(AssertionError, optimizer.zero_grad)
    assert "backward_passes_per_step" in catch(AssertionError, lambda: loss_of(model, batch).backward())
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.zero_grad()
    # A parameter that only one rank used.
    (model[0](batch).sum() if me else loss_of(model, batch)).backward()
    optimizer.step()
    bits = [parameter.detach().flatten().tolist() for parameter in model.parameters()]
    assert all(one == bits for one in hvd.allgather_object(bits))
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer.step()
        assert any("skip_synchronize" in str(one.message) for one in seen)
    embedding = torch.nn.Embedding(6, 2, sparse=True)
    hvd.broadcast_parameters(embedding.state_dict(), 0)
    for dense in (False, True):
        sparse = hvd.DistributedOptimizer(
            torch.optim.SGD(embedding.parameters(), lr=0.1), named_parameters=[(f"e{dense}", embedding.weight)],
            sparse_as_dense=dense,
        )  # fmt: skip
        embedding.weight.grad = None
        embedding(torch.tensor([me, 2])).sum().backward()
        sparse.synchronize()
        grad = embedding.weight.grad
        assert grad.is_sparse != dense
        assert (grad if dense else grad.to_dense())[:3].tolist() == [[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]]
        with sparse.skip_synchronize():
            sparse.step()
        # The first wrapper's hooks stay on the parameter; the second gets its own.
        embedding = torch.nn.Embedding(6, 2, sparse=True)
        hvd.broadcast_parameters(embedding.state_dict(), 0)
    adasum = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=[("a." + n, p) for n, p in model.named_parameters()],
        op=hvd.Adasum,
    )  # fmt: skip
    assert type(adasum).step is not torch.optim.SGD.step


def test_protocol():
    run(2, body_protocol)


def test_arguments():
    hvd.init()
    try:
        model = network()

        def bad(word, **options):
            text = catch(
                ValueError,
                lambda: hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options),
            )
            assert word in text, text

        bad("tuples", named_parameters=list(model.parameters()))
        bad("twice", named_parameters=[("a", p) for p in model.parameters()])
        bad("lacks 3", named_parameters=list(model.named_parameters())[:1])
        bad("groups", groups="two")
        bad("negative", groups=-1)
        bad("not a parameter", groups=[[1]])
        bad("twice", groups=[[model[0].weight], [model[0].weight]])
        bad("at least 1", backward_passes_per_step=0)
        bad("Average", gradient_predivide_factor=2.0, op=hvd.Sum)
        bad("reduces steps", compression=hvd.Compression.onebit, op=hvd.Adasum)
        assert "at least 1" in catch(
            ValueError,
            lambda: hvd.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1)
            ).set_backward_passes_per_step(0),
        )
        assert "process_sets" in catch(carole.UsageError, lambda: hvd.init(comm=[0]))
    finally:
        hvd.shutdown()


def body_persistent():
    """What is planned once runs on torch's tensors, too, in place and into new ones."""
    me, size = hvd.rank(), hvd.size()
    x = torch.empty(1000, dtype=torch.bfloat16)
    mean, rows = hvd.allreduce_init(x, out=x), hvd.allgather_init(torch.full((me + 1,), me))
    for turn in range(3):
        x.fill_(me + turn)
        assert mean() is x and (x == turn + (size - 1) / 2).all()
        assert rows().tolist() == [r for r in range(size) for _ in range(r + 1)] and isinstance(rows.result, torch.Tensor)
    mean.close()
    rows.close()
    return "ok"


def test_persistent():
    assert run(2, body_persistent) == ["ok"] * 2

"""Gradients that come late, twice, never, or not finite. SKIPPED AS A WHOLE where torch is not installed."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training with carole.torch is NOT tested")

import carole.torch as hvd  # noqa: E402
from harness import catch  # noqa: E402
from harness import run_forked as run  # noqa: E402


def linear(seed=3):
    torch.manual_seed(seed)
    return torch.nn.Linear(4, 2)


def is_same_everywhere(tensor):
    return all(torch.equal(tensor, one) for one in hvd.allgather_object(tensor.detach()))


def body_late_sparse():
    """A sparse parameter that nobody uses in the first step, and one rank in the second."""
    me = hvd.rank()
    for groups in (None, 1):
        table, head = torch.nn.Embedding(5, 4, sparse=True), linear()
        parts = torch.nn.ModuleList([table, head])
        hvd.broadcast_parameters(parts.state_dict(), 0)
        before = table.weight.detach().clone()
        inner = torch.optim.SGD(parts.parameters(), lr=0.5)
        optimizer = hvd.DistributedOptimizer(inner, parts.named_parameters(), groups=groups)
        for step in range(3):
            optimizer.zero_grad(set_to_none=True)
            x = table(torch.tensor([me])) if step and me == 0 else torch.ones(1, 4)
            head(x).sum().backward()
            optimizer.step()
            assert torch.equal(table.weight.detach(), before) == (step == 0)
        assert is_same_everywhere(table.weight)


def body_unused():
    """What no rank has a gradient for stays as it is, as in one process; what is unfrozen later is reduced."""
    me = hvd.rank()
    for options in ({}, {"groups": 1}):
        used, unused, frozen = linear(), linear(), linear()
        parts = torch.nn.ModuleList([used, unused, frozen])
        frozen.weight.requires_grad_(False)
        inner = torch.optim.AdamW(parts.parameters(), lr=0.1, weight_decay=0.5)
        optimizer = hvd.DistributedOptimizer(inner, parts.named_parameters(), **options)
        before = [part.weight.detach().clone() for part in parts]
        for step in range(4):
            if step == 2:
                frozen.weight.requires_grad_(True)
                used.weight.requires_grad_(False)
                used.weight.grad = None
                after = used.weight.detach().clone()
            optimizer.zero_grad(set_to_none=True)
            (used(torch.ones(1, 4) * (me + 1)) + frozen(torch.ones(1, 4) * (me + 2))).sum().backward()
            optimizer.step()
        assert torch.equal(unused.weight.detach(), before[1]) and unused.weight.grad is None
        assert torch.equal(used.weight.detach(), after), "frozen meanwhile"
        assert not torch.equal(frozen.weight.detach(), before[2])
        assert is_same_everywhere(frozen.weight) and is_same_everywhere(used.weight)


def body_autograd_grad():
    """`torch.autograd.grad` between backward and step accumulates nothing."""
    model = linear()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    loss = model(torch.ones(1, 4)).pow(2).sum()
    loss.backward(retain_graph=True)
    if hasattr(model.weight, "register_post_accumulate_grad_hook"):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    catch(AssertionError, lambda: loss.backward(retain_graph=True))
    optimizer.step()
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    # A checkpoint is loaded while gradients are on their way.
    optimizer.load_state_dict(optimizer.state_dict())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def body_failed_on_the_way():
    """A checkpoint is loaded when gradients have failed on their way (ranks with different models, say)."""
    model = torch.nn.Linear(4, 2 + hvd.rank())
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.load_state_dict(optimizer.state_dict())
    model = linear()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert is_same_everywhere(model.weight)


def body_onebit_overflow():
    compressor = hvd.Compression.onebit()
    model = linear()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compressor
    )
    for step in range(3):
        optimizer.zero_grad()
        factor = float("inf") if step == 1 and hvd.rank() == 1 else 1.0
        (model(torch.ones(1, 4)).sum() * factor).backward()
        optimizer.synchronize()
        finite = all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        assert finite == (step != 1), step
    assert "DistributedOptimizer" in catch(
        ValueError, lambda: hvd.allreduce(torch.ones(2), compression=hvd.Compression.onebit)
    )


def body_adasum():
    me = hvd.rank()
    first, second = linear(), linear(4)
    inner = torch.optim.SGD(first.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(inner, first.named_parameters(), op=hvd.Adasum)
    optimizer.add_param_group({"params": list(second.parameters())})
    before = second.weight.detach().clone()
    make = getattr(getattr(torch, "amp", None), "GradScaler", None)
    scaler = make("cpu", init_scale=1024.0) if make else None
    for step in range(3):
        optimizer.zero_grad()
        loss = second(first(torch.ones(1, 4)).repeat(1, 2)).sum() * (me + 1)
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        # One rank overflows: nobody takes the step, and all keep one scale.
        scaler.scale(loss * float("inf") if (step, me) == (1, 1) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert len(set(hvd.allgather_object(scaler.get_scale()))) == 1
    assert not torch.equal(second.weight.detach(), before)
    assert is_same_everywhere(first.weight) and is_same_everywhere(second.weight)
    assert torch.isfinite(first.weight).all()


def body_lbfgs_state():
    me = hvd.rank()
    model = linear(3 + me)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4) * (me + 1)).pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    hvd.broadcast_parameters(model.state_dict(), 0)
    hvd.broadcast_optimizer_state(optimizer, 0)
    state = optimizer.state_dict()["state"][0]
    assert state["old_dirs"]
    assert all(is_same_everywhere(one) for one in state["old_dirs"] + [state["d"]])


def body_written_in_place():
    """A tensor that autograd has saved is not written unnoticed; a parameter may be."""
    if not hasattr(torch.autograd.graph, "increment_version"):
        return "skipped"
    for write in (
        lambda y: hvd.allreduce_(y, op=hvd.Sum),
        lambda y: hvd.synchronize(hvd.allreduce_async_(y, op=hvd.Sum)),
        lambda y: hvd.grouped_allreduce_([y], op=hvd.Sum),
        lambda y: hvd.broadcast_(y, 0),
    ):
        x = torch.full((2,), 3.0, requires_grad=True)
        y = x * 3
        z = (y * y).sum()
        write(y)
        assert "modified by an inplace operation" in catch(RuntimeError, z.backward)
        hvd.broadcast_(x, 0)
    return "done"


BODIES = [body_late_sparse, body_unused, body_autograd_grad, body_failed_on_the_way, body_onebit_overflow,
          body_adasum, body_lbfgs_state, body_written_in_place]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__[5:])
def test_two_ranks(body):
    if run(2, body)[0] == "skipped":
        pytest.skip(f"torch {torch.__version__} cannot tell autograd of a write")

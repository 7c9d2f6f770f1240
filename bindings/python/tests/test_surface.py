"""Every public name of `horovod.torch`, with Horovod's parameters and defaults. SKIPPED where torch is missing.

The signatures are Horovod 0.28.1's. A parameter more at the end is allowed, if it has a default.
"""

import importlib
import inspect
import operator
import re
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: the surface of carole.torch is NOT compared")

import carole.torch as hvd  # noqa: E402

REDUCE = "average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0, process_set=GLOBAL"
COMPRESSED = (
    "average=None, name=None, compression=NONE, op=None, prescale_factor=1.0, postscale_factor=1.0, process_set=GLOBAL"
)
SIGNATURES = {
    "init": "comm=None, process_sets=None",
    "shutdown": "",
    "is_initialized": "",
    "start_timeline": "file_path, mark_cycles=False",
    "stop_timeline": "",
    **{name: "" for name in ("size", "local_size", "cross_size", "rank", "local_rank", "cross_rank", "is_homogeneous")},
    **{
        name: ""
        for name in (
            "mpi_threads_supported", "mpi_enabled", "mpi_built", "gloo_enabled", "gloo_built", "nccl_built",
            "ddl_built", "ccl_built", "cuda_built", "rocm_built",
        )
    },
    "add_process_set": "process_set",
    "remove_process_set": "process_set",
    "handle_average_backwards_compatibility": "op, average",
    "allreduce": f"tensor, {COMPRESSED}",
    "allreduce_async": f"tensor, {REDUCE}",
    "allreduce_": f"tensor, {REDUCE}",
    "allreduce_async_": f"tensor, {REDUCE}",
    "grouped_allreduce": f"tensors, {COMPRESSED}",
    "grouped_allreduce_async": f"tensors, {REDUCE}",
    "grouped_allreduce_": f"tensors, {REDUCE}",
    "grouped_allreduce_async_": f"tensors, {REDUCE}",
    "sparse_allreduce_async": "tensor, name, op, process_set=GLOBAL",
    "allgather": "tensor, name=None, process_set=GLOBAL",
    "allgather_async": "tensor, name=None, process_set=GLOBAL",
    "grouped_allgather": "tensors, name=None, process_set=GLOBAL",
    "grouped_allgather_async": "tensors, name=None, process_set=GLOBAL",
    **{
        name: "tensor, root_rank, name=None, process_set=GLOBAL"
        for name in ("broadcast", "broadcast_async", "broadcast_", "broadcast_async_")
    },
    "alltoall": "tensor, splits=None, name=None, process_set=GLOBAL",
    "alltoall_async": "tensor, splits=None, name=None, process_set=GLOBAL",
    "reducescatter": (
        "tensor, name=None, compression=NONE, op=AVERAGE, process_set=GLOBAL, prescale_factor=1.0, postscale_factor=1.0"
    ),
    "reducescatter_async": (
        "tensor, name=None, op=AVERAGE, process_set=GLOBAL, prescale_factor=1.0, postscale_factor=1.0"
    ),
    "grouped_reducescatter": (
        "tensors, name=None, compression=NONE, op=AVERAGE, process_set=GLOBAL, prescale_factor=1.0, "
        "postscale_factor=1.0"
    ),
    "grouped_reducescatter_async": (
        "tensors, name=None, op=AVERAGE, process_set=GLOBAL, prescale_factor=1.0, postscale_factor=1.0"
    ),
    "join": "device=-1",
    "barrier": "process_set=GLOBAL",
    "poll": "handle",
    "synchronize": "handle",
    "broadcast_parameters": "params, root_rank",
    "broadcast_optimizer_state": "optimizer, root_rank, model=None",
    "broadcast_object": "obj, root_rank=0, name=None, process_set=GLOBAL",
    "allgather_object": "obj, name=None",
    "DistributedOptimizer": (
        "optimizer, named_parameters=None, compression=NONE, backward_passes_per_step=1, op=AVERAGE, "
        "gradient_predivide_factor=1.0, num_groups=0, groups=None, sparse_as_dense=False, process_set=GLOBAL"
    ),
    "SyncBatchNorm": "num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True",
    "elastic.run": "func",
    "elastic.TorchState": "model=None, optimizer=None, **kwargs",
    "elastic.ElasticSampler": "dataset, shuffle=True, seed=0",
    "elastic.ElasticSampler.set_epoch": "self, epoch",
    "elastic.ElasticSampler.record_batch": "self, batch_idx, batch_size",
    "elastic.ElasticSampler.load_state_dict": "self, state_dict",
    "elastic.TorchState.commit": "self",
    "elastic.TorchState.on_hosts_updated": "self, timestamp, update_res",
    "elastic.TorchState.register_reset_callbacks": "self, callbacks",
}  # fmt: skip
PRESENT = [
    "Average", "Sum", "Adasum", "Min", "Max", "Product", "Compression.none", "Compression.fp16", "ProcessSet",
    "global_process_set", "HorovodInternalError", "HorovodAllreduce", "HorovodGroupedAllreduce", "HorovodAllgather",
    "HorovodGroupedAllgather", "HorovodBroadcast", "HorovodAlltoall", "HorovodReducescatter",
    "HorovodGroupedReducescatter", "elastic.State", "elastic.ObjectState", "elastic.ModelStateHandler",
    "elastic.OptimizerStateHandler", "elastic.SamplerStateHandler", "elastic.get_handler_registry",
    "elastic.set_handler_registry", "elastic.TorchState.save", "elastic.TorchState.restore",
    "elastic.TorchState.sync", "elastic.TorchState.check_host_updates", "elastic.TorchState.on_reset",
    "elastic.ElasticSampler.state_dict", "elastic.ElasticSampler.reset",
]  # fmt: skip

HOROVOD = str(Path(__file__).parent.parent / "horovod" / "src")
BASICS = (
    "init shutdown is_initialized start_timeline stop_timeline size local_size cross_size rank local_rank cross_rank "
    "is_homogeneous mpi_threads_supported mpi_enabled mpi_built gloo_enabled gloo_built nccl_built ddl_built "
    "ccl_built cuda_built rocm_built Average Sum Adasum Min Max Product"
).split()
PROCESS_SETS = ["ProcessSet.mpi_comm", "global_process_set.mpi_comm", "add_process_set", "remove_process_set"]
NOT_OPERATIONS = "broadcast_parameters broadcast_optimizer_state broadcast_object allgather_object".split()
OPERATIONS = [name for name in SIGNATURES if re.match("(sparse_|grouped_)?(all|broadcast|reducescatter)", name)]
SUBMODULES = {
    "torch.mpi_ops": BASICS + PROCESS_SETS + [name for name in OPERATIONS if name not in NOT_OPERATIONS]
    + ["barrier", "join", "poll", "synchronize", "handle_average_backwards_compatibility", "HorovodInternalError"]
    + [name for name in PRESENT if re.match("Horovod(All|Grouped|Broadcast|Reduce)", name)],
    "common.basics": [f"HorovodBasics.{name}" for name in BASICS],
    "common.process_sets": PROCESS_SETS,
    "common.exceptions": (
        "HorovodInternalError HostsUpdatedInterrupt HorovodVersionMismatchError get_version_mismatch_message"
    ).split(),
    "common.util": (
        "extension_available gpu_available mpi_built gloo_built nccl_built ddl_built ccl_built check_extension "
        "check_installed_version num_rank_is_power_2 split_list env is_iterable is_version_greater_equal_than _cache "
        "EXTENSIONS"
    ).split(),
    "common.elastic": "State ObjectState run_fn notification_manager".split(),
}  # fmt: skip


def found(name):
    value = hvd
    for part in name.split("."):
        value = getattr(value, part)
    return value


def shown(parameter):
    values = {id(hvd.global_process_set): "GLOBAL", id(hvd.Compression.none): "NONE"}
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    if parameter.default is hvd.Average:
        return f"{parameter.name}=AVERAGE"
    return f"{parameter.name}={values.get(id(parameter.default), repr(parameter.default))}"


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = list(inspect.signature(found(name)).parameters.values())
    expected = [part for part in SIGNATURES[name].split(", ") if part]
    assert [shown(one) for one in parameters[: len(expected)]] == expected
    for more in parameters[len(expected) :]:
        assert more.default is not inspect.Parameter.empty or more.kind is inspect.Parameter.VAR_KEYWORD, more


@pytest.mark.parametrize("name", PRESENT)
def test_present(name):
    assert found(name) is not None


@pytest.mark.parametrize("module", SUBMODULES)
def test_submodules_of_the_name_horovod(module, monkeypatch):
    monkeypatch.syspath_prepend(HOROVOD)
    root = importlib.import_module(f"horovod.{module}")
    missing = []
    for name in SUBMODULES[module]:
        try:
            operator.attrgetter(name)(root)
        except AttributeError:
            missing.append(name)
    assert not missing


def test_mpi_ops_agrees_with_the_package(monkeypatch):
    monkeypatch.syspath_prepend(HOROVOD)
    import horovod.torch.mpi_ops as mpi_ops
    from horovod.common.basics import HorovodBasics

    assert hvd.mpi_ops is mpi_ops and mpi_ops.rank is hvd.rank and mpi_ops.allreduce is hvd.allreduce
    for name in BASICS:
        if name.endswith(("_built", "_enabled")):
            assert getattr(HorovodBasics(), name)() == getattr(hvd, name)()


def test_values():
    ops = [hvd.Average, hvd.Sum, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product]
    assert [int(op) for op in ops] == list(range(6))
    assert issubclass(hvd.HorovodInternalError, RuntimeError)
    assert all(name in hvd.__all__ for name in SIGNATURES if "." not in name)

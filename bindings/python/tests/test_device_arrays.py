"""Arrays on a CUDA device that are no torch tensors, under a stand-in for the driver where there is no device."""

import subprocess

import device
import numpy as np
import pytest
from harness import catch, run

import carole

KINDS = ["Streamed", "Unstreamed", "Lent", "Loner"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    try:
        return device.driver_environment(str(tmp_path_factory.mktemp("driver")))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no CUDA device, and no stand-in for its driver: {error}")


def values(rank, shape, dtype="float32"):
    count = int(np.prod(shape))
    return (np.arange(count) * 7 + 13 * rank).reshape(shape).astype(dtype) % 100


def host(result):
    """The values of a result, as the current stream sees them."""
    if isinstance(result, carole.DeviceOutput):
        # Of a library that takes none of it; others can.
        interface = result.__cuda_array_interface__
        assert interface["stream"] in (None, device._current or 1)
        return device.read(interface["data"][0], interface["shape"], interface["typestr"])
    return result.get()


def check(name, result, expected):
    got = host(result)
    assert got.dtype == expected.dtype and got.shape == expected.shape, (name, got.shape, expected.shape)
    assert (got == expected).all(), (name, got.ravel()[:8], expected.ravel()[:8])


def collectives(kind, transport):
    make = getattr(device, kind)
    rank, size = carole.rank(), carole.size()
    # Version 2 tells of no stream: its arrays are made on the default stream.
    device.use(0 if kind == "Unstreamed" else device.new_stream())
    result_kind = carole.DeviceOutput if kind == "Loner" else device.Taken
    for dtype, shape in [("float32", (5, 3)), ("int64", (1000,)), ("float16", (4, 7)), ("uint8", (1 << 16,))]:
        inputs = [values(member, shape, dtype) for member in range(size)]
        total = sum(part.astype(dtype) for part in inputs).astype(dtype)
        x = make(inputs[rank])
        result = carole.allreduce(x, carole.Sum)
        assert type(result) is result_kind
        check("allreduce", result, total)
        check("input", x, inputs[rank])
        handle = carole.allreduce_async(x, carole.Max, name="later")
        check("async", handle.wait(), np.max(inputs, axis=0))
        out = make(np.zeros(shape, dtype))
        assert carole.allreduce(x, carole.Sum, out=out) is out
        check("out", out, total)
        group = carole.grouped_allreduce([x, make(inputs[rank][:2])], carole.Sum)
        check("grouped", group[0], total)
        check("grouped", group[1], total[:2])
        pair = [make(inputs[rank]), make(inputs[rank][:1])]
        assert carole.grouped_allreduce_(pair, carole.Sum)[1] is pair[1]
        check("grouped in place", pair[1], total[:1])
        assert carole.allreduce_(x, carole.Sum) is x
        check("in place", x, total)
        movements(make, inputs)
    assert not device.lent, "what was borrowed is given back"
    return transport


def movements(make, inputs):
    rank, size = carole.rank(), carole.size()
    x = make(inputs[rank])
    dtype, root = inputs[0].dtype, size - 1
    total = sum(inputs).astype(dtype)
    check("broadcast", carole.broadcast(x, root), inputs[root])
    # The last rank has no rows at all, nor memory that tells of the device.
    rows = [part[: 3 * (member < size - 1)] for member, part in enumerate(inputs)]
    check("allgather", carole.allgather(make(rows[rank])), np.concatenate(rows))
    check("reducescatter", carole.reducescatter(x, carole.Sum), np.array_split(total, size)[rank])
    splits = [1] * (size - 1) + [len(x.values) - size + 1]
    got, received = carole.alltoall(x, splits)
    bounds = np.cumsum([0, *splits])
    check("alltoall", got, np.concatenate([part[bounds[rank] : bounds[rank + 1]] for part in inputs]))
    assert received == [splits[rank]] * size
    reduced, gathered = carole.reduce(x, root, carole.Sum), carole.gather(x, root)
    if rank == root:
        check("reduce", reduced, total)
        check("gather", gathered, np.concatenate(inputs))
    else:
        assert reduced is None and gathered is None
    check("scatter", carole.scatter(x, root), np.array_split(inputs[root], size)[rank])
    y = make(np.zeros_like(inputs[0]))
    if size > 1:
        handle = carole.send_async(x, (rank + 1) % size)
        assert carole.recv(y, (rank - 1) % size) is y
        handle.wait()
        check("recv", y, inputs[rank - 1])
    y = make(inputs[rank])
    assert carole.broadcast_(y, root) is y
    check("broadcast in place", y, inputs[root])


def streams():
    """Inputs of several streams, and results that yet another one reads."""
    rank, size = carole.rank(), carole.size()
    first, second, reader = (device.new_stream() for _ in range(3))
    for step in range(20):
        expected = sum(values(member + step, 5000) for member in range(size))
        device.use(first)
        one = device.Streamed(values(rank + step, 5000))
        device.use(second)
        two, three = device.Streamed(values(rank + step, 5000)), device.Lent(values(rank + step, 5000))
        # Made on the first stream, though the second is current.
        one.__class__ = type("Fixed", (device.Streamed,), {"__cuda_array_interface__": property(fixed(first))})
        handle = carole.grouped_allreduce_async([one, two, three], carole.Sum, name="group", out=[one, two, three])
        device.use(reader)
        for array in handle.wait():
            check(f"step {step}", array, expected)
        device.use(second)
        result = carole.allreduce(two, carole.Sum, name="result")
        check("new", result, expected * size)
    # DLPack's producers are asked to order themselves with the legacy default stream.
    assert set(device.Lent.streams) == {1}
    return True


def fixed(stream):
    def interface(self):
        return {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False),
            "strides": None, "stream": stream,
        }  # fmt: skip

    return interface


def outputs():
    device.use(device.new_stream())
    output = carole.allreduce(device.Loner(values(0, (6, 2))), carole.Sum)
    expected = values(0, (6, 2)) * carole.size()
    assert (output.shape, output.dtype, output.nbytes, output.device) == ((6, 2), "float32", 48, 0)
    interface = output.__cuda_array_interface__
    assert (interface["version"], interface["stream"], interface["strides"]) == (3, device._current, None)
    assert output.__dlpack_device__() == (2, 0) and "CUDA device 0" in repr(output)
    for options in ({"copy": True}, {"dl_device": (1, 0)}):
        catch(BufferError, lambda options=options: output.__dlpack__(**options))
    assert "1 or 2" in catch(ValueError, lambda: output.__dlpack__(stream=0))
    for options in ({"stream": -1}, {"stream": 2}, {}, {"max_version": (1, 1)}, {"dl_device": (2, 0), "copy": False}):
        capsule = output.__dlpack__(**options)
        assert ("versioned" in repr(capsule)) == ("max_version" in options), capsule
    other = device.new_stream()
    device.use(other)
    taken = device.from_dlpack(output)
    flat = device.from_dlpack(output.as_uint8())
    assert taken.address == interface["data"][0] and flat.shape == (48,)
    # The memory lives as long as the last who sees it.
    output = capsule = None
    again = carole.allreduce(device.Loner(values(1, (6, 2))), carole.Sum)
    assert (taken.get() == expected).all() and (flat.get().view("float32") == expected.ravel()).all()
    # A result is an input again.
    check("again", carole.allreduce(again, carole.Sum), values(1, (6, 2)) * carole.size() ** 2)
    return True


class Odd(device.Streamed):
    """With an interface of which something is not as it should be."""

    def __init__(self, **changes):
        super().__init__(values(0, (4, 4)))
        self.changes = changes

    @property
    def __cuda_array_interface__(self):
        return {**super().__cuda_array_interface__, **self.changes}


def refusals():
    rank = carole.rank()
    good = device.Streamed(values(0, (4, 4)))
    told = []
    for name, call, word in [
        ("strides", lambda n: carole.allreduce(Odd(strides=(4, 16)), name=n), "C-contiguous"),
        ("mask", lambda n: carole.allreduce(Odd(mask=good), name=n), "mask"),
        ("memory", lambda n: carole.allreduce(Odd(data=(64, False)), name=n), "no CUDA device"),
        ("stream", lambda n: carole.allreduce(Odd(stream="x"), name=n), "names the stream x"),
        ("type", lambda n: carole.allreduce(Odd(typestr="<M8"), name=n), "counterpart"),
        ("written", lambda n: carole.allreduce_(Odd(data=(good.address, True)), name=n), "read-only"),
        ("group", lambda n: carole.grouped_allreduce([good, np.ones(3)], name=n), "one array is in host memory"),
        ("out", lambda n: carole.allreduce(good, out=np.ones((4, 4), "f4"), name=n), "one array is in host memory"),
    ]:
        if rank == 0:
            assert word in catch(carole.UsageError, lambda name=name, call=call: call(name))
        else:
            told.append(catch(carole.MismatchError, lambda name=name: carole.allreduce(good, name=name)))
            assert word in told[-1] and "rank 0" in told[-1], told
    assert "host memory" in catch(carole.UsageError, lambda: carole.allreduce_init(good, carole.Sum, name="planned"))
    # Host and device do not meet, and the group goes on.
    words = catch(carole.MismatchError, lambda: carole.allreduce(good if rank else np.ones((4, 4), "f4"), name="mixed"))
    assert "host memory" in words and "CUDA" in words, words
    check("afterwards", carole.allreduce(good, carole.Sum), values(0, (4, 4)) * carole.size())
    return True


def no_driver():
    return catch(carole.UsageError, lambda: carole.allreduce(Bare()))


class Bare:
    __cuda_array_interface__ = {"version": 3, "shape": (2,), "typestr": "<f4", "data": (4096, False), "stream": None}


def given_up():
    for step in range(10):
        carole.allreduce_async(device.Streamed(values(0, 1 << 16)), name=f"lost.{step}")
    carole.barrier()
    check("afterwards", carole.allreduce(device.Streamed(values(0, 4)), carole.Sum), values(0, 4) * carole.size())
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_every_collective_takes_arrays_of_a_device(driver, kind):
    assert run(3, collectives, kind, "auto", env=driver) == ["auto"] * 3


@pytest.mark.parametrize("size, transport", [(1, "shm"), (2, "tcp")])
def test_alone_and_over_tcp(driver, size, transport):
    variables = {**driver, "CAROLE_TRANSPORT": transport}
    assert run(size, collectives, "Streamed", transport, env=variables) == [transport] * size


def test_streams_are_waited_for(driver):
    assert run(2, streams, env=driver) == [True] * 2


def test_results_have_both_protocols(driver):
    assert run(2, outputs, env=driver) == [True] * 2


def test_what_cannot_be_taken_is_refused_on_all_ranks(driver):
    assert run(2, refusals, env=driver) == [True] * 2


def test_handles_may_be_given_up(driver):
    assert run(2, given_up, env=driver) == [True] * 2


def test_without_a_driver_an_error_says_so():
    (words,) = run(1, no_driver)
    assert "driver" in words or "no CUDA device" in words, words

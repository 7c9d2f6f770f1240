"""What counts as an array, in one process."""

import array
import subprocess
import sys

import numpy as np
import pytest

import carole
from carole._arrays import to_memoryview


@pytest.fixture(scope="module", autouse=True)
def job():
    carole.init()
    yield
    carole.shutdown()


class Dlpack:
    """Has DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return (1, 0)


class OldDlpack(Dlpack):
    """As it was before version 1."""

    def __dlpack__(self):
        return self.array.__dlpack__()


class Elsewhere(Dlpack):
    """On a device of ROCm."""

    def __dlpack_device__(self):
        return (10, 0)


@pytest.mark.parametrize(
    "given",
    [
        array.array("f", [1, 2, 3]), array.array("q", [1, 2]), bytearray(b"abc"), memoryview(bytearray(b"abc")), b"abc",
        Dlpack(np.arange(6.0).reshape(2, 3)), OldDlpack(np.arange(3, dtype=np.int16)), np.float64(2.5),
        np.array(7, np.int8), np.zeros((0, 3)), np.asfortranarray(np.ones((1, 5))),
    ],
    ids=lambda given: type(given).__name__,
)  # fmt: skip
def test_inputs(given):
    result = carole.allreduce(given, carole.Sum)
    expected = np.asarray(given.array if isinstance(given, Dlpack) else given)
    if isinstance(given, bytes):
        expected = np.frombuffer(given, np.uint8)
    assert isinstance(result, np.ndarray)
    assert result.shape == expected.shape and (result == expected).all()


@pytest.mark.parametrize(
    "given", [array.array("f", [1, 2]), bytearray(b"ab"), Dlpack(np.ones(2))], ids=["array", "bytearray", "dlpack"]
)
def test_in_place(given):
    assert carole.allreduce_(given, carole.Sum, postscale_factor=3.0) is given
    got = np.asarray(given.array if isinstance(given, Dlpack) else given)
    if isinstance(given, bytearray):
        got = np.frombuffer(given, np.uint8)
        assert got.tolist() == [(97 * 3) % 256, (98 * 3) % 256] or got.tolist() == [255, 255]
    else:
        assert got.tolist() in ([3, 6], [3, 3])


def test_a_buffer_in_flight_cannot_be_resized():
    data = bytearray(64)
    handle = carole.allreduce_async(data, carole.Sum, name="held")
    with pytest.raises(BufferError):
        data.extend(b"more")
    handle.wait()
    data.extend(b"more")


@pytest.mark.parametrize(
    "given, word",
    [
        ([1, 2], "asarray"), (3.0, "asarray"), (None, "asarray"), (np.ones((3, 3)).T[1:], "ascontiguousarray"),
        (Dlpack(np.ones((3, 3))[:, 1]), "ascontiguousarray"), (Elsewhere(np.ones(3)), "device"),
        (np.array(["a"]), "counterpart"), (np.zeros(2, [("a", "f4")]), "counterpart"),
        (np.zeros(2, "M8[s]"), "counterpart"), (np.ones(2, ">f4"), "order"),
        (memoryview(bytes(9)).cast("B", (3, 3))[::2], "contiguous"),
    ],
    ids=lambda given: type(given).__name__,
)  # fmt: skip
def test_refused_inputs(given, word):
    with pytest.raises(carole.UsageError, match=word):
        carole.allreduce(given, carole.Sum)


def test_read_only_arrays_are_inputs_only():
    x = np.ones(3)
    x.flags.writeable = False
    assert carole.allreduce(x, carole.Sum).tolist() == [1, 1, 1]
    for given in (x, Dlpack(x), b"abc"):
        with pytest.raises(carole.UsageError, match="read-only"):
            carole.allreduce_(given, carole.Sum)
    with pytest.raises(carole.UsageError, match="read-only"):
        carole.recv(x, 0)


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.arange(7).astype(ml_dtypes.bfloat16)
    result = carole.allreduce(x, carole.Sum)
    assert result.dtype == x.dtype and (result == x).all()
    assert carole.allreduce_(x, carole.Sum) is x


def output_of(x):
    return carole.allreduce(x, carole.Sum).base


def test_an_output_is_lent_without_a_copy():
    output = output_of(np.arange(6, dtype=np.float32).reshape(2, 3))
    one, two = np.asarray(output), np.from_dlpack(output)
    address = one.__array_interface__["data"][0]
    assert address == output.address == two.__array_interface__["data"][0] and address % 64 == 0
    one[0, 0] = 42
    assert np.asarray(output)[0, 0] == 42
    del output, one
    assert two[0, 1] == 1
    # Capsules that nobody takes.
    output = output_of(np.ones(3))
    del two
    for options in ({}, {"max_version": (1, 0)}, {"max_version": (0, 8)}):
        del_me = output.__dlpack__(**options)
        del del_me
    with pytest.raises(BufferError):
        output.__dlpack__(dl_device=(2, 0))


def test_memoryviews_stand_in_for_numpy():
    view = to_memoryview(output_of(np.arange(6, dtype=np.int32).reshape(2, 3)))
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]] and view.format == "i"
    assert to_memoryview(output_of(np.ones(2, np.complex64))).tolist() == [[1, 0], [1, 0]]
    assert to_memoryview(output_of(np.ones((0, 3)))).nbytes == 0


def test_without_numpy():
    script = (
        "import sys; sys.modules['numpy'] = None\n"
        "import array, carole; carole.init()\n"
        "r = carole.allreduce(array.array('f', [1, 2]), carole.Sum)\n"
        "assert isinstance(r, memoryview) and r.tolist() == [1, 2], r\n"
        "carole.shutdown()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_jax_arrays_are_inputs_only():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones(3)
    assert carole.allreduce(x, carole.Sum).tolist() == [1, 1, 1]
    with pytest.raises(carole.UsageError, match="read-only"):
        carole.allreduce_(x, carole.Sum)


def test_the_interface_is_typed_and_documented():
    import pathlib

    assert pathlib.Path(carole.__file__).with_name("py.typed").exists()
    undocumented = [
        name for name in carole.__all__ if callable(getattr(carole, name)) and not getattr(carole, name).__doc__
    ]
    assert undocumented == []

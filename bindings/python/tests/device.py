"""A small library of arrays on a CUDA device, for tests: it has the protocols of CuPy and JAX, and asks the driver for
everything. The driver is the machine's, or a stand-in for it (tests/cuda_driver/driver.cpp), whose streams dawdle.

Arrays come in kinds: `Streamed` has `__cuda_array_interface__` of version 3, `Unstreamed` of version 2, `Lent` DLPack
alone; `Loner` is as `Streamed`, of a library without `from_dlpack`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np

SOURCE = Path(__file__).resolve().parents[3] / "tests" / "cuda_driver" / "driver.cpp"
# The kernels, which the stand-in runs on the host.
KERNELS = SOURCE.parents[2] / "kernels" / "host_form.cpp"
CUDA = 2
# DLPack's codes of types, by NumPy's kinds.
CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}


def driver_environment(folder: str) -> Dict[str, str]:
    """The variables with which ranks find a driver. Raises OSError where there is none and none can be compiled."""
    if os.path.exists("/dev/nvidiactl"):
        return {}
    if not SOURCE.exists():
        raise OSError("no CUDA device, and no source of a stand-in")
    library = str(Path(folder, "libcuda.so"))
    flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, "-o", library, str(SOURCE), str(KERNELS)], check=True)
    return {"LD_LIBRARY_PATH": folder}


_driver: Any = None


def call(name: str, *arguments: Any) -> None:
    global _driver
    if _driver is None:
        try:
            _driver = ctypes.CDLL("libcuda.so")
        except OSError:
            _driver = ctypes.CDLL("libcuda.so.1")
        call("cuInit", 0)
        context = ctypes.c_void_p()
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        call("cuCtxPushCurrent_v2", context)
    code = getattr(_driver, name)(*arguments)
    assert code == 0, (name, code)


def new_stream() -> int:
    stream = ctypes.c_void_p()
    # Not ordered with the default stream, as those of libraries are.
    call("cuStreamCreate", ctypes.byref(stream), 1)
    return stream.value or 0


_current = 0


def use(stream: int) -> None:
    """What follows is made and read on this stream; 0 is the default stream."""
    global _current
    _current = stream


def dawdle() -> None:
    """Keeps the current stream from going on for a while."""
    call("cuLaunchHostFunc", ctypes.c_void_p(_current), ctypes.CDLL(None).usleep, ctypes.c_void_p(2000))


class Array:
    """Values on the device, which are made and read on the stream that is current then."""

    def __init__(self, values: Any):
        values = np.asarray(values)
        self.values = np.array(values, order="C")
        self.shape, self.dtype = values.shape, values.dtype
        address = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(self.values.nbytes, 1)))
        self.address = address.value
        # As libraries show arrays without values.
        self.shown = self.address if self.values.nbytes else 0
        if self.values.nbytes:
            dawdle()
            size, stream = ctypes.c_size_t(self.values.nbytes), ctypes.c_void_p(_current)
            source = ctypes.c_void_p(self.values.ctypes.data)
            call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(self.address), source, size, stream)

    def __del__(self) -> None:
        call("cuMemFree_v2", ctypes.c_uint64(self.address))

    def get(self) -> np.ndarray:
        """The values that the current stream comes to."""
        return read(self.address, self.shape, self.dtype)


def read(address: int, shape: Tuple[int, ...], dtype: Any) -> np.ndarray:
    values = np.empty(shape, dtype)
    if values.nbytes:
        size, stream = ctypes.c_size_t(values.nbytes), ctypes.c_void_p(_current)
        call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(values.ctypes.data), ctypes.c_uint64(address), size, stream)
        call("cuStreamSynchronize", stream)
    return values


class Streamed(Array):
    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        return {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.shown, False),
            "strides": None, "stream": _current or 1,
        }  # fmt: skip


class Unstreamed(Array):
    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        return {
            "version": 2, "shape": self.shape, "typestr": self.dtype.str, "data": (self.shown, False), "strides": None,
        }  # fmt: skip


class Loner(Streamed):
    pass


Loner.__module__ = "nowhere"


class Tensor(ctypes.Structure):
    """`DLManagedTensor`."""

    _fields_ = [
        ("data", ctypes.c_uint64), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64), ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]  # fmt: skip


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.argtypes = [ctypes.py_object, ctypes.c_void_p]
NAME, USED = ctypes.create_string_buffer(b"dltensor"), ctypes.create_string_buffer(b"used_dltensor")
# What was lent and is not given back, by the address of its tensor.
lent: Dict[int, Any] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _given_back(address: int) -> None:
    del lent[address]


def order(behind: int, ahead: int) -> None:
    """Lets one stream wait for what another has been given."""
    event = ctypes.c_void_p()
    call("cuEventCreate", ctypes.byref(event), 2)
    call("cuEventRecord", event, ctypes.c_void_p(ahead))
    call("cuStreamWaitEvent", ctypes.c_void_p(behind), event, 0)


class Lent(Array):
    """Remembers the streams that it was lent to."""

    streams: Tuple[Optional[int], ...] = ()

    def __dlpack_device__(self) -> Tuple[int, int]:
        return (CUDA, 0)

    def __dlpack__(self, stream: Optional[int] = None) -> Any:
        Lent.streams += (stream,)
        if stream != -1:
            order(stream or 1, _current)
        tensor = Tensor(
            self.address, CUDA, 0, len(self.shape), CODES[self.dtype.kind], self.dtype.itemsize * 8, 1,
            (ctypes.c_int64 * len(self.shape))(*self.shape), None, 0, None, _given_back,
        )  # fmt: skip
        address = ctypes.addressof(tensor)
        lent[address] = (self, tensor)
        return _new(address, ctypes.addressof(NAME), None)


class Taken:
    """An array of this library over the memory of another."""

    def __init__(self, tensor: Tensor, owner: int):
        assert (tensor.device_type, tensor.device_id) == (CUDA, 0), tensor.device_type
        kind = next(kind for kind, code in CODES.items() if code == tensor.code)
        self.dtype = np.dtype(f"{kind}{tensor.bits // 8}")
        self.shape = tuple(tensor.shape[: tensor.ndim])
        self.address, self._tensor, self._owner = tensor.data + tensor.byte_offset, tensor, owner

    def __del__(self) -> None:
        self._tensor.deleter(self._owner)

    def get(self) -> np.ndarray:
        return read(self.address, self.shape, self.dtype)


def from_dlpack(array: Any) -> Taken:
    """As every library has it: the producer orders itself with the current stream."""
    capsule = array.__dlpack__(stream=_current or 1)
    address = _pointer(capsule, NAME.value)
    _rename(capsule, ctypes.addressof(USED))
    return Taken(Tensor.from_address(address), address)

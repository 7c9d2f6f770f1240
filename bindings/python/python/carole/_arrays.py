"""Results as arrays of the caller's kind, without a copy."""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Any, Callable, Optional, Set, Tuple, Union

from ._native import DeviceOutput, Output

# What memoryview can be cast to; bfloat16 has no format and shows as its 16 bits, complex as pairs.
_FORMATS = {
    "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i",
    "uint64": "Q", "int64": "q", "float32": "f", "float64": "d", "bool": "?",
    "bfloat16": "H", "float16": "H", "complex64": "f", "complex128": "d",
}  # fmt: skip


def wrap(output: Union[Output, DeviceOutput], like: Optional[type] = None) -> Any:
    """The memory of `output` as a torch tensor where `like` is torch's, else as a NumPy array, or as a
    memoryview where there is no NumPy; on a device, as an array of the library that `like` is of."""
    library = "" if like is None else like.__module__.partition(".")[0]
    if library == "torch":
        return to_torch(output)
    if isinstance(output, DeviceOutput):
        return _of_library(output, library)
    try:
        import numpy
    except ImportError:
        return to_memoryview(output)
    array = numpy.asarray(output)
    if output.dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            return array.view(numpy.uint16)
        return array.view(ml_dtypes.bfloat16)
    return array


# How libraries take arrays of others on a device, where it is not by the `from_dlpack` of their main module.
_TAKERS = {"jax": ("jax.numpy", "from_dlpack"), "jaxlib": ("jax.numpy", "from_dlpack"),
           "numba": ("numba.cuda", "as_cuda_array")}  # fmt: skip


def _of_library(output: DeviceOutput, library: str) -> Any:
    """`output` as an array of this library, or as it is where the library does not take it: it may have no such
    type."""
    module, name = _TAKERS.get(library, (library, "from_dlpack"))
    if library not in sys.modules:
        return output
    take = getattr(importlib.import_module(module), name, None)
    if take is None:
        return output
    try:
        return take(output)
    except Exception:  # noqa: BLE001 (each library has errors of its own for this)
        return output


# Types that this torch's DLPack was found not to take.
_not_exchanged: Set[str] = set()


def to_torch(output: Union[Output, DeviceOutput]) -> Any:
    """A torch tensor over the memory of `output`; by its bytes, which every torch's DLPack can read, where its type is
    not taken."""
    import torch

    if output.nbytes and isinstance(output, Output) and output.dtype not in _not_exchanged:
        try:
            # A capsule is not asked what devices it is for.
            return torch.from_dlpack(output.__dlpack__())
        except Exception:  # noqa: BLE001 (versions of torch have different errors for this)
            _not_exchanged.add(output.dtype)
    dtype = getattr(torch, output.dtype)
    if isinstance(output, DeviceOutput):
        device = torch.device("cuda", output.device)
        if output.nbytes == 0:
            return torch.empty(output.shape, dtype=dtype, device=device)
        return torch.as_tensor(output.as_uint8(), device=device).view(dtype).reshape(output.shape)
    if output.nbytes == 0:
        return torch.empty(output.shape, dtype=dtype)
    return torch.from_dlpack(output.as_uint8()).view(dtype).reshape(output.shape)


def to_memoryview(output: Output) -> memoryview:
    """A memoryview over the memory of `output`."""
    kind: Any = type("Memory", (ctypes.c_char * output.nbytes,), {})
    memory = kind.from_address(output.address)
    memory.owner = output
    view: Any = memoryview(memory).cast("B")
    code = _FORMATS[output.dtype]
    shape = tuple(output.shape)
    if output.dtype.startswith("complex"):
        shape += (2,)
    if 0 in shape:
        # memoryview cannot cast to a shape with a zero in it.
        return view.cast(code)
    return view.cast(code, shape)


def cuda_streams(held: Any) -> Optional[Tuple[int, Callable[[], int], int]]:
    """Of a torch tensor on a CUDA device, or the first of several: the stream that makes it, what gives the stream
    that is to wait for the results, and the device's number. None on the host."""
    while isinstance(held, (list, tuple)):
        held = next((part for part in held if part is not None), None)
    device = getattr(held, "device", None)
    if device is None or device.type != "cuda":
        return None
    import torch

    def now() -> int:
        return torch.cuda.current_stream(device).cuda_stream

    # A tensor of a device always knows the number; only a name without one means the current device.
    number = torch.cuda.current_device() if device.index is None else device.index
    return now(), now, number

"""Results as arrays of the caller's kind, without a copy."""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Optional, Tuple, Union

from ._native import DeviceOutput, Output

# What memoryview can be cast to; bfloat16 has no format and shows as its 16 bits, complex as pairs.
_FORMATS = {
    "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i",
    "uint64": "Q", "int64": "q", "float32": "f", "float64": "d", "bool": "?",
    "bfloat16": "H", "float16": "H", "complex64": "f", "complex128": "d",
}  # fmt: skip


def wrap(output: Output, like: Optional[type] = None) -> Any:
    """The memory of `output` as a torch tensor where `like` is torch's, else as a NumPy array, or as a
    memoryview where there is no NumPy."""
    if like is not None and like.__module__.partition(".")[0] == "torch":
        return to_torch(output)
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


def to_torch(output: Union[Output, DeviceOutput]) -> Any:
    """A torch tensor over the memory of `output`. It goes by bytes, which every torch's DLPack can read."""
    import torch

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


def cuda_streams(held: Any) -> Optional[Tuple[int, Callable[[], int]]]:
    """Of a torch tensor on a CUDA device, or the first of several: the stream that makes it, and what gives the stream
    that is to wait for the results. None on the host."""
    while isinstance(held, (list, tuple)):
        held = next((part for part in held if part is not None), None)
    device = getattr(held, "device", None)
    if device is None or device.type != "cuda":
        return None
    import torch

    def now() -> int:
        return torch.cuda.current_stream(device).cuda_stream

    return now(), now

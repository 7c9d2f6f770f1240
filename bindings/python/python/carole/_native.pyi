from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, final

__all__ = [
    "Handle",
    "DeviceOutput",
    "Output",
    "Persistent",
    "__version__",
    "add_process_set",
    "init",
    "is_initialized",
    "launch",
    "learn_torch",
    "news",
    "perf",
    "plan",
    "process_sets",
    "reform",
    "remove_process_set",
    "shared_zeros",
    "shutdown",
    "start",
    "submit",
    "submit_raw",
    "transfer",
    "transfer_raw",
    "world",
]
__version__: str

@final
class Handle:
    """An operation in flight."""

    @property
    def taken(self) -> bool: ...
    def poll(self) -> bool: ...
    def wait(self, timeout: Optional[float] = None) -> Any: ...
    def synchronize(self) -> Any: ...

@final
class Output:
    """A result in memory that the engine allocated, or a tensor in shared memory."""

    @property
    def shape(self) -> Tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def is_shared(self) -> bool: ...
    @property
    def address(self) -> int: ...
    @property
    def __array_interface__(self) -> Dict[str, Any]: ...
    def tobytes(self) -> bytes: ...
    def as_uint8(self) -> Output: ...
    def __dlpack__(
        self,
        *,
        stream: Optional[Any] = None,
        max_version: Optional[Tuple[int, int]] = None,
        dl_device: Optional[Tuple[int, int]] = None,
        copy: Optional[bool] = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> Tuple[int, int]: ...

@final
class Persistent:
    """A collective that was planned once and can be started many times."""

    def start(self) -> None: ...
    def poll(self) -> bool: ...
    def wait(self, timeout: Optional[float] = None) -> Any: ...
    def __call__(self) -> Any: ...
    @property
    def result(self) -> Any: ...
    @property
    def is_direct(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Persistent: ...
    def __exit__(self, *error: Any) -> None: ...

@final
class DeviceOutput:
    """A result in memory of a CUDA device that the engine allocated."""

    @property
    def shape(self) -> Tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]: ...
    def as_uint8(self) -> DeviceOutput: ...
    def __dlpack__(
        self,
        *,
        stream: Optional[int] = None,
        max_version: Optional[Tuple[int, int]] = None,
        dl_device: Optional[Tuple[int, int]] = None,
        copy: Optional[bool] = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> Tuple[int, int]: ...

def shared_zeros(shape: Sequence[int], dtype: str) -> Output: ...
def init(knobs: Sequence[Tuple[str, str]], process_sets: Sequence[Sequence[int]]) -> None: ...
def shutdown() -> None: ...
def is_initialized() -> bool: ...
def world() -> Dict[str, Any]: ...
def reform() -> None: ...
def news() -> Tuple[bool, bool]: ...
def stands(set: int, name: str) -> bool: ...
def process_sets() -> List[Tuple[int, List[int], Optional[int]]]: ...
def add_process_set(members: Sequence[int]) -> int: ...
def remove_process_set(set: int) -> bool: ...
def submit(
    collective: int,
    tensors: Sequence[Any],
    outs: Optional[Sequence[Any]],
    single: bool,
    name: Optional[str],
    set: int,
    op: Any,
    pre: Any,
    post: Any,
    root: Any,
    join_average: Any,
    splits: Optional[Any],
    refused: Optional[str] = None,
    waits: bool = False,
) -> Handle: ...
def submit_raw(
    collective: int,
    tensors: Sequence[Tuple[int, int, int, Sequence[int]]],
    keep: Any,
    name: Optional[str],
    set: int,
    op: Any,
    pre: Any,
    post: Any,
    root: Any,
    splits: Optional[Any],
    refused: Optional[str] = None,
    waits: bool = False,
    finish: Optional[Callable[[Any], Any]] = None,
    ended: Optional[Callable[[bool], None]] = None,
    streams: Optional[Tuple[int, Callable[[], int], int]] = None,
) -> Handle: ...
def learn_torch(
    class_: type,
    dtypes: Sequence[Tuple[Any, int]],
    strided: Any,
    empty_like: Callable[[Any], Any],
    to_torch: Callable[[Any], Any],
    everyone: Any,
    /,
) -> None: ...
def start(
    collective: int,
    tensors: Any,
    in_place: Optional[bool],
    prefix: str,
    name: Optional[str],
    set: Any,
    op: int,
    pre: float,
    post: float,
    root: int,
    waits: bool,
    /,
) -> Optional[Handle]: ...
def run(
    collective: int,
    tensor: Any,
    in_place: Optional[bool],
    prefix: str,
    name: Optional[str],
    set: Any,
    op: int,
    pre: float,
    post: float,
    root: int,
    waits: bool,
    /,
) -> Any: ...
def observe(observed: bool) -> None: ...
def plan(
    collective: int,
    tensors: Sequence[Any],
    outs: Optional[Sequence[Any]],
    single: bool,
    name: Optional[str],
    set: int,
    op: Any,
    pre: Any,
    post: Any,
    root: Any,
    splits: Optional[Any],
    refused: Optional[str],
) -> Persistent: ...
def transfer(sending: bool, tensor: Any, peer: Any, tag: Any, set: int) -> Handle: ...
def transfer_raw(
    sending: bool, address: int, nbytes: int, keep: Any, peer: Optional[int], tag: int, set: int,
    streams: Tuple[int, Callable[[], int], int],
) -> Handle: ...
def launch(arguments: Sequence[str]) -> int: ...
def perf(arguments: Sequence[str]) -> int: ...

"""Operations in flight, as c10d sees them."""

from __future__ import annotations

import collections
import queue
import threading
from typing import Any, Callable, Deque, List, Optional

import torch
from torch._C import _distributed_c10d as c10d

from .. import _native
from .._errors import BrokenError, MismatchError, ShutdownError, TimeoutError
from .desync import FIRST_LOOK_S, NEXT_LOOK_S

# How long the thread that completes futures waits for one operation before it looks at the others.
_TURN_S = 0.05
# How long a wait goes on beyond the group's timeout, within which the engine says which rank is missing.
_GRACE_S = 10.0


class DoneWork(c10d.Work):
    """An operation that was over at once."""

    def __init__(self, outputs: List[torch.Tensor]) -> None:
        super().__init__()
        self._outputs = outputs

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> Any:
        return None

    def synchronize(self) -> None:
        pass

    def result(self) -> List[torch.Tensor]:
        return self._outputs

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._outputs)
        return future


def _devices(held: Any) -> List[torch.device]:
    while isinstance(held, (list, tuple)) and held:
        held = held[0]
    return [held.device] if isinstance(held, torch.Tensor) and held.is_cuda else []


class CaroleWork(c10d.Work):
    """An operation of the engine. Whoever waits for it drives it; a future is completed by a thread of ours."""

    def __init__(
        self,
        handle: _native.Handle,
        outputs: List[torch.Tensor],
        finish: Optional[Callable[[Any], None]],
        timeout_s: float,
        keep: Any = None,
        source: int = -1,
        stuck: Optional[Callable[[], Optional[str]]] = None,
        message: Optional[str] = None,
    ) -> None:
        super().__init__()
        self._handle = handle
        self._outputs = outputs
        self._finish = finish
        self._timeout_s = timeout_s
        self._keep = keep
        self._source = source
        # Says why the operation will never end, where that can be found out.
        self._stuck = stuck
        # A message in words that name its peer, the only rank that the wait can be for.
        self._message = message
        self._lock = threading.Lock()
        self._done = False
        self._error: Optional[BaseException] = None
        self._future: Optional[torch.futures.Future] = None

    def _complete(self, timeout_s: float) -> None:
        """Waits, and puts results where they belong. Raises what the operation ended with."""
        if not self._lock.acquire(timeout=timeout_s):
            raise TimeoutError(f"{self._message or 'the operation'} was not finished after {timeout_s} s")
        try:
            if not self._done:
                try:
                    outcome = self._wait(timeout_s)
                    if self._finish is not None:
                        self._finish(outcome)
                except (TimeoutError, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self._error = error
                self._done = True
                self._keep = self._finish = None
            if self._error is not None:
                raise self._error
        finally:
            self._lock.release()

    def _wait(self, timeout_s: float) -> Any:
        if self._message is not None:
            try:
                return self._handle.wait(timeout_s)
            except TimeoutError:
                words = f"{self._message} was not finished after {timeout_s} s; it goes on and can be waited for again"
                raise TimeoutError(words) from None
        if self._stuck is None or timeout_s <= FIRST_LOOK_S:
            return self._handle.wait(timeout_s)
        left, turn = timeout_s, FIRST_LOOK_S
        while True:
            try:
                return self._handle.wait(min(turn, left))
            except TimeoutError:
                left, turn = left - turn, NEXT_LOOK_S
                words = self._stuck()
                if words is not None:
                    raise MismatchError(words) from None
                if left <= 0:
                    raise
            except (BrokenError, ShutdownError) as error:
                # The rank that it was waiting for may have found out why, and ended.
                words = self._stuck() if turn == NEXT_LOOK_S else None
                if words is not None:
                    raise MismatchError(words) from error
                raise

    def wait(self, timeout: Any = None) -> bool:
        seconds = timeout.total_seconds() if timeout is not None else 0.0
        if seconds > 0:
            self._complete(seconds)
            return True
        # The engine has no more to say about a message, whose peer is known.
        grace_s = _GRACE_S if self._message is None else 0.0
        try:
            self._complete(self._timeout_s + grace_s)
        except TimeoutError as error:
            raise BrokenError(f"{error}; the group's timeout is {self._timeout_s} s") from None
        return True

    def is_completed(self) -> bool:
        return self._done or self._handle.poll()

    def is_success(self) -> bool:
        if not self.is_completed():
            return False
        return self.exception() is None

    def exception(self) -> Any:
        if self.is_completed():
            try:
                self._complete(self._timeout_s)
            except BaseException as error:
                return error
        return None

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> List[torch.Tensor]:
        self.wait()
        return self._outputs

    def source_rank(self) -> int:
        return self._source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        if self._future is None:
            # On a device whoever waits for the future waits for the stream on which it was completed.
            devices = _devices(self._outputs)
            self._future = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
            _completer().take(self)
        return self._future

    def settle(self, timeout_s: float) -> bool:
        """Completes the future, if the operation ends within the time."""
        assert self._future is not None
        try:
            self._complete(timeout_s)
        except TimeoutError:
            return False
        except BaseException as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(self._outputs)
        return True


class AnySourceWork(CaroleWork):
    """A receive from any rank: which one is known when it is complete."""

    def __init__(self, *arguments: Any, group_rank: Callable[[int], int], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._group_rank = group_rank

    def _wait(self, timeout_s: float) -> Any:
        source = super()._wait(timeout_s)
        self._source = self._group_rank(source)
        return source

    def source_rank(self) -> int:
        """The sender's rank in the group; -1 as long as nothing has come."""
        if self._source < 0 and self.is_completed():
            self._complete(self._timeout_s)
        return self._source

    _source_rank = source_rank


class CoalescedWork(DoneWork):
    """Several operations as one."""

    def __init__(self, works: List[Any], outputs: List[torch.Tensor]) -> None:
        super().__init__(outputs)
        self._works = works

    def wait(self, timeout: Any = None) -> bool:
        for work in self._works:
            work.wait() if timeout is None else work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return all(work.is_success() for work in self._works)

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future:
        outputs = self._outputs
        return torch.futures.collect_all([work.get_future() for work in self._works]).then(lambda _: outputs)


class _Completer:
    """A thread that waits for operations that a future was asked for."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._queue: "queue.SimpleQueue[CaroleWork]" = queue.SimpleQueue()
        self._thread: Optional[threading.Thread] = None
        self._lock = threading.Lock()

    def take(self, work: CaroleWork) -> None:
        if work.is_completed() and work.settle(_TURN_S):
            return
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="carole-futures", daemon=True)
                self._thread.start()
        self._queue.put(work)

    def _run(self) -> None:
        _here.level = self._level
        waiting: Deque[CaroleWork] = collections.deque()
        while True:
            if not waiting:
                waiting.append(self._queue.get())
            while not self._queue.empty():
                waiting.append(self._queue.get())
            # Operations mostly end in their order, but a callback of a later one may be what the first waits for.
            if waiting[0].settle(_TURN_S):
                waiting.popleft()
            else:
                waiting = collections.deque(w for w in waiting if not (w.is_completed() and w.settle(_TURN_S)))


_here = threading.local()
_completers: List[_Completer] = []
_growing = threading.Lock()


def _completer() -> _Completer:
    """The thread for futures that this thread asks for. A callback runs on such a thread and may itself wait for
    another future (PowerSGD's does), so that one belongs to the next thread."""
    level = getattr(_here, "level", -1) + 1
    with _growing:
        while len(_completers) <= level:
            _completers.append(_Completer(len(_completers)))
        return _completers[level]

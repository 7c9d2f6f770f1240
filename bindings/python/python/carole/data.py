"""Loading data beside the training, with Horovod's names."""

from __future__ import annotations

import queue
import threading
from typing import Any, Iterator, Optional


class BaseDataLoader:
    """A data loader: subclasses say how long it is and what comes."""

    def __len__(self) -> int:
        raise NotImplementedError

    def _iterate(self) -> Iterator[Any]:
        """Yields batches."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        for batch in self._iterate():
            yield self._process_batch(batch)

    def _process_batch(self, batch: Any) -> Any:
        """What is done to a batch on the training's thread."""
        return batch


class AsyncDataLoaderMixin:
    """Loads batches on a thread of its own: `class Loader(AsyncDataLoaderMixin, SomeLoader)`.

    Args:
        async_loader_queue_size: how many batches may wait; 0 loads on the training's thread.
        debug_data_loader: accepted for Horovod's sake.
    """

    def __init__(self, async_loader_queue_size: int = 64, debug_data_loader: bool = False, *args: Any,
                 **kwargs: Any) -> None:  # fmt: skip
        self.async_loader_queue_size = async_loader_queue_size
        self.debug_data_loader = debug_data_loader
        self._stop: Optional[threading.Event] = None
        self._thread: Optional[threading.Thread] = None
        super().__init__(*args, **kwargs)

    def close_async_loader(self) -> None:
        """Ends the thread."""
        if self._stop is not None:
            self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._stop = self._thread = None

    def __del__(self) -> None:
        self.close_async_loader()

    def _load(self, batches: "queue.Queue[Any]", stop: threading.Event) -> None:
        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    batches.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        try:
            for batch in self._iterate():  # type: ignore[attr-defined]
                if not put((batch, None)):
                    return
            put(None)
        except BaseException as error:
            # It belongs to the one who iterates.
            put((None, error))

    def __iter__(self) -> Iterator[Any]:
        if self.async_loader_queue_size <= 0:
            yield from super().__iter__()  # type: ignore[misc]
            return
        self.close_async_loader()
        batches: "queue.Queue[Any]" = queue.Queue(self.async_loader_queue_size)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._load, args=(batches, self._stop), daemon=True)
        self._thread.start()
        try:
            while True:
                item = batches.get()
                if item is None:
                    return
                batch, error = item
                if error is not None:
                    raise error
                yield self._process_batch(batch)  # type: ignore[attr-defined]
        finally:
            self.close_async_loader()

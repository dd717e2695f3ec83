"""Let a stage of work run ahead of the one that uses its results."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# A reader that waits for a pipe cannot be woken; everything else ends within a chunk of work.
_WAIT_FOR_READER = 0.5
_WAIT_FOR_WORK = 30.0


class Prefetch(Generic[T]):
    """Iterates over `work` applied to `items`, done in a thread of its own that is at most `depth` items ahead.

    What the thread raises is raised here. Leaving the `with` block ends the thread, and that of `source`, the `Prefetch`
    that the items come from: native code must not be running when the program ends and frees what it uses.
    """

    def __init__(
        self,
        items: Iterable,
        work: Callable[..., T] = lambda item: item,
        depth: int = 2,
        source: Prefetch | None = None,
    ):
        self._items, self._work, self._source = items, work, source
        self._results: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        # A daemon: blocked in the read of a pipe, it must not hold up the end of the program.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._source is not None:
            self._source.__exit__(*error)
        with contextlib.suppress(queue.Full):  # a full queue has nobody waiting for it
            self._results.put_nowait((None, StopIteration()))
        self._thread.join(_WAIT_FOR_READER if self._source is None else _WAIT_FOR_WORK)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error = self._results.get()
        if error is not None:
            raise error
        return item

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((self._work(item), None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that iterates
            self._put((None, error))

    def _put(self, result: tuple) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._results.put(result, timeout=0.1)
                return True
        return False

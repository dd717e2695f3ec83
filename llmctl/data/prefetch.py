"""Let a stage of work run ahead of the one that uses its results."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Iterate over `items` in a thread of their own, at most `depth` items ahead; what it raises is raised here."""
    results: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()
    # A daemon: blocked in the read of a pipe, it must not hold up the end of the program.
    threading.Thread(target=_work, args=(items, results, stopped), daemon=True).start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            if item is results:
                return
            yield item
    finally:
        stopped.set()


def _work(items: Iterable[T], results: queue.Queue, stopped: threading.Event) -> None:
    def put(item: object, error: BaseException | None = None) -> bool:
        while not stopped.is_set():
            try:
                results.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put(item):
                return
        put(results)
    except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that iterates
        put(None, error)

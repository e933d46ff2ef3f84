"""Prefetch: a thread works ahead of the consumer."""

import queue
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import TypeVar

from torchtitan.tools.logging import logger

T = TypeVar("T")

# Seconds without a new item after which the consumer logs a warning, again and again.
PATIENCE = 60.0


class _Closed(Exception):
    pass


def prefetch(items: Iterable[T], depth: int, name: str) -> Generator[T]:
    """The same items. A thread called ``name`` makes up to ``depth`` of them ahead.

    An exception of ``items`` is raised at its place. Closing the result closes ``items`` in its thread.
    """
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, item: T | BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put((kind, item), timeout=0.1)
            except queue.Full:
                continue
        raise _Closed

    def produce() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                put("item", item)
            put("end", None)
        except _Closed:
            pass
        except BaseException as error:  # the consumer raises it again
            with suppress(_Closed):
                put("error", error)
        finally:
            close = getattr(iterator, "close", None)
            if close:
                close()

    thread = threading.Thread(target=produce, name=name, daemon=True)
    thread.start()
    try:
        while True:
            kind, item = _get(ready, name)
            if kind == "end":
                return
            if kind == "error":
                raise item  # type: ignore[misc]
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()


def _get(ready: "queue.Queue", name: str):
    begin = time.monotonic()
    while True:
        try:
            return ready.get(timeout=PATIENCE)
        except queue.Empty:
            logger.warning("still waiting for the %s, for %d s so far", name, time.monotonic() - begin)

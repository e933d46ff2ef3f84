"""Stopping a run from outside: Ctrl-C, SIGTERM, and SIGUSR1, which Slurm sends before it takes a node away."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal sends Ctrl-C to torchrun and its ranks, and torchrun passes it on to the ranks once more.
REPEAT_SECONDS = 1.0


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupted = 0.0

    def __bool__(self) -> bool:
        return self.name is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler: it only takes a note, so that what is under way, such as a save, is finished.

        A second Ctrl-C ends the process at once.
        """
        if number == signal.SIGINT and self._interrupted:
            if time.monotonic() - self._interrupted > REPEAT_SECONDS:
                os._exit(130)
        elif number == signal.SIGINT:
            self._interrupted = time.monotonic()
        self.name = signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take a note of stop signals instead of dying of them; before and after, they do what they did."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Only the main thread can have handlers.
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shielded() -> Iterator[None]:
    """Threads and processes that are started within this context never receive the stop signals.

    torchrun sends a signal to a rank and to all that it has started; a process that saves a checkpoint has to outlive
    it. What arrives meanwhile is received afterwards.
    """
    resource_tracker.ensure_running()  # Its start, which any other may cause, would let the signals through again.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(number: int) -> None:
    """Have the system send this process a signal when its parent ends, however that ends (on Linux)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG

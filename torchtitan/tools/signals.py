"""Stop a run from outside, by Ctrl-C, SIGTERM, or SIGUSR1, which Slurm can send before it ends a job."""

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
    """Says whether this process has received a stop signal, and which."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupted = 0.0

    def __bool__(self) -> bool:
        return self.name is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It only stores the name, so that running work, such as a save, is finished.

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
    """In this context, stop signals set the request instead of ending the process."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Only the main thread can set handlers.
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
    """Threads and processes that are started in this context never receive the stop signals.

    torchrun sends a signal to a rank and to all its child processes, but the process that saves a checkpoint must
    survive. This process receives signals from this time when the context ends.
    """
    resource_tracker.ensure_running()  # Start it now: a start inside the context would unblock the signals.
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

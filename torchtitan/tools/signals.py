"""Stop a run from outside, by SIGTERM, or by SIGUSR1, which Slurm can send before it ends a job."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Says whether this process has received a stop signal, and which."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It only stores the name, so that running work, such as a save, is finished."""
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

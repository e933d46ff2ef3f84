"""Worker processes and their progress."""

import multiprocessing
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch

from torchtitan.datasets.bad_rows import BAD_ROWS_FILE, MIN_JUDGED, one_line, require_usable
from torchtitan.datasets.decoding import num_threads
from torchtitan.datasets.shards import ShardError, WriteError, read_part
from torchtitan.tokenization.spec import CONTINUE, Counts, Spec, write_text
from torchtitan.tokenization.worker import ShardTokenizer, relative
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import quiet_transformers
from torchtitan.tools.memory import tune_malloc
from torchtitan.tools.signals import end_with_parent

_LOG_SECONDS = 10.0
_SEND_SECONDS = 0.2


class Progress:
    """The progress of all processes: a bar on a terminal, else a line every few seconds.

    :meth:`report` raises UserError if too many rows are bad.
    """

    def __init__(self, spec: Spec, done: Counts, rows: int):
        self.spec, self.total = spec, rows
        self.shown, self.written = replace(done), replace(done)
        self._at_start = replace(done)
        self._begin = self._told = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=rows, initial=done.rows, desc=spec.source.name, unit=" rows", dynamic_ncols=True)

    def report(self, kind: str, counts: Counts) -> None:
        """Count rows that are done (``rows``), or a part that is written (``part``)."""
        if kind == "part":
            self.written.add(counts)
            check_share(self.spec, self.written, MIN_JUDGED)
            return
        self.shown.add(counts)
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts(), refresh=False)
            self._bar.update(counts.rows)
        elif time.monotonic() - self._told >= _LOG_SECONDS:
            self._told = time.monotonic()
            rows = self.shown.rows
            rate = (rows - self._at_start.rows) / (self._told - self._begin)
            left = f"{timedelta(seconds=round((self.total - rows) / rate))} left" if rate else "time left unknown"
            share = f"{rows:,} of {self.total:,} rows ({100 * rows / self.total:.1f} %)"
            print(f"{self.spec.source.name}: {share}, {self._facts()}, {left}", file=sys.stderr, flush=True)

    def speed(self) -> float:
        """Seconds of audio per second, since the start of this run."""
        return (self.shown.seconds - self._at_start.seconds) / max(1e-9, time.monotonic() - self._begin)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _facts(self) -> str:
        facts = f"{self.shown.seconds / 3600:.2f} h of audio, {self.speed():.0f} s of it a second"
        return facts + f", {self.shown.bad:,} bad"


def write_bad_rows(spec: Spec) -> None:
    """Write the list of all bad rows and files so far."""
    lines = [(relative(path, spec.source), relative(reason, spec.source)) for path, reason in spec.index.bad_files]
    for shard in range(spec.num_shards):
        if spec.shard_path(shard).exists():
            paths = [spec.shard_path(shard)]
        else:
            paths = [p for i in range(spec.num_parts(shard)) if (p := spec.part_path(shard, i)).exists()]
        for path in paths:
            with suppress(ShardError):  # merged by another process in between
                lines += [(key, reason) for key, reason in read_part(path)[1]["failed"]]
    text = "".join(f"{one_line(key)}\t{one_line(reason)}\n" for key, reason in sorted(lines))
    write_text(spec.output / BAD_ROWS_FILE, text)


def check_share(spec: Spec, counts: Counts, at_least: int) -> None:
    """Raise UserError if too many rows are bad, once there are ``at_least`` rows."""
    if counts.rows >= at_least:
        try:
            file = spec.output / BAD_ROWS_FILE
            require_usable(counts.bad, counts.rows, spec.max_bad_share, "max_bad_share", file)
        except UserError:
            write_bad_rows(spec)
            raise


def _work(spec: Spec, device: torch.device, threads: int, channel: Any) -> None:
    """A worker process: does the jobs that the parent sends."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others.
    signal.signal(signal.SIGTERM, _exit_cleanly)
    shown = Counts()
    sent = time.monotonic()

    def report(kind: str, counts: Counts) -> None:
        nonlocal shown, sent
        if kind == "rows":
            shown.add(counts)
        if kind == "part" or time.monotonic() - sent >= _SEND_SECONDS:
            channel.send(("rows", shown))
            shown, sent = Counts(), time.monotonic()
        if kind == "part":
            channel.send((kind, counts))

    try:
        settle(device)
        worker = ShardTokenizer(spec, device, threads, report)
        channel.send(("idle", None))
        while True:
            shard, parts = channel.recv()
            if parts is None:
                worker.merge(shard)
            else:
                worker.make_parts(shard, parts)
            channel.send(("idle", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return
    except UserError as error:
        channel.send(("unwritable" if isinstance(error, WriteError) else "error", str(error)))
    except Exception:
        channel.send(("crash", traceback.format_exc()))


def settle(device: torch.device) -> None:
    """Set up this process to share the machine with other worker processes."""
    quiet_transformers()
    tune_malloc()
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _exit_cleanly(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the main thread with an exception, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit_cleanly)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Jobs:
    """The open jobs: (shard, parts to make), and (shard, None) to merge a shard whose parts are complete."""

    def __init__(self, spec: Spec, shards: Sequence[int], num_processes: int):
        # If there are few shards, several processes work on each, so that all have work up to the end.
        pieces = -(-4 * num_processes // max(1, len(shards)))
        self._waiting: deque[tuple[int, list[int] | None]] = deque()
        self._unfinished: dict[int, int] = {}
        for shard in shards:
            parts = [p for p in range(spec.num_parts(shard)) if not spec.part_path(shard, p).exists()]
            size = max(1, -(-len(parts) // pieces))
            runs = [parts[i : i + size] for i in range(0, len(parts), size)] or [[]]
            self._waiting.extend((shard, run) for run in runs)
            self._unfinished[shard] = len(runs)
        self.largest = len(self._waiting)

    def next(self) -> tuple[int, list[int] | None] | None:
        return self._waiting.popleft() if self._waiting else None

    def done(self, job: tuple[int, list[int] | None]) -> None:
        shard, parts = job
        if parts is not None:
            self._unfinished[shard] -= 1
            if self._unfinished[shard] == 0:
                self._waiting.appendleft((shard, None))


@dataclass
class _Worker:
    number: int
    process: Any
    channel: Any
    job: tuple[int, list[int] | None] | None = None
    idle: bool = False


def run_processes(spec: Spec, shards: Sequence[int], devices: Sequence[torch.device], progress: Progress) -> None:
    """Make shards with one process per device.

    Raises:
        UserError: a process died, the output cannot be written, or too many rows are bad. All processes are ended.
    """
    context = multiprocessing.get_context("spawn")
    jobs = _Jobs(spec, shards, len(devices))
    workers: list[_Worker] = []
    try:
        for number, device in enumerate(devices[: jobs.largest]):
            ours, theirs = context.Pipe()
            arguments = (spec, device, num_threads(device, len(devices)), theirs)
            process = context.Process(target=_work, args=arguments, name=f"tokenizer {number}", daemon=True)
            process.start()
            theirs.close()  # otherwise the channel would stay open when the process ends
            workers.append(_Worker(number, process, ours))
        while True:
            for worker in workers:
                if worker.idle and (job := jobs.next()) is not None:
                    worker.job, worker.idle = job, False
                    with suppress(OSError):  # a dead worker is noticed below
                        worker.channel.send(job)
            if all(worker.idle for worker in workers):
                return
            for ready in connection.wait([worker.channel for worker in workers]):
                worker = next(worker for worker in workers if worker.channel is ready)
                _receive(spec, worker, jobs, progress)
    finally:
        _end(workers)


def _receive(spec: Spec, worker: _Worker, jobs: _Jobs, progress: Progress) -> None:
    """Take one message from a worker. Raises UserError if the worker has ended."""
    try:
        kind, content = worker.channel.recv()
    except (EOFError, OSError):
        raise UserError(_obituary(spec, worker)) from None
    if kind in ("error", "unwritable"):
        raise (WriteError if kind == "unwritable" else UserError)(content)
    if kind == "crash":
        raise RuntimeError(f"worker process {worker.number} failed:\n{content}")
    if kind == "idle":
        if worker.job is not None:
            jobs.done(worker.job)
        worker.job, worker.idle = None, True
    else:
        progress.report(kind, content)


def _obituary(spec: Spec, worker: _Worker) -> str:
    worker.process.join(10)
    code = worker.process.exitcode
    if code is not None and code < 0:
        with suppress(ValueError):
            code = signal.Signals(-code).name
        how = f"was ended by {code}"
        if code == "SIGKILL":
            how += ", perhaps because memory ran out"
    else:
        how = f"ended with exit code {code}"
    place = "before its first shard" if worker.job is None else f"at {spec.shard_path(worker.job[0]).name}"
    return (
        f"worker process {worker.number} (pid {worker.process.pid}) {how}, {place}; nothing finished is lost: "
        f"{CONTINUE}."
    )


def _end(workers: list[_Worker]) -> None:
    """End all processes. Those that wait for a job are killed at once, because they have nothing to clean up."""
    for worker in workers:
        if worker.idle:
            worker.process.kill()
        elif worker.process.is_alive():
            worker.process.terminate()
    deadline = time.monotonic() + 10
    for worker in workers:
        worker.process.join(max(0.1, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.channel.close()

"""Recordings to waveforms, decoded by threads ahead of their use: for training, tokenization and evaluations alike.

A recording that cannot be used is a :class:`Decoded` with a ``reason``, never an exception.
"""

import math
import os
import threading
from collections.abc import Generator
from concurrent.futures import Executor, Future
from contextlib import closing, suppress
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from torchtitan.audio.waveform import FRAME_RATE, SAMPLE_RATE, AudioError, load_beginning
from torchtitan.datasets.files import RecordingFile
from torchtitan.datasets.readers import AudioDataset, index_files
from torchtitan.datasets.rows import Row
from torchtitan.datasets.sources import find_files, sources_from_config
from torchtitan.tools.errors import first_line
from torchtitan.tools.logging import logger
from torchtitan.tools.prefetch import prefetch

# Most recordings that wait, however short they are.
MOST_AHEAD = 256
# FLAC of speech has about this many bytes a second: a guess where no header gives the length.
_BYTES_PER_SECOND = 16_000


class UnreadError(AudioError):
    """A recording could not be read, which may pass; any other AudioError is a verdict on what was read."""


def decode_row(
    row: Row, max_seconds: float | None, retries: int, resampler: str = "torchaudio", name: str = "its audio"
) -> tuple[torch.Tensor, float]:
    """The waveform of a row, as :func:`load_beginning` gives it, and the length of the whole row in seconds.

    A recording in a local file of its own that fails is read once more, as patiently as tables are.

    Args:
        name: what messages call the recording.

    Raises:
        AudioError: it cannot be used, whatever the reason.
    """
    if row.error is not None:
        raise UnreadError(row.error)
    audio = row.audio
    if audio is None:
        raise AudioError("the row has neither audio bytes nor a path.")
    try:
        if not isinstance(audio, str):
            return load_beginning(audio, max_seconds, name, resampler, row.part)
        if not audio.startswith("hf://"):
            with suppress(AudioError, OSError):
                return load_beginning(audio, max_seconds, name, resampler, row.part)
        file = RecordingFile(audio, retries)
        with file:
            try:
                return load_beginning(file, max_seconds, name, resampler, row.part)  # type: ignore[arg-type]
            except AudioError:
                if file.failure is None:
                    raise
                missing = isinstance(file.failure, FileNotFoundError)
                reason = getattr(file.failure, "strerror", None) or first_line(file.failure)
                raise UnreadError(f"{name}: {'there is no such file' if missing else reason}.") from None
    except AudioError:
        raise
    except Exception as error:  # one recording must not end anything, whatever it brings about
        raise AudioError(f"{name}: cannot be decoded ({type(error).__name__}: {error}).") from None


@dataclass
class Decoded:
    """A recording on its way to codes.

    It has a ``waveform`` (float32 [n] at 24 kHz), a ``reason`` why it has none, or neither: then its source's limits
    leave it out. ``seconds`` is the length of the whole recording, also where the waveform was cut. ``lasts`` is false
    where the recording could not be read, which may pass.
    """

    row: Row
    waveform: torch.Tensor | None = None
    seconds: float = 0.0
    reason: str | None = None
    lasts: bool = True

    @property
    def num_samples(self) -> int:
        return 0 if self.waveform is None else self.waveform.numel()


@dataclass(frozen=True)
class RecordingDecoder:
    """Decodes recordings.

    Attributes:
        max_seconds: recordings are cut at this.
        retries: how often the reading of a recording's own file is tried again.
        resampler: one of :data:`~torchtitan.audio.waveform.RESAMPLERS`.
        name: what messages call a recording; None calls it by its key.
    """

    max_seconds: float | None = None
    retries: int = 0
    resampler: str = "torchaudio"
    name: str | None = "its audio"

    def __call__(self, row: Row) -> Decoded:
        if row.error is None and not row.is_admitted(row.seconds):
            return Decoded(row)
        try:
            waveform, seconds = decode_row(row, self.max_seconds, self.retries, self.resampler, self.name or row.key)
        except AudioError as error:
            return Decoded(row, reason=str(error), lasts=not isinstance(error, UnreadError))
        cut = self.max_seconds is not None and waveform.numel() >= round(self.max_seconds * SAMPLE_RATE)
        seconds = max(waveform.numel() / SAMPLE_RATE, seconds if cut else 0.0)
        return Decoded(row, waveform if row.is_admitted(seconds) else None, seconds)

    def expected_samples(self, row: Row) -> int:
        """How long the waveform of a row is going to be, as far as can be told before it is decoded."""
        seconds = row.seconds
        if seconds is None and row.audio is not None:
            size = row.size
            if isinstance(row.audio, str):
                with suppress(OSError):
                    size = os.path.getsize(row.audio)
            seconds = size / _BYTES_PER_SECOND
        return round(min(seconds or 0.0, self.max_seconds or math.inf) * SAMPLE_RATE)


def decode_ahead(
    rows: Generator[Row | None],
    decoder: RecordingDecoder,
    pool: Executor | None,
    seconds: float,
    number: int = MOST_AHEAD,
) -> Generator[Decoded | None]:
    """Recordings in the order of their rows, decoded ahead of their use.

    Args:
        rows: are read in a thread of their own; None is passed on.
        pool: the threads that decode. Without any, a recording is decoded when it is taken.
        seconds: how much audio may wait. A longer recording waits alone.
        number: how many recordings may wait.
    """
    room = _Room(round(seconds * SAMPLE_RATE))

    def decode(row: Row, expected: int) -> Decoded:
        decoded = decoder(row)
        room.give(expected - decoded.num_samples)
        return decoded

    def started() -> Generator[Row | Future[Decoded] | None]:
        with closing(rows):
            for row in rows:
                if row is None or pool is None:
                    yield row
                else:
                    expected = decoder.expected_samples(row)
                    room.take(expected)
                    yield pool.submit(decode, row, expected)

    ahead = prefetch(started(), number if pool else 1, "reader")
    try:
        for item in ahead:
            if isinstance(item, Future):
                decoded = item.result()
                room.give(decoded.num_samples)
                yield decoded
            else:
                yield None if item is None else decoder(item)
    finally:
        room.close()
        ahead.close()


class _Room:
    """Room for decoded audio, in samples."""

    def __init__(self, size: int):
        self._size, self._held, self._closed = size, 0, False
        self._changed = threading.Condition()

    def take(self, samples: int) -> None:
        """Wait until there is room. What is too long for it gets all of it."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._held or self._held + samples <= self._size)
            self._held += samples

    def give(self, samples: int) -> None:
        with self._changed:
            self._held -= samples
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def num_threads(device: torch.device, num_processes: int = 1) -> int:
    """How many threads are to decode: a codec on a CPU takes most of a core, one on a GPU leaves the cores to them."""
    return 1 if device.type == "cpu" else max(1, min(8, num_cores() // max(1, num_processes)))


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def frames_of(seconds: float) -> int:
    """Frames that a recording of some length has."""
    return math.ceil(seconds * FRAME_RATE - 1e-6)


def open_recordings(path: str) -> AudioDataset:
    """The recordings of a data set that has nothing but a path: a folder, a file or a hub name.

    Files that cannot be read are named in a warning.

    Raises:
        UserError: there is no such data set, or it holds codes.
    """
    source = sources_from_config(SimpleNamespace(source=[{"path": path}]))[0]
    index = index_files(source, find_files(source))
    for file, reason in index.bad_files:
        logger.warning(f"{file}: what cannot be read of the file is left out: {reason}")
    return AudioDataset(source, index)

"""Threads decode recordings to waveforms ahead of their use, for training, tokenization and evaluations.

A bad recording becomes a :class:`Decoded` with a ``reason``, never an exception.
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

# Maximum number of decoded recordings that wait, however short they are.
MOST_AHEAD = 256
# Speech in FLAC has about this many bytes per second: a guess for recordings whose duration is not stated.
_BYTES_PER_SECOND = 16_000


class UnreadError(AudioError):
    """A recording could not be read, which may succeed later. Other AudioErrors say that its content is bad."""


def decode_row(
    row: Row, max_seconds: float | None, retries: int, resampler: str = "torchaudio", name: str = "its audio"
) -> tuple[torch.Tensor, float]:
    """The waveform of a row from :func:`load_beginning`, and the length of the whole row in seconds.

    If decoding a local audio file fails, the file is read again with retries, as tables are.

    Args:
        name: the recording's name in messages.

    Raises:
        AudioError: the recording is bad, for any reason.
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
    except Exception as error:  # one recording must not end the run, whatever it raises
        raise AudioError(f"{name}: cannot be decoded ({type(error).__name__}: {error}).") from None


@dataclass
class Decoded:
    """A recording after decoding.

    Attributes:
        waveform: float32 [n] at 24 kHz; None for a bad recording, and for one outside the limits of its source.
        seconds: length of the whole recording, even if the waveform was cut.
        reason: why the recording is bad; None if it is not.
        lasts: False if the recording could not be read, which may succeed later.
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
        max_seconds: recordings are cut to this length.
        retries: how often a failed read of an audio file is tried again.
        resampler: one of :data:`~torchtitan.audio.waveform.RESAMPLERS`.
        name: the recording's name in messages; None stands for its key.
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
        """An estimate of the length of a row's waveform before it is decoded."""
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
        rows: rows, which a separate thread reads; None is passed on.
        pool: threads that decode. None: a recording is decoded when it is taken.
        seconds: how much decoded audio may wait. A longer recording waits alone.
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
    """Limits the decoded audio that waits, in samples."""

    def __init__(self, size: int):
        self._size, self._held, self._closed = size, 0, False
        self._changed = threading.Condition()

    def take(self, samples: int) -> None:
        """Wait until there is room. A recording that is longer than the limit waits until no other is held."""
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
    """Number of threads that decode: one beside a codec on the CPU, which needs the cores itself, else up to 8."""
    return 1 if device.type == "cpu" else max(1, min(8, num_cores() // max(1, num_processes)))


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def frames_of(seconds: float) -> int:
    """Number of frames of a recording of this length."""
    return math.ceil(seconds * FRAME_RATE - 1e-6)


def open_recordings(path: str) -> AudioDataset:
    """The recordings of a data set without further settings: of a folder, a file or a hub name.

    A warning names files that cannot be read.

    Raises:
        UserError: there is no such data set, or it holds codes.
    """
    source = sources_from_config(SimpleNamespace(source=[{"path": path}]))[0]
    index = index_files(source, find_files(source))
    for file, reason in index.bad_files:
        logger.warning(f"{file}: the unreadable part of the file is left out: {reason}")
    return AudioDataset(source, index)

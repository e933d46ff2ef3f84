"""A row of a data set to a waveform, or one sentence why it is none; for training and for tokenizing ahead of it."""

from contextlib import suppress
from types import SimpleNamespace

import torch

from torchtitan.audio.waveform import AudioError, load_beginning
from torchtitan.datasets.readers import AudioDataset, RecordingFile, Row, index_files
from torchtitan.datasets.sources import find_files, sources_from_config
from torchtitan.tools.errors import first_line
from torchtitan.tools.logging import logger


class UnreadError(AudioError):
    """A recording could not be read, which may pass; any other AudioError is a verdict on what was read."""


def decode_row(
    row: Row, max_seconds: float | None, retries: int, resampler: str = "torchaudio"
) -> tuple[torch.Tensor, float]:
    """The waveform of a row, as :func:`load_beginning` gives it, and the length of the whole row in seconds.

    A recording in a local file of its own that fails is read once more, as patiently as tables are.

    Raises:
        AudioError: it cannot be used, whatever the reason.
    """
    name = "its audio"
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

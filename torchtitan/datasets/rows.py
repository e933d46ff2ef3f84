"""What all formats have in common: rows, and the interface of readers."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchtitan.audio.recording import Part, Samples, audio_of
from torchtitan.datasets.files import File
from torchtitan.datasets.hf_dataset import Source

DURATIONS = ("duration", "duration_ms", "audio_duration")


@dataclass(frozen=True)
class Row:
    """One recording before decoding.

    Attributes:
        key: its name for humans: ``path:row (id)``, or the path of an audio file.
        audio: encoded bytes, the path of an audio file (``hf://`` on the hub), decoded samples, or None.
        text: its transcription, if there is one.
        seconds: its duration, if the data state it.
        error: why it could not be read.
        part: the part of the audio that belongs to the row; None means all of it.
        source: its data set, which has limits on the duration.
    """

    key: str
    audio: bytes | str | Samples | None
    text: str | None
    seconds: float | None
    error: str | None = None
    part: Part | None = None
    source: Source | None = field(default=None, compare=False, repr=False)

    def is_admitted(self, seconds: float | None) -> bool:
        """Whether the source admits this duration."""
        return self.source is None or self.source.admits(seconds)

    @property
    def size(self) -> int:
        """Number of bytes of audio in memory."""
        if isinstance(self.audio, Samples):
            return self.audio.array.nbytes
        return len(self.audio) if isinstance(self.audio, bytes) else 0


Block = tuple[int, int]
# The number of a row within its group, and the row.
Found = tuple[int, Row]


class Reader:
    """Indexes and reads files of one format. A *group* is a run of blocks with the same offset."""

    def __init__(self, source: Source, retries: int):
        self.source, self.retries = source, retries

    def index(self, path: str) -> tuple[list[Block], str | None]:
        """(blocks, reason why the rest is missing) of one file. Any exception means that no row can be read."""
        raise NotImplementedError

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        """Rows of one group.

        Args:
            first: number of the group's first row within the file.
            offset: offset of the group, from the index.
            wanted: ascending numbers of rows within the group.
        """
        raise NotImplementedError

    # What rows are made of

    def _key(self, path: str, row: int, name: Any) -> str:
        return f"{path}:{row}" + (f" ({name})" if name not in (None, "") else "")

    def _duration_key(self, values: dict[str, Any]) -> str | None:
        names = [self.source.duration] if self.source.duration else DURATIONS
        return next((name for name in names if values.get(name) not in (None, "")), None)

    def _seconds(self, values: dict[str, Any]) -> float | None:
        name = self._duration_key(values)
        if name is None:
            return None
        try:
            seconds = float(values[name]) / (1000 if name.endswith("_ms") else 1)
        except (TypeError, ValueError):
            return None
        return seconds if math.isfinite(seconds) and seconds >= 0 else None

    def _recording(self, table: str, value: Any) -> bytes | str | Samples | None:
        """The audio of a cell (:func:`~torchtitan.audio.recording.audio_of`). A path is relative to the table."""
        found = audio_of(value)
        return self._located(table, found) if isinstance(found, str) else found

    def _located(self, table: str, name: str) -> bytes | str:
        """A recording whose path is absolute, or relative to the folder of its table."""
        folder = table.rsplit("/", 1)[0] if "/" in table else "."
        if table.startswith("hf://"):
            return self._contents(f"{folder}/{name}")
        beside = os.path.join(folder, name)
        return beside if os.path.isfile(beside) else name

    def _contents(self, path: str) -> bytes:
        with File(path, self.retries) as file:
            return file.read()


def text_of(value: Any) -> str | None:
    return value if isinstance(value, str) else None

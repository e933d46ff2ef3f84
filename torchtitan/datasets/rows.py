"""What all formats have in common: rows, and how files of rows are indexed and read."""

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
        key: names it for humans: ``path:row (id)``, or its path if it is a file of its own.
        audio: its encoded bytes, the path of its file (``hf://`` on the hub), decoded samples, or None.
        text: its transcription, if there is one.
        seconds: its length, if the data say it.
        error: why it could not be read at all.
        part: the part of the audio that it is; None is all of it.
        source: the data set that it is of, whose limits on the duration hold for it.
    """

    key: str
    audio: bytes | str | Samples | None
    text: str | None
    seconds: float | None
    error: str | None = None
    part: Part | None = None
    source: Source | None = field(default=None, compare=False, repr=False)

    def is_admitted(self, seconds: float | None) -> bool:
        """Whether the source's limits admit a recording of this length."""
        return self.source is None or self.source.admits(seconds)

    @property
    def size(self) -> int:
        """Bytes of audio that it holds."""
        if isinstance(self.audio, Samples):
            return self.audio.array.nbytes
        return len(self.audio) if isinstance(self.audio, bytes) else 0


Block = tuple[int, int]
# The number of a row within its group, and the row.
Found = tuple[int, Row]


class Reader:
    """How files of one format are indexed and read. A *group* is a run of blocks with the same offset."""

    def __init__(self, source: Source, retries: int):
        self.source, self.retries = source, retries

    def index(self, path: str) -> tuple[list[Block], str | None]:
        """(blocks, why the rest is missing) of one file. Any exception means that the whole file cannot be read."""
        raise NotImplementedError

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        """Rows of one group.

        Args:
            first: number of the group's first row in its file.
            offset: the group's, from the index.
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
        """The audio of a cell, see :func:`~torchtitan.audio.recording.audio_of`; a path is relative to its table."""
        found = audio_of(value)
        return self._located(table, found) if isinstance(found, str) else found

    def _located(self, table: str, name: str) -> bytes | str:
        """A recording that is named relative to the folder of its table, or absolutely."""
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

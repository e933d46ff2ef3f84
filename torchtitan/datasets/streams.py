"""What a loader draws from: recordings that are still to be encoded, or codes that lie in shards.

Both give their items numbers from 0 and an endless order over them (see order.py). Several sources of one kind can be
one stream; then every recording of all of them comes once an epoch.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.order import BlockOrder, Mixture, PermutedOrder
from torchtitan.datasets.readers import AudioDataset, DatasetIndex, index_files
from torchtitan.datasets.rows import Row
from torchtitan.datasets.shards import ShardedCodes
from torchtitan.datasets.sources import find_files
from torchtitan.tools.errors import UserError


class AudioStream:
    """Recordings; an item is one of them, whatever its length.

    Args:
        parts: data sets, one after the other.
    """

    def __init__(self, parts: Sequence[AudioDataset], seed: int, shuffle: bool = True):
        self.parts = list(parts)
        self.order = BlockOrder(np.concatenate([data.block_sizes for data in parts]), seed, shuffle)
        self._ends = np.cumsum([len(data) for data in parts]).tolist()

    def read(self, items: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """The rows of ascending item numbers."""
        place = 0
        for data, end in zip(self.parts, self._ends, strict=True):
            start, first = end - len(data), place
            while place < len(items) and items[place] < end:
                place += 1
            if place > first:
                for number, row in data.read([int(item) - start for item in items[first:place]]):
                    yield number + start, row


class CodeItem(NamedTuple):
    """Frames ``start`` to ``stop`` of recording ``number`` of some shards, which has ``whole`` frames in all."""

    shards: ShardedCodes
    number: int
    start: int
    stop: int
    whole: int

    @property
    def key(self) -> str:
        """The name of the recording."""
        return self.shards.key(self.number)

    @property
    def num_frames(self) -> int:
        return self.stop - self.start

    def frames(self, start: int, stop: int, num_quantizers: int) -> np.ndarray:
        """uint16 [stop - start, Q], counted from the item's own start."""
        return self.shards.codes(self.number, self.start + start, self.start + stop, num_quantizers)


class CodeStream:
    """Codes in shards. An item is a recording, or with ``split`` a piece of one of at most ``max_frames`` frames.

    Args:
        parts: shards with the sources that they were opened from, whose limits on the duration are applied here.
        max_frames: longer recordings are cut to this.
        frame_rate: frames a second, of which a recording's stated duration has more than codes if it was cut before.

    Attributes:
        num_filtered: recordings outside of the limits on the duration.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Source, ShardedCodes]],
        seed: int,
        max_frames: int,
        split: bool = False,
        shuffle: bool = True,
        frame_rate: float = 12.5,
    ):
        self.parts, self.max_frames, self.split, self.frame_rate = list(parts), max_frames, split, frame_rate
        self._chosen = [_within_limits(source, shards) for source, shards in parts]
        self.num_filtered = sum(len(shards) for _, shards in parts)
        sizes = []
        self._long: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for (_, shards), chosen in zip(parts, self._chosen, strict=True):
            num_recordings = len(shards) if chosen is None else len(chosen)
            self.num_filtered -= num_recordings
            extra = 0
            if split:
                frames = np.asarray(shards.frames) if chosen is None else shards.frames[chosen]
                self._long.append(_find_long(frames, max_frames))
                extra = int(self._long[-1][1].sum())
            sizes.append(num_recordings + extra)
        self._ends = np.cumsum(sizes).tolist()
        if not self._ends[-1]:
            names = ", ".join(source.name for source, _ in parts)
            raise UserError(f"{names}: no recording has a duration between min_seconds and max_seconds.")
        self.order = PermutedOrder(self._ends[-1], seed, shuffle)

    def item(self, number: int) -> CodeItem:
        """The frames that an item number stands for."""
        part = bisect_right(self._ends, number)
        shards, chosen = self.parts[part][1], self._chosen[part]
        place = number - (self._ends[part - 1] if part else 0)
        piece = 0
        if self.split:
            place, piece = _recording_and_piece(self._long[part], place)
        recording = place if chosen is None else int(chosen[place])
        frames = int(shards.frames[recording])
        start = piece * self.max_frames
        stop = min(frames, start + self.max_frames)
        # A recording that was cut when it was tokenized is longer than its codes.
        whole = max(frames, -int(-(shards.seconds[recording] * self.frame_rate - 1e-6) // 1))
        return CodeItem(shards, recording, start, stop, whole)


def _within_limits(source: Source, shards: ShardedCodes) -> np.ndarray | None:
    """Numbers of the recordings whose duration a source admits; None stands for all."""
    if source.min_seconds is None and source.max_seconds is None:
        return None
    seconds = shards.seconds
    low, high = source.min_seconds or 0.0, source.max_seconds
    return np.flatnonzero((seconds >= low) & (seconds <= (np.inf if high is None else high)))


def _find_long(frames: np.ndarray, max_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of recordings with more than one piece: their numbers, their further pieces, the items of their first pieces."""
    pieces = -(-frames.astype(np.int64) // max_frames)
    long = np.flatnonzero(pieces > 1)
    extra = pieces[long] - 1
    return long, extra, long + np.cumsum(extra) - extra


def _recording_and_piece(long: tuple[np.ndarray, np.ndarray, np.ndarray], item: int) -> tuple[int, int]:
    numbers, extra, first_items = long
    before = int(np.searchsorted(first_items, item, side="right")) - 1
    if before < 0:
        return item, 0
    offset = item - int(first_items[before])
    if offset <= extra[before]:
        return int(numbers[before]), offset
    return int(numbers[before]) + offset - int(extra[before]), 0


@dataclass
class FoundData:
    """The files of a data set or mixture, found and looked at, before anything is drawn from them.

    Attributes:
        sources: as they were asked for.
        shards: opened code shards of the sources that are such, by the source's number.
        files: of the other sources.
        indices: what lies in those files; empty on ranks other than 0 until they are given rank 0's.
    """

    sources: list[Source]
    shards: dict[int, ShardedCodes]
    files: dict[int, list[str]]
    indices: dict[int, DatasetIndex]

    def count_rows(self, retries: int) -> None:
        """Look into the files.

        Raises:
            UserError: none of a source can be read, or there is no audio.
        """
        for number, files in self.files.items():
            self.indices[number] = index_files(self.sources[number], files, retries)

    @property
    def bad_files(self) -> list[tuple[str, str]]:
        """Path and reason of each file that cannot be read (to its end)."""
        return [bad for index in self.indices.values() for bad in index.bad_files]

    @property
    def fingerprint(self) -> str:
        """Equal for data that become the same samples in the same order, wherever they lie."""
        parts = []
        for number, source in enumerate(self.sources):
            files = self.shards[number] if number in self.shards else self.indices[number]
            columns = (source.audio, source.text, source.duration, source.id)
            parts.append([files.fingerprint, columns, source.weight, source.min_seconds, source.max_seconds])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_data(sources: list[Source], retries: int, index: bool = True) -> FoundData:
    """Find the files of sources, and with ``index`` count their rows.

    Raises:
        UserError: nothing is there, or it cannot be used.
    """
    found = FoundData(sources, {}, {}, {})
    for number, source in enumerate(sources):
        files = find_files(source)
        if is_code_shard(files[0]):
            found.shards[number] = ShardedCodes(files)
        else:
            found.files[number] = files
    if index:
        found.count_rows(retries)
    return found


def is_code_shard(file: str) -> bool:
    """Whether a file is one of codes, by its name."""
    name = file.rsplit("/", 1)[-1]
    return name.startswith("codes-") and name.endswith(".arrow")


def open_streams(
    found: FoundData, seed: int, max_frames: int, split: bool, retries: int, shuffle: bool = True
) -> tuple[list[AudioStream | CodeStream], Mixture]:
    """Streams over found data and the order in which they are drawn from: endless if shuffled, else once as it lies.

    Sources with weights are a stream each. Without weights all recordings together are one stream, and all codes.

    Args:
        max_frames: longer recordings in code shards are cut, or ``split``, to this.
    """
    sources = found.sources
    audio = {number: AudioDataset(sources[number], index, retries) for number, index in found.indices.items()}
    codes = {number: (sources[number], shards) for number, shards in found.shards.items()}
    weights = [source.weight for source in sources if source.weight is not None]
    weighted = bool(weights) and shuffle
    groups = [[number] for number in range(len(sources))] if weighted else [list(audio), list(codes)]
    streams: list[AudioStream | CodeStream] = []
    for group in filter(None, groups):
        if group[0] in audio:
            streams.append(AudioStream([audio[number] for number in group], seed, shuffle))
        else:
            streams.append(CodeStream([codes[number] for number in group], seed, max_frames, split, shuffle))
    return streams, Mixture([s.order for s in streams], weights if weighted else None, seed, finite=not shuffle)

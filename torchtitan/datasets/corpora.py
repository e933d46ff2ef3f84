"""What a loader draws from: a corpus of recordings, which it encodes itself, or a corpus of codes in shards.

A corpus numbers its items from 0 and has an endless order over them (see order.py). Several sources of one kind can
form one corpus. An epoch then contains each recording of all these sources once.
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


class AudioCorpus:
    """Recordings. An item is one recording of any length.

    Args:
        parts: data sets, which are concatenated.
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
    """Frames ``start`` up to ``stop`` of a recording in shards. The whole recording has ``whole`` frames."""

    shards: ShardedCodes
    number: int
    start: int
    stop: int
    whole: int

    @property
    def key(self) -> str:
        return self.shards.key(self.number)

    @property
    def num_frames(self) -> int:
        return self.stop - self.start

    def frames(self, start: int, stop: int, num_quantizers: int) -> np.ndarray:
        """Codes, uint16 [stop - start, Q]. Frames count from the start of the item."""
        return self.shards.codes(self.number, self.start + start, self.start + stop, num_quantizers)


class CodeCorpus:
    """Codes in shards. An item is a recording, or with ``split`` a piece of a recording.

    Args:
        parts: shards, each with its source, whose limits on the duration are applied here.
        max_frames: maximum length of an item; longer recordings are cut or split.
        frame_rate: frames per second. It tells from the stated duration whether tokenization has cut a recording.

    Attributes:
        num_filtered: number of recordings outside the limits on the duration.
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
    """Numbers of the recordings whose duration is within the limits of a source; None stands for all."""
    if source.min_seconds is None and source.max_seconds is None:
        return None
    seconds = shards.seconds
    low, high = source.min_seconds or 0.0, source.max_seconds
    return np.flatnonzero((seconds >= low) & (seconds <= (np.inf if high is None else high)))


def _find_long(frames: np.ndarray, max_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each recording with several pieces: its number, the number of its further pieces, the item of its first."""
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
    """The files of one or several sources, before anything is drawn from them.

    Attributes:
        sources: the sources in the given order.
        shards: opened shards of codes, by the number of their source.
        files: the files of all other sources.
        indices: the index of those files. Ranks other than 0 receive it from rank 0.
    """

    sources: list[Source]
    shards: dict[int, ShardedCodes]
    files: dict[int, list[str]]
    indices: dict[int, DatasetIndex]

    def count_rows(self, retries: int) -> None:
        """Index the files.

        Raises:
            UserError: a source has no readable file, or no audio.
        """
        for number, files in self.files.items():
            self.indices[number] = index_files(self.sources[number], files, retries)

    @property
    def bad_files(self) -> list[tuple[str, str]]:
        """Path and reason of each file that cannot be read, or not to its end."""
        return [bad for index in self.indices.values() for bad in index.bad_files]

    @property
    def fingerprint(self) -> str:
        """Hash of the data. It is equal for data at another place that give the same samples in the same order."""
        parts = []
        for number, source in enumerate(self.sources):
            files = self.shards[number] if number in self.shards else self.indices[number]
            columns = (source.audio, source.text, source.duration, source.id)
            parts.append([files.fingerprint, columns, source.weight, source.min_seconds, source.max_seconds])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_data(sources: list[Source], retries: int, index: bool = True) -> FoundData:
    """Find the files of sources, and with ``index`` count their rows.

    Raises:
        UserError: a source has no files, or none that can be used.
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
    """Whether the name of a file is that of a shard of codes."""
    name = file.rsplit("/", 1)[-1]
    return name.startswith("codes-") and name.endswith(".arrow")


def open_corpora(
    found: FoundData, seed: int, max_frames: int, split: bool, retries: int, shuffle: bool = True
) -> tuple[list[AudioCorpus | CodeCorpus], Mixture]:
    """The corpora of found data, and the order of the draws: endless if shuffled, else one pass in file order.

    Each source with a weight is a corpus. Without weights, all recordings form one corpus, and all codes another.

    Args:
        max_frames: longer recordings in shards of codes are cut or ``split`` to this length.
    """
    sources = found.sources
    audio = {number: AudioDataset(sources[number], index, retries) for number, index in found.indices.items()}
    codes = {number: (sources[number], shards) for number, shards in found.shards.items()}
    weights = [source.weight for source in sources if source.weight is not None]
    weighted = bool(weights) and shuffle
    groups = [[number] for number in range(len(sources))] if weighted else [list(audio), list(codes)]
    corpora: list[AudioCorpus | CodeCorpus] = []
    for group in filter(None, groups):
        if group[0] in audio:
            corpora.append(AudioCorpus([audio[number] for number in group], seed, shuffle))
        else:
            corpora.append(CodeCorpus([codes[number] for number in group], seed, max_frames, split, shuffle))
    return corpora, Mixture([s.order for s in corpora], weights if weighted else None, seed, finite=not shuffle)

"""Speech data sets in Hugging Face layouts, read row by row with an exact position.

A data set is one entry of :data:`SOURCES`: where its files lie and which columns hold the audio and the text. The root
is a hub id or a local folder of the same layout; files are streamed through ``datasets``, and audio stays encoded
bytes until a row is used, so that a broken recording costs one row.

Order of an epoch, for one rank: its files in a seeded order, their rows shuffled within blocks of
:data:`SHUFFLE_ROWS`. The order is computed from the seed, so a position is five numbers (:class:`Position`) and a
resumed run goes on with the very next row.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError

SHUFFLE_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """The facts of a data set.

    Attributes:
        root: what to read when no ``dataset_path`` is given: a hub id, or a folder if it starts with ``./``.
        files: glob patterns of the parquet files, relative to the root.
        exclude: names of folders, or beginnings of names of files, that rule a file out (held-out splits, subsets that
            repeat other files).
        audio: column with the recording, a struct of ``bytes`` and ``path``.
        text: column with the transcription, which only task ``tts`` needs.
        licence: as the publisher states it.
    """

    root: str
    files: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    audio: str = "audio"
    text: str = "text"
    licence: str = ""


# A new data set is one new entry here.
SOURCES = {
    "peoples_speech": Source(
        root="MLCommons/peoples_speech",
        files=("**/train-*.parquet",),
        exclude=("microset", "validation", "test"),
        licence="CC BY and CC BY-SA",
    ),
    "librispeech_asr_train": Source(
        root="openslr/librispeech_asr",
        files=("**/train.*/*.parquet",),
        exclude=("all",),
        licence="CC BY 4.0",
    ),
    "librispeech_asr_test": Source(
        root="openslr/librispeech_asr",
        files=("clean/test/*.parquet",),
        licence="CC BY 4.0",
    ),
    # Whatever lies below one folder, in proportion to its size: the mixture of the published models is such a folder.
    "mixture": Source(
        root="./data",
        files=("**/*train*.parquet", "**/*train*/*.parquet"),
        exclude=("microset", "validation", "test", "dev"),
    ),
}
ALIASES = {"all": "mixture", "librispeech_asr": "librispeech_asr_test"}


def find_source(name: str) -> Source:
    """The entry of a data set's name or alias.

    Raises:
        UserError: there is none.
    """
    try:
        return SOURCES[ALIASES.get(name, name)]
    except KeyError:
        known = ", ".join(sorted([*SOURCES, *ALIASES]))
        raise UserError(f"unknown data set {name!r} (known: {known}); a new one is an entry in {__file__}.") from None


def find_files(source: Source, root: str | None = None) -> list[str]:
    """Sorted paths (local, or ``hf://`` for a hub id) of a data set's files.

    Args:
        root: hub id or local folder; None takes the source's own.

    Raises:
        UserError: no such folder or repository, or no file in it that fits.
    """
    root = root or source.root
    folder = Path(root).expanduser()
    if folder.is_file() and folder.suffix == ".parquet":
        return [str(folder)]
    inside = ""
    if folder.is_dir():
        walk = os.walk(folder, followlinks=True)
        found = {str((Path(top) / name).relative_to(folder)) for top, _, names in walk for name in names}
        prefix = f"{folder}/"
        # The folder may be one inside of the layout: librispeech_asr/clean, or librispeech_asr/clean/test.
        inside = f"{folder.resolve().parent.name}/{folder.resolve().name}/"
    elif root.startswith((".", "/", "~")) or root.count("/") != 1:
        raise UserError(f"{root}: there is no such data set folder.")
    else:
        found, prefix = _find_on_hub(root), f"hf://datasets/{root}/"
    files = sorted(prefix + path for path in found if _fits(source, path, inside))
    if not files:
        raise UserError(f"{root}: no file fits {' or '.join(source.files)} there.")
    if folder.is_dir():
        _require_audio(source, files[0])
    return files


def _fits(source: Source, path: str, inside: str) -> bool:
    """Whether a path, relative to a root that itself lies ``inside``, belongs to a data set."""
    if any(re.split(r"[-._]", part)[0] in source.exclude for part in path.split("/")):
        return False
    # "**/" is any number of folders, "*" any name or part of one.
    patterns = [re.escape(p).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*") for p in source.files]
    parent, name, _ = inside.split("/") if inside else ("", "", "")
    return any(
        re.fullmatch(pattern, candidate)
        for pattern in patterns
        for candidate in (path, f"{name}/{path}", f"{parent}/{name}/{path}")
    )


def _require_audio(source: Source, file: str) -> None:
    """Refuse a data set whose first file has no audio column; a file that cannot be read is left to the loader."""
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(file).names
    except (OSError, pyarrow.ArrowException):
        return
    if source.audio not in columns:
        raise UserError(f"{file}: there is no column {source.audio!r} (columns: {', '.join(columns)}).")


def _find_on_hub(repository: str) -> set[str]:
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    prefix = f"datasets/{repository}/"
    try:
        return {path.removeprefix(prefix) for path in HfFileSystem().find(prefix)}  # type: ignore[union-attr]
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{repository}: the data set cannot be read from the hub ({reason}).") from None


@dataclass(frozen=True)
class Row:
    """One recording before decoding: ``key`` names it, ``audio`` is its bytes or the path of its file."""

    key: str
    audio: bytes | str | None
    text: str | None


@dataclass(frozen=True)
class Position:
    """Where a rank is: ``used`` rows into the block that starts at row ``row`` of the ``file``-th file of an epoch."""

    epoch: int = 0
    file: int = 0
    row: int = 0
    block: int = 0
    used: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class HuggingFaceDataset:
    """One rank's rows of a data set, in an order that is a function of the seed.

    With at least as many files as ranks each rank reads its own files; otherwise every rank reads all files and keeps
    each ``world_size``-th row.

    Args:
        source: the data set's facts.
        files: as :func:`find_files` gives them.
        shuffle: False reads files and rows as they lie.
        on_bad_file: called with (path, reason) when a file cannot be read (any further); its rest is left out.
    """

    def __init__(
        self,
        source: Source,
        files: list[str],
        rank: int = 0,
        world_size: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        on_bad_file: Callable[[str, str], None] | None = None,
    ):
        self.source, self.rank, self.world_size, self.seed, self.shuffle = source, rank, world_size, seed, shuffle
        self.by_file = len(files) >= world_size
        order = list(files)
        if shuffle:
            random.Random(f"{seed}/ranks").shuffle(order)
        self.files = order[rank::world_size] if self.by_file else order
        self.on_bad_file = on_bad_file

    def epoch(self, start: Position) -> Iterator[tuple[Row, Position]]:
        """The rows of ``start.epoch`` from ``start`` on, each with the position of what follows it."""
        position = replace(start, used=0)
        skip = start.used
        block: list[Row] = []
        for row, following in self._raw_rows(start):
            block.append(row)
            if len(block) == SHUFFLE_ROWS:
                yield from self._shuffled(block, position, skip, replace(following, block=position.block + 1))
                position, block, skip = replace(following, block=position.block + 1), [], 0
        end = Position(epoch=start.epoch + 1)
        yield from self._shuffled(block, position, skip, end)

    def _shuffled(
        self, block: list[Row], position: Position, skip: int, following: Position
    ) -> Iterator[tuple[Row, Position]]:
        """The rows of one block from the ``skip``-th on; after the last one comes ``following``."""
        order = list(range(len(block)))
        if self.shuffle:
            random.Random(f"{self.seed}/{position.epoch}/{position.block}/{self.rank}").shuffle(order)
        for used in range(skip, len(block)):
            after = replace(position, used=used + 1) if used + 1 < len(block) else following
            yield block[order[used]], after

    def _raw_rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        """Rows in file order from (start.file, start.row) on, each with the position of the next row."""
        files = list(self.files)
        if self.shuffle:
            random.Random(f"{self.seed}/{start.epoch}/files/{self.rank}").shuffle(files)
        for number in range(start.file, len(files)):
            first = start.row if number == start.file else 0
            for index, values in self._read_file(files[number], first):
                if not self.by_file and index % self.world_size != self.rank:
                    continue
                yield self._row(files[number], index, values), Position(start.epoch, number, index + 1)

    def _read_file(self, path: str, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, columns) of a parquet file's rows from ``first`` on; an unreadable rest is reported and left out."""
        from datasets import Audio, load_dataset

        try:
            rows: Any = load_dataset("parquet", data_files=[path], split="train", streaming=True)
            columns = set(rows.features or {})
            if self.source.audio not in columns:
                raise ValueError(f"there is no column {self.source.audio!r}, only {', '.join(sorted(columns))}")
            rows = rows.select_columns([c for c in ("id", self.source.audio, self.source.text) if c in columns])
            rows = rows.cast_column(self.source.audio, Audio(decode=False))
            yield from enumerate(rows.skip(first) if first else rows, start=first)
        except Exception as error:  # whatever a damaged file or a failing hub raises ends this file, not the epoch
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if self.on_bad_file:
                self.on_bad_file(path, reason)

    def _row(self, path: str, index: int, values: dict[str, Any]) -> Row:
        audio = values.get(self.source.audio) or {}
        name = values.get("id") or audio.get("path") or ""
        key = f"{path}:{index}" + (f" ({name})" if name else "")
        recording = audio.get("bytes")
        if recording is None and audio.get("path"):  # of a file, perhaps relative to the data
            beside = Path(path).parent / audio["path"]
            recording = str(beside) if beside.is_file() else audio["path"]
        return Row(key, recording, values.get(self.source.text))

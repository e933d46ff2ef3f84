"""Rows of data sets by number: random access to parquet, Arrow, tars, manifests (also Kaldi's and lhotse's) and folders
of audio files.

:func:`index_files` looks at each file once, without reading audio, and gives a :class:`DatasetIndex`: how many rows
lie in which *block*. A block is what is read at one go. :class:`AudioDataset` then reads any rows by their numbers.
Audio stays encoded, so that a broken recording costs one row.

Whatever is wrong with the data ends as a row with an ``error``, never as an exception. Reads that fail for a reason
that may pass (network, file system) are tried again at the lowest level, in :class:`_File`: all that is raised above
it is damage, which no second try repairs.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import tarfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from torchtitan.audio.recording import Part, Samples, audio_of
from torchtitan.datasets.sources import AUDIO_EXTENSIONS, Source, kind_of, lhotse_name
from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.logging import logger
from torchtitan.tools.retries import retried

T = TypeVar("T")

# Rows of a table that are read at one go, at most.
BLOCK_ROWS = 128
# Samples of a tar in one block: as many recordings as one seek is worth.
TAR_BLOCK = 64
# Audio files, or lines of a manifest, in one block.
LIST_BLOCK = 256
# Rows decoded from parquet at a time, and bytes read at a time: what one reader holds in memory.
BATCH_ROWS = 16
READ_BYTES = 1 << 20
HUB_READ_BYTES = 1 << 23
# Threads that look at files for the index.
INDEX_THREADS = 16
# Bytes of a manifest when it is unpacked, at most, and of what a reader keeps of files that are read whole.
UNPACKED_BYTES = 2 << 30
KEPT_BYTES = 4 << 30

DURATIONS = ("duration", "duration_ms", "audio_duration")
AUDIO_KEYS = ("audio", "path", "audio_filepath", "audio_path", "file_name", "filename", "file", "wav", "flac", "mp3")
TEXT_KEYS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_text")
ID_KEYS = ("id", "utt_id", "utterance_id")


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
    """

    key: str
    audio: bytes | str | Samples | None
    text: str | None
    seconds: float | None
    error: str | None = None
    part: Part | None = None

    @property
    def size(self) -> int:
        """Bytes of audio that it holds."""
        if isinstance(self.audio, Samples):
            return self.audio.array.nbytes
        return len(self.audio) if isinstance(self.audio, bytes) else 0


@dataclass
class DatasetIndex:
    """What lies where. Made on one rank and sent to the others.

    Attributes:
        files: the readable files, as :func:`~torchtitan.datasets.sources.find_files` gives them.
        blocks: for each file (rows, offset) of its consecutive blocks. The offset is what a reader needs: the number
            of a parquet row group, or the byte at which an Arrow batch, a sample of a tar or a line (of the unpacked
            file) begins. Blocks of one file with the same offset are parts of one row group or batch. Audio files are
            one list of blocks all together, whose offsets count files.
        bad_files: (path, reason) of files that are left out, entirely or from some point on.
        fingerprint: sha256 over names relative to the root and numbers of rows: equal for a copy elsewhere.
        format: of the files.
    """

    files: list[str]
    blocks: list[list[tuple[int, int]]]
    bad_files: list[tuple[str, str]]
    fingerprint: str
    format: str = field(default="parquet")


class _Damage(Exception):
    """Data that cannot be read; the message is the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# Files that are tried again
# ---------------------------------------------------------------------------------------------------------------------


def _open(path: str) -> BinaryIO:
    """Open a local file or one on the hub for reading bytes at any position."""
    if not path.startswith("hf://"):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(path.removeprefix("hf://"), "rb", block_size=HUB_READ_BYTES)  # type: ignore[return-value]


class _File:
    """A file that is opened at its first use, and again whenever a read of it fails."""

    def __init__(self, path: str, retries: int):
        self.path, self.retries = path, retries
        self._raw: BinaryIO | None = None
        self._position = 0
        self._size: int | None = None
        self.closed = False

    def _try(self, action: Callable[[BinaryIO], T]) -> T:
        def attempt() -> T:
            try:
                if self._raw is None:
                    self._raw = _open(self.path)
                return action(self._raw)
            except Exception:
                self._drop()
                raise

        return retried(self.path, attempt, self.retries)

    def _drop(self) -> None:
        raw, self._raw = self._raw, None
        if raw is not None:
            with suppress(Exception):
                raw.close()

    def read(self, size: int | None = -1) -> bytes:
        def action(raw: BinaryIO) -> bytes:
            raw.seek(self._position)
            return raw.read(-1 if size is None else size)

        data = self._try(action)
        self._position += len(data)
        return data

    def size(self) -> int:
        if self._size is None:
            self._size = self._try(lambda raw: raw.seek(0, os.SEEK_END))
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (self.size() if base is None else base)
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self._drop()

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class RecordingFile(_File):
    """A recording's own file for libsndfile, whose reads must not raise: after a failure there is nothing to read.

    Attributes:
        failure: what ended reading, after all tries.
    """

    def __init__(self, path: str, retries: int):
        super().__init__(path, retries)
        self.failure: Exception | None = None

    def _unless_failed(self, action: Callable[[], T], otherwise: T) -> T:
        if self.failure is None:
            try:
                return action()
            except Exception as error:
                self.failure = error
        return otherwise

    def read(self, size: int | None = -1) -> bytes:
        return self._unless_failed(lambda: super(RecordingFile, self).read(size), b"")

    def size(self) -> int:
        return self._unless_failed(super().size, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Readers: one class for each format
# ---------------------------------------------------------------------------------------------------------------------

Block = tuple[int, int]
# The number of a row within its group, and the row.
Found = tuple[int, Row]


class _Reader:
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
        with _File(path, self.retries) as file:
            return file.read()


def _groups_of(rows: int, offset: int) -> list[Block]:
    """A group of many rows in blocks of at most :data:`BLOCK_ROWS`."""
    return [(min(BLOCK_ROWS, rows - start), offset) for start in range(0, rows, BLOCK_ROWS)]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def audio_fields(kind: Any) -> list[str]:
    """The fields of a pyarrow struct type that hold audio, {bytes, path} or {array, sampling_rate}; [] if none do."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if not pyarrow.types.is_struct(kind):
        return []
    fields = {child.name: child.type for child in kind}
    found = [name for name in ("bytes", "path") if name in fields]
    samples = getattr(fields.get("array"), "value_type", None)
    if samples is not None and pyarrow.types.is_floating(samples) and "sampling_rate" in fields:
        found += ["array", "sampling_rate"]
    return found


def _cell(scalar: Any) -> Any:
    """A cell as Python has it, but the samples of decoded audio as an array."""
    import pyarrow

    if isinstance(scalar, pyarrow.StructScalar) and scalar.is_valid and "array" in scalar:
        array = scalar["array"]
        samples = array.values.to_numpy(zero_copy_only=False) if array.is_valid else None
        return {**{name: scalar[name].as_py() for name in scalar if name != "array"}, "array": samples}
    return scalar.as_py()


class _Table(_Reader):
    """What parquet and Arrow have in common: columns."""

    def _columns(self, schema: Any) -> list[str]:
        """Names of the columns to read. Raises _Damage if the recordings are not among them."""
        import pyarrow

        source = self.source
        if source.audio not in schema.names:
            raise _Damage(f"there is no column {source.audio!r} (columns: {', '.join(schema.names)})")
        kind = schema.field(source.audio).type
        if isinstance(kind, pyarrow.BaseExtensionType):
            kind = kind.storage_type
        types = pyarrow.types
        parts = [""]
        if types.is_struct(kind):
            parts = [f".{field}" for field in audio_fields(kind)]
        elif types.is_dictionary(kind):
            kind = kind.value_type
        plain = any(f(kind) for f in (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string))
        if not parts or not (types.is_struct(kind) or plain):
            raise _Damage(f"column {source.audio!r} holds neither recordings nor paths, but {kind}")
        durations = [source.duration] if source.duration else DURATIONS
        others = dict.fromkeys(name for name in (source.id, source.text, *durations) if name in schema.names)
        return [*(source.audio + part for part in parts), *(name for name in others if name != source.audio)]

    def _row(self, path: str, number: int, values: dict[str, Any]) -> Row:
        audio = values.get(self.source.audio)
        inside = audio.get("path") if isinstance(audio, dict) else None
        key = self._key(path, number, values.get(self.source.id) or inside)
        try:
            recording = self._recording(path, audio)
        except Exception as error:  # a file on the hub that the table names
            return Row(key, None, None, None, first_line(error))
        return Row(key, recording, _text(values.get(self.source.text)), self._seconds(values))


class _Parquet(_Table):
    """Parquet: a group is a row group, read in small batches from its start."""

    def __init__(self, source: Source, retries: int):
        super().__init__(source, retries)
        self._footers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _footer(self, path: str, file: _File) -> Any:
        """The metadata of a file; those of the latest few are kept, as they are needed for every block."""
        import pyarrow.parquet

        with self._lock:
            if path in self._footers:
                self._footers.move_to_end(path)
                return self._footers[path]
        footer = pyarrow.parquet.read_metadata(file)
        with self._lock:
            self._footers[path] = footer
            while len(self._footers) > 32:
                self._footers.popitem(last=False)
        return footer

    def index(self, path: str) -> tuple[list[Block], str | None]:
        import pyarrow.parquet

        with _File(path, self.retries) as file:
            footer = pyarrow.parquet.read_metadata(file)
        self._columns(footer.schema.to_arrow_schema())
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return [block for group, rows in enumerate(sizes) for block in _groups_of(rows, group)], None

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        import pyarrow.parquet

        with _File(path, self.retries) as file:
            footer = self._footer(path, file)
            # Buffered reads keep a column of gigabytes from being read whole.
            size = HUB_READ_BYTES if path.startswith("hf://") else READ_BYTES
            table = pyarrow.parquet.ParquetFile(file, metadata=footer, buffer_size=size, pre_buffer=False)
            columns = self._columns(table.schema_arrow)
            batches = table.iter_batches(BATCH_ROWS, row_groups=[offset], columns=columns, use_threads=False)
            start, position = 0, 0
            for batch in batches:
                end = start + batch.num_rows
                while position < len(wanted) and wanted[position] < end:
                    number = wanted[position]
                    values = {n: _cell(batch.column(i)[number - start]) for i, n in enumerate(batch.schema.names)}
                    yield number, self._row(path, first + number, values)
                    position += 1
                if position == len(wanted):
                    return
                start = end


class _Arrow(_Table):
    """Arrow IPC, as a stream or as a file: a group is a record batch, mapped into memory where that is possible."""

    audio_needed = True

    def index(self, path: str) -> tuple[list[Block], str | None]:
        import pyarrow

        blocks: list[Block] = []
        with _File(path, self.retries) as file:
            size = file.size()
            file.seek(_stream_start(file))
            schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(_message(file)[0]))
            self._check(schema)
            while True:
                offset = file.tell()
                try:
                    head, body = _message(file)
                    if not head:
                        return blocks, None
                    kind, rows = _describe(head)
                    end = file.tell() + body
                    if end > size:
                        raise _Damage("the file is cut off")
                except (_Damage, IndexError, ValueError) as error:
                    return blocks, f"the rest from byte {offset:,} on is missing: {first_line(error)}"
                if kind == _RECORD_BATCH:
                    blocks += _groups_of(rows, offset)
                file.seek(end)

    def _check(self, schema: Any) -> None:
        import pyarrow

        if self.audio_needed:
            self._columns(schema)
        encoded = [f.name for f in schema if pyarrow.types.is_dictionary(f.type)]
        if encoded:
            raise _Damage(f"column {encoded[0]!r} is dictionary-encoded, which is not read from Arrow files")

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        for number, batch in self.batches(path, offset, wanted):
            names = {column.split(".")[0] for column in self._columns(batch.schema)}
            values = {name: _cell(batch.column(name)[number]) for name in names}
            yield number, self._row(path, first + number, values)

    def batches(self, path: str, offset: int, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(number, record batch that it is a row of) for each wanted row of the group."""
        import pyarrow

        with _File(path, self.retries) as file:
            file.seek(_stream_start(file))
            schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(_message(file)[0]))
            if path.startswith("hf://"):
                data: Any = pyarrow.PythonFile(file, mode="r")
            else:
                data = retried(path, lambda: pyarrow.memory_map(path), self.retries)
            with data:
                data.seek(offset)
                batch = pyarrow.ipc.read_record_batch(pyarrow.ipc.read_message(data), schema)
                for number in wanted:
                    yield number, batch


_RECORD_BATCH = 3  # MessageHeader.RecordBatch of Arrow's format


def _stream_start(file: _File) -> int:
    """Where the messages begin: an IPC file is a stream between a magic number and a footer."""
    file.seek(0)
    return 8 if file.read(6) == b"ARROW1" else 0


def _message(file: _File) -> tuple[bytes, int]:
    """(metadata with its length before it, size of the body) of the next message; (b"", 0) at the end of the stream.

    Only the metadata is read, and the file is left at the body.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        if prefix and prefix != b"\xff\xff\xff\xff" and prefix != bytes(4):
            raise _Damage("the file is cut off")
        return b"", 0
    if prefix[:4] != b"\xff\xff\xff\xff":
        raise _Damage("this is no Arrow data")
    length = int.from_bytes(prefix[4:], "little", signed=True)
    if length == 0:
        return b"", 0
    if not 0 < length <= 1 << 28:
        raise _Damage("this is no Arrow data")
    head = file.read(length)
    if len(head) < length:
        raise _Damage("the file is cut off")
    return prefix + head, _field(head, _root(head), 3, 8)


def _root(head: bytes) -> int:
    return int.from_bytes(head[:4], "little")


def _describe(message: bytes) -> tuple[int, int]:
    """(kind of header, number of rows if it is a record batch) of a message's metadata (a flatbuffer)."""
    head = message[8:]
    table = _root(head)
    kind = _field(head, table, 1, 1)
    if kind != _RECORD_BATCH:
        return kind, 0
    at = _place(head, table, 2)
    return kind, _field(head, at + int.from_bytes(head[at : at + 4], "little"), 0, 8)


def _place(head: bytes, table: int, number: int) -> int:
    """Position of a field in a flatbuffer's table; 0 if it is left out."""
    vtable = table - int.from_bytes(head[table : table + 4], "little", signed=True)
    if 4 + 2 * number >= int.from_bytes(head[vtable : vtable + 2], "little"):
        return 0
    entry = int.from_bytes(head[vtable + 4 + 2 * number : vtable + 6 + 2 * number], "little")
    return table + entry if entry else 0


def _field(head: bytes, table: int, number: int, size: int) -> int:
    """A whole number of ``size`` bytes in a flatbuffer's table; 0 if it is left out."""
    at = _place(head, table, number)
    return int.from_bytes(head[at : at + size], "little", signed=size > 1) if at else 0


class _CodeShards(_Arrow):
    """Shards of codes are indexed like Arrow; their rows are read elsewhere."""

    audio_needed = False


class _Tar(_Reader):
    """Tars as WebDataset writes them: consecutive members with the same key are a sample."""

    def index(self, path: str) -> tuple[list[Block], str | None]:
        starts: list[int] = []
        rest = None
        names: set[str] = set()
        with _File(path, self.retries) as file:
            try:
                for sample in self._samples(file, 0):
                    names.update(sample.members)
                    if sample.recording:
                        starts.append(sample.start)
            except (_Damage, tarfile.TarError) as error:
                rest = f"the rest is missing: {first_line(error)}"
        if not starts and rest is None and names:
            wanted = f"of extension .{self.source.audio}" if self._named else "with audio"
            raise _Damage(f"there is no member {wanted} (extensions: {', '.join(sorted(names)[:8])})")
        if not starts and rest is not None:
            raise _Damage(rest.removeprefix("the rest is missing: "))
        edges = range(0, len(starts), TAR_BLOCK)
        return [(min(TAR_BLOCK, len(starts) - edge), starts[edge]) for edge in edges], rest

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        with _File(path, self.retries) as file:
            remaining = iter(wanted)
            number = next(remaining)
            samples = (sample for sample in self._samples(file, offset) if sample.recording)
            for position, sample in enumerate(samples):
                if position == number:
                    yield number, self._row(path, first + number, sample, file)
                    if (number := next(remaining, -1)) < 0:
                        return

    @property
    def _named(self) -> bool:
        """Whether the source says which extension recordings have."""
        return self.source.audio != "audio"

    def _samples(self, file: _File, offset: int) -> Iterator["_Sample"]:
        """Samples from a header's position on. Raises _Damage or TarError where the tar is damaged."""
        size = file.size()
        file.seek(offset)
        sample: _Sample | None = None
        damage: Exception | None = None
        # The first member may be damaged, which opening already shows.
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]
                    if member.offset_data + member.size > size:
                        raise _Damage("the file is cut off")
                    folder, _, base = member.name.rpartition("/")
                    if not member.isfile() or base.startswith("."):
                        continue
                    stem, _, extension = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if sample is None or sample.key != key:
                        if sample is not None:
                            yield sample
                        sample = _Sample(key, member.offset, self.source.audio if self._named else None)
                    sample.members.setdefault(extension.lower(), (member.offset_data, member.size))
                end = tar.offset
            file.seek(end)
            if any(file.read(512)):
                raise _Damage(f"the header at byte {end:,} is damaged")
        except (_Damage, tarfile.TarError) as error:
            damage = error
        if sample is not None:
            yield sample
        if damage is not None:
            raise damage

    def _row(self, path: str, number: int, sample: "_Sample", file: _File) -> Row:
        def contents(extension: str) -> bytes:
            at, size = sample.members[extension]
            back = file.tell()
            file.seek(at)
            data = file.read(size)
            file.seek(back)
            if len(data) < size:
                raise _Damage("the file is cut off")
            return data

        values: dict[str, Any] = {}
        if "json" in sample.members:
            with suppress(ValueError):
                read = json.loads(contents("json"))
                values = read if isinstance(read, dict) else {}
        text = _text(values.get(self.source.text))
        for extension in (self.source.text, "txt"):
            if extension in sample.members and extension != "json":
                text = contents(extension).decode("utf-8", "replace").strip()
                break
        name = values.get(self.source.id) or sample.key.rsplit("/", 1)[-1]
        return Row(self._key(path, number, name), contents(sample.recording or ""), text, self._seconds(values))


class _Sample:
    """Members of a tar with the same key: extension to (offset, size) of the contents."""

    def __init__(self, key: str, start: int, audio: str | None):
        self.key, self.start, self.audio = key, start, audio
        self.members: dict[str, tuple[int, int]] = {}

    @property
    def recording(self) -> str | None:
        """The extension of the member with the audio."""
        if self.audio is not None:
            return self.audio.lower() if self.audio.lower() in self.members else None
        return next((e for e in self.members if e.rsplit(".", 1)[-1] in AUDIO_EXTENSIONS), None)


class _Entry(NamedTuple):
    """What a list says of one recording, or the ``error`` for which it cannot be used."""

    audio: Any = None
    id: Any = None
    text: str | None = None
    seconds: float | None = None
    part: Part | None = None
    error: str | None = None


class _List(_Reader):
    """What lists of recordings have in common. Blocks with offsets below and from 0 on are apart."""

    def __init__(self, source: Source, retries: int):
        super().__init__(source, retries)
        self._kept: OrderedDict[tuple[str, ...], tuple[Any, int]] = OrderedDict()
        self._lock = threading.RLock()

    def _entries(self, path: str, offset: int | None) -> Iterator[tuple[int, Callable[[], _Entry]]]:
        """(offset, what gives the entry) of the entries from an offset on; None: from the first."""
        raise NotImplementedError

    def index(self, path: str) -> tuple[list[Block], str | None]:
        blocks: list[Block] = []
        usable, reason = False, None
        for offset, entry in self._entries(path, None):
            if not usable:
                error = entry().error
                usable, reason = error is None, reason or error
            if blocks and blocks[-1][0] < LIST_BLOCK and (blocks[-1][1] < 0) == (offset < 0):
                blocks[-1] = (blocks[-1][0] + 1, blocks[-1][1])
            else:
                blocks.append((1, offset))
        if reason and not usable:
            raise _Damage(reason)
        return blocks, None

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        remaining = iter(wanted)
        number = next(remaining)
        for position, (_, entry) in enumerate(self._entries(path, offset)):
            if position == number:
                yield number, self._row(path, first + number, entry())
                if (number := next(remaining, -1)) < 0:
                    return

    def _row(self, path: str, number: int, entry: _Entry) -> Row:
        key = self._key(path, number, entry.id)
        if entry.error is not None:
            return Row(key, None, None, None, entry.error)
        try:
            recording: Any = audio_of(entry.audio)
            if isinstance(recording, str) and entry.part and path.startswith("hf://"):
                # Read where it is cut: not the whole of it for each of its parts.
                recording = f"{path.rsplit('/', 1)[0]}/{recording}"
            else:
                recording = self._recording(path, entry.audio)
        except Exception as error:
            return Row(key, None, None, None, first_line(error))
        return Row(key, recording, entry.text, entry.seconds, None, entry.part)

    # Files that are read whole are kept

    def _keep(self, key: tuple[str, ...], make: Callable[[], tuple[T, int]]) -> T:
        """What ``make`` gives, with its bytes; kept for later calls, the latest of all up to :data:`KEPT_BYTES`."""
        with self._lock:
            if key not in self._kept:
                made = make()
                self._kept[key] = made
                while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def _is_there(self, path: str) -> bool:
        if not path.startswith("hf://"):
            return os.path.isfile(path)

        def look() -> tuple[bool, int]:
            with _File(path, self.retries) as file:
                try:
                    file.size()
                except FileNotFoundError:
                    return False, 0
            return True, 0

        return self._keep(("there", path), look)

    def _lines(self, path: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of the lines that are not empty."""
        with io.BytesIO(self._unpacked(path)) if path.endswith(".gz") else _File(path, self.retries) as file:
            lines = _Lines(file, offset)
            for line in lines:
                if line.strip():
                    yield lines.start, line

    def _unpacked(self, path: str) -> bytes:
        def unpack() -> tuple[bytes, int]:
            pieces, size = [], 0
            with _File(path, self.retries) as file, gzip.GzipFile(fileobj=file) as unpacked:  # type: ignore[arg-type]
                while piece := unpacked.read(READ_BYTES):
                    pieces.append(piece)
                    size += len(piece)
                    if size > UNPACKED_BYTES:
                        raise _Damage(f"the file has more than {UNPACKED_BYTES:,} bytes when it is unpacked; unpack it")
            return b"".join(pieces), size

        return self._keep(("unpacked", path), unpack)

    def _lookup(self, path: str, name: Callable[[bytes], bytes | None]) -> "_Lookup":
        """The lines of a file by what ``name`` gives for each of them."""

        def make() -> tuple[_Lookup, int]:
            made = _Lookup(self._unpacked(path) if path.endswith(".gz") else self._contents(path), name)
            return made, made.size

        return self._keep((name.__name__, path), make)


class _Lookup:
    """The lines of a file by a name in each of them. Of lines of one name the first counts.

    Besides the file itself it holds 16 bytes a line.
    """

    def __init__(self, data: bytes, name: Callable[[bytes], bytes | None]):
        self._data, self._name = data, name
        starts, hashes = array("q"), array("q")
        start = 0
        for line in io.BytesIO(data):
            if (word := name(line)) is not None:
                starts.append(start)
                hashes.append(hash(word))
            start += len(line)
        order = np.argsort(np.array(hashes, np.int64), kind="stable")
        self._hashes, self._starts = np.array(hashes, np.int64)[order], np.array(starts, np.int64)[order]
        self.size = len(data) + self._hashes.nbytes + self._starts.nbytes

    def find(self, word: bytes) -> bytes | None:
        """The line of that name."""
        wanted = hash(word)
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            start = int(self._starts[place])
            end = self._data.find(b"\n", start)
            line = self._data[start:] if end < 0 else self._data[start:end]
            if self._name(line) == word:
                return line
            place += 1
        return None


def _time(value: Any, what: str) -> float:
    """A time in seconds. Raises _Damage if it is none."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise _Damage(f"{what} {value!r} is no time in seconds")
    return seconds


class _Manifest(_List):
    """Lists of audio files: JSON lines or a JSON list, CSV or TSV with a header, and fairseq's TSV.

    A row with an ``offset``, as NeMo writes it, is the part of its file from there on, as long as it says.
    """

    def _audio_key(self, values: dict[str, Any]) -> str:
        names = AUDIO_KEYS if self.source.audio == "audio" else (self.source.audio,)
        for name in names:
            if name in values:
                return name
        raise _Damage(f"there is no key {' or '.join(names)} (keys: {', '.join(map(str, values))})")

    def _entries(self, path: str, offset: int | None) -> Iterator[tuple[int, Callable[[], _Entry]]]:
        with _File(path, self.retries) as file:
            for start, values in self._records(path, file, offset):
                yield start, partial(self._entry, values)

    def _entry(self, values: dict[str, Any] | str) -> _Entry:
        if isinstance(values, str):
            return _Entry(error=values)
        name = next((values[n] for n in (self.source.id, *ID_KEYS) if values.get(n)), None)
        try:
            audio = values[self._audio_key(values)]
            name = name or (audio.get("path") if isinstance(audio, dict) else audio)
            seconds = self._seconds(values)
            part = self._part(values, seconds)
        except _Damage as error:
            return _Entry(id=name, error=str(error))
        names = TEXT_KEYS if self.source.text == "text" else (self.source.text,)
        text = next((_text(values[name]) for name in names if values.get(name) is not None), None)
        return _Entry(audio, name, text, seconds, part)

    def _part(self, values: dict[str, Any], seconds: float | None) -> Part | None:
        if values.get("offset") in (None, ""):
            return None
        start = _time(values["offset"], "offset")
        duration = self._duration_key(values)
        if duration and not seconds:
            raise _Damage(f"{duration} {values[duration]!r} is no length of a part")
        return Part(start, None if seconds is None else start + seconds)

    def _located(self, table: str, name: str) -> bytes | str:
        found = super()._located(table, name)
        if isinstance(found, str) and not os.path.isfile(found) and not os.path.isabs(name):
            folder = os.path.dirname(table)
            # Common Voice names files of a folder beside its tables.
            in_clips = os.path.join(folder, "clips", name)
            return in_clips if os.path.isfile(in_clips) else os.path.join(folder, name)
        return found

    def _records(self, path: str, file: _File, offset: int | None) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """(offset, values or what is wrong with them) of the records from an offset on; None: from the first."""
        extension = path.rsplit(".", 1)[-1].lower()
        if extension in ("csv", "tsv"):
            yield from self._lines_of_table(file, offset, "," if extension == "csv" else "\t")
            return
        lines = _Lines(file)
        start = next((line for line in lines if line.strip()), b"")
        if start.lstrip().startswith(b"["):  # one list, whose offsets count records
            file.seek(0)
            for number, values in enumerate(json.loads(file.read())):
                if number >= (offset or 0):
                    yield number, values if isinstance(values, dict) else "this record is no object"
            return
        lines = _Lines(file, offset or 0)
        for line in lines:
            if line.strip():
                yield lines.start, _json_object(line)

    def _lines_of_table(
        self, file: _File, offset: int | None, separator: str
    ) -> Iterator[tuple[int, dict[str, Any] | str]]:
        lines = _Lines(file)
        first, second = next(lines, b"").decode("utf-8-sig", "replace").rstrip("\r\n"), next(lines, b"")
        fields = second.decode("utf-8", "replace").rstrip("\r\n").split("\t")
        if separator == "\t" and "\t" not in first and len(fields) == 2 and fields[1].isdigit():
            # fairseq: the root of all paths, then a path and a number of samples in each line.
            lines = _Lines(file, offset or 0)
            if offset is None:
                next(lines)
            for line in lines:
                if line.strip():
                    name = line.decode("utf-8", "replace").split("\t")[0].strip()
                    yield lines.start, {"audio": os.path.join(first.strip(), name)}
            return
        lines = _Lines(file)
        quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
        header = next(csv.reader(lines.texts(), delimiter=separator, quoting=quoting), [])
        if offset is not None:
            lines = _Lines(file, offset)
        records = csv.reader(lines.texts(), delimiter=separator, quoting=quoting)
        while True:
            start = lines.position
            try:
                record = next(records, None)
            except csv.Error as error:
                yield start, f"the line cannot be read ({first_line(error)})"
                continue
            if record is None:
                return
            if record:
                yield start, dict(zip(header, record, strict=False))


class _Kaldi(_List):
    """Kaldi's data folders, each known by its wav.scp: a row is a line of segments, or without them one of wav.scp."""

    def _entries(self, path: str, offset: int | None) -> Iterator[tuple[int, Callable[[], _Entry]]]:
        folder = path.rsplit("/", 1)[0] if "/" in path else "."
        segments, text = f"{folder}/segments", f"{folder}/{self.source.text}"
        texts = self._lookup(text, _first_word) if self._is_there(text) else None
        cut = self._is_there(segments)
        recordings = self._lookup(path, _first_word) if cut else None
        for start, line in self._lines(segments if cut else path, offset or 0):
            yield start, partial(self._entry, line, texts, recordings)

    def _entry(self, line: bytes, texts: _Lookup | None, recordings: _Lookup | None) -> _Entry:
        name = line.split(None, 1)[0]
        spoken = texts.find(name) if texts else None
        entry = _Entry(id=name.decode("utf-8", "replace"), text=_rest(spoken) if spoken else None)
        try:
            if recordings is None:
                return entry._replace(audio=_plain_path(line))
            return entry._replace(**self._segment(line, recordings))
        except _Damage as error:
            return entry._replace(error=str(error))

    def _segment(self, line: bytes, recordings: _Lookup) -> dict[str, Any]:
        """Audio, part and seconds of a line: utterance, recording, start, end (-1: its end), and maybe a channel."""
        told = f"the line {_quoted(line)} of segments"
        words = line.split()
        if len(words) not in (4, 5):
            raise _Damage(f"{told} must have an utterance, a recording, a start and an end")
        recording, begin, end = (word.decode("utf-8", "replace") for word in words[1:4])
        start, stop = _time(begin, f"{told} is wrong: its start"), None
        try:
            to_the_end = float(end) == -1
            channel = int(words[4]) if len(words) == 5 else -1
        except ValueError:
            raise _Damage(f"{told} is wrong: its end or channel is no number") from None
        if not to_the_end:
            stop = _time(end, f"{told} is wrong: its end")
            if stop <= start:
                raise _Damage(f"{told} is wrong: it ends before it starts")
        found = recordings.find(words[1])
        if found is None:
            raise _Damage(f"{told} names the recording {recording!r}, which is not in wav.scp")
        part = Part(start, stop, channel if channel >= 0 else None)
        return {"audio": _plain_path(found), "part": part, "seconds": None if stop is None else stop - start}


def _first_word(line: bytes) -> bytes | None:
    return next(iter(line.split(None, 1)), None)


def _rest(line: bytes) -> str:
    """A line after its first word."""
    return b"".join(line.split(None, 1)[1:]).decode("utf-8", "replace").strip()


def _quoted(line: bytes, longest: int = 200) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= longest else f"{text[:longest]}...")


def _plain_path(line: bytes) -> str:
    """The path in a line of wav.scp. Raises _Damage for what is none: commands, which are never run, and archives."""
    path, told = _rest(line), f"the line {_quoted(line)} of wav.scp"
    if not path:
        raise _Damage(f"{told} has no path")
    if path.startswith("|") or path.endswith("|"):
        raise _Damage(f"{told} holds a command, and commands are not run")
    if re.search(r":\d+$", path):
        raise _Damage(f"{told} names a place in an archive, and archives are not read")
    return path


class _Lhotse(_List):
    """lhotse's manifests, a line each: cuts, or recordings with the supervisions beside them.

    Each supervision is a row, and so is each recording without any, which come after all supervisions. The offsets of
    the latter are inverted (``~offset``).
    """

    def _entries(self, path: str, offset: int | None) -> Iterator[tuple[int, Callable[[], _Entry]]]:
        supervisions = self._supervisions(path)
        if supervisions is None:
            for start, line in self._lines(path, offset or 0):
                yield start, partial(self._entry, line, None)
            return
        if offset is None or offset >= 0:
            recordings = self._lookup(path, _json_id)
            for start, line in self._lines(supervisions, offset or 0):
                yield start, partial(self._entry, line, recordings)
        if offset is None or offset < 0:
            supervised = self._lookup(supervisions, _json_recording_id)
            for start, line in self._lines(path, 0 if offset is None else ~offset):
                if supervised.find(_json_id(line) or b"") is None:
                    yield ~start, partial(self._entry, line, None)

    def _supervisions(self, path: str) -> str | None:
        """The file with the supervisions of recordings, packed or not."""
        folder, slash, name = path.rpartition("/")
        if lhotse_name(name) != "recordings":
            return None
        before, _, after = name.rpartition("recordings")
        beside = f"{folder}{slash}{before}supervisions{after.removesuffix('.gz')}"
        return next((file for file in (beside, f"{beside}.gz") if self._is_there(file)), None)

    def _entry(self, line: bytes, recordings: _Lookup | None) -> _Entry:
        values = _json_object(line)
        if isinstance(values, str):
            return _Entry(error=values)
        name = values.get("id")
        try:
            if "sources" in values:
                audio, channel = _lhotse_source(values, None)
                return _Entry(audio, name, None, _time(values["duration"], "duration"))
            spoken = [values]
            if "type" not in values and recordings is not None:
                found = recordings.find(str(values.get("recording_id")).encode())
                if found is None:
                    raise _Damage(f"there is no recording {values.get('recording_id')!r} for this supervision")
                recording: Any = _json_object(found)
            elif values.get("type") in ("MonoCut", "MultiCut", "Cut"):
                recording, spoken = values.get("recording"), values.get("supervisions") or []
                if recording is None:
                    raise _Damage("the cut has no recording, and features are not read")
            elif "type" in values:
                raise _Damage(f"a {values['type']} is not read, only a cut of one recording is")
            else:
                raise _Damage("the line is neither a cut nor a recording, nor a supervision beside its recordings")
            start, duration = _time(values.get("start"), "start"), _time(values.get("duration"), "duration")
            audio, channel = _lhotse_source(recording, values.get("channel"))
            texts = [text for one in spoken if (text := _text(one.get(self.source.text)))]
            return _Entry(audio, name, " ".join(texts) or None, duration, Part(start, start + duration, channel))
        except _Damage as error:
            return _Entry(id=name, error=str(error))
        except Exception as error:  # values of other types than lhotse writes
            return _Entry(id=name, error=f"the line is not as lhotse writes it ({type(error).__name__}: {error})")

    def _located(self, table: str, name: str) -> bytes | str:
        return name if os.path.isfile(name) and not table.startswith("hf://") else super()._located(table, name)


def _json_id(line: bytes) -> bytes | None:
    return _json_value(line, "id")


def _json_recording_id(line: bytes) -> bytes | None:
    return _json_value(line, "recording_id")


def _json_value(line: bytes, key: str) -> bytes | None:
    values = _json_object(line)
    return None if isinstance(values, str) or key not in values else str(values[key]).encode(errors="replace")


def _lhotse_source(recording: dict[str, Any], wanted: int | list[int] | None) -> tuple[str, int | None]:
    """The path of the file that holds the wanted channels (None: all), and the number of the one in it if not all are.

    Raises _Damage where there is no such file.
    """
    name = f"recording {recording.get('id')!r}"
    if recording.get("transforms"):
        kinds = ", ".join(str(one.get("name")) for one in recording["transforms"])
        raise _Damage(f"{name} has transforms ({kinds}), which are not applied")
    channels = {wanted} if isinstance(wanted, int) else None if wanted is None else set(wanted)
    sources = [one for one in recording["sources"] if channels is None or channels & set(one["channels"])]
    kinds = sorted({one["type"] for one in sources} - {"file"})
    if kinds:
        raise _Damage(f"{name} has a source of type {kinds[0]!r}, and only those of type 'file' are read")
    if len(sources) != 1:
        which = "its channels" if wanted is None else f"channel {wanted}"
        raise _Damage(f"{name} has {which} in {len(sources)} files, not in one")
    own = sources[0]["channels"]
    if channels is None or set(own) <= channels:
        return sources[0]["source"], None
    if len(channels & set(own)) > 1:
        raise _Damage(f"{name} has further channels than {wanted}, and only one or all of a file are read")
    return sources[0]["source"], own.index(*(channels & set(own)))


def _json_object(line: bytes) -> dict[str, Any] | str:
    try:
        values = json.loads(line)
    except ValueError:
        return "the line is no JSON"
    return values if isinstance(values, dict) else "the line is no JSON object"


class _Lines:
    """Lines of a file from an offset on; ``start`` is where the latest begins, ``position`` where the next does."""

    def __init__(self, file: _File | io.BytesIO, offset: int = 0):
        self.file, self.start, self.position = file, offset, offset
        self._read_to = offset
        self._lines: list[bytes] = []
        self._next = 0
        self._tail = b""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> bytes:
        while self._next == len(self._lines):
            self.file.seek(self._read_to)
            data = self.file.read(READ_BYTES)
            self._read_to += len(data)
            if not data and not self._tail:
                raise StopIteration
            self._lines = _split(self._tail + data)
            self._tail = self._lines.pop() if data and not self._lines[-1].endswith(b"\n") else b""
            self._next = 0
        line = self._lines[self._next]
        self._next += 1
        self.start, self.position = self.position, self.position + len(line)
        return line

    def texts(self) -> Iterator[str]:
        for line in self:
            yield line.decode("utf-8-sig" if self.start == 0 else "utf-8", "replace")


def _split(data: bytes) -> list[bytes]:
    """Lines that end in \\n only, with their ends."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


class _AudioFiles(_Reader):
    """Recordings that are files of their own. A group is a run of files; transcriptions lie beside them."""

    def __init__(self, source: Source, retries: int, files: list[str]):
        super().__init__(source, retries)
        self.files = files
        self._transcripts: OrderedDict[str, dict[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        for number in wanted:
            name = self.files[offset + number]
            try:
                audio = self._contents(name) if name.startswith("hf://") else name
                yield number, Row(name, audio, self._beside(name), None)
            except Exception as error:
                yield number, Row(name, None, None, None, first_line(error))

    def _beside(self, path: str) -> str | None:
        """NAME.txt, or the line of NAME in LibriSpeech's *.trans.txt; not looked for on the hub."""
        if path.startswith("hf://"):
            return None
        folder, name = os.path.split(path)
        stem = name.rsplit(".", 1)[0]
        text = os.path.join(folder, f"{stem}.txt")
        if os.path.isfile(text):
            return self._contents(text).decode("utf-8", "replace").strip()
        return self._transcripts_of(folder).get(stem)

    def _transcripts_of(self, folder: str) -> dict[str, str]:
        with self._lock:
            if folder in self._transcripts:
                return self._transcripts[folder]
        texts: dict[str, str] = {}
        for entry in os.scandir(folder or "."):
            if entry.name.endswith(".trans.txt"):
                for line in self._contents(entry.path).decode("utf-8", "replace").splitlines():
                    name, _, text = line.strip().partition(" ")
                    texts[name] = text
        with self._lock:
            self._transcripts[folder] = texts
            while len(self._transcripts) > 64:
                self._transcripts.popitem(last=False)
        return texts


def _reader(source: Source, format: str, retries: int, files: list[str]) -> _Reader:
    if format == "audio":
        return _AudioFiles(source, retries, files)
    kinds = {
        "parquet": _Parquet,
        "arrow": _Arrow,
        "webdataset": _Tar,
        "manifest": _Manifest,
        "kaldi": _Kaldi,
        "lhotse": _Lhotse,
        "codes": _CodeShards,
    }
    return kinds[format](source, retries)


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


def index_files(source: Source, files: list[str], retries: int = 5, progress: bool = False) -> DatasetIndex:
    """Look at each file once: how many rows it has, and where. No audio is read.

    Args:
        files: as :func:`~torchtitan.datasets.sources.find_files` gives them, all of one format.
        retries: how often a read that failed for a reason that may pass is tried again.
        progress: show a bar on stderr.

    Raises:
        UserError: no file can be read, the recordings are in none of them, or there is no row at all.
    """
    if not files:
        raise UserError(f"{source.path}: there are no files to read.")
    format = source.format if source.format != "auto" else kind_of(files[0], alone=True) or "audio"
    if format == "audio":
        sizes = [(min(LIST_BLOCK, len(files) - start), start) for start in range(0, len(files), LIST_BLOCK)]
        return DatasetIndex(list(files), [sizes], [], _fingerprint(source, [(path, 1) for path in files]), format)
    reader = _reader(source, format, retries, files)

    def look(path: str) -> tuple[list[Block], str | None]:
        try:
            return reader.index(path)
        except Exception as error:  # whatever a damaged file raises leaves out this file
            return [], first_line(error)

    found: list[tuple[list[Block], str | None]] = []
    with ThreadPoolExecutor(min(INDEX_THREADS, len(files)), thread_name_prefix="index") as pool:
        results = pool.map(look, files)
        if progress:
            from tqdm import tqdm

            results = tqdm(results, total=len(files), desc=source.name, unit=" files", leave=False)
        found.extend(results)
    bad = [(path, reason) for path, (_, reason) in zip(files, found, strict=True) if reason]
    good = [(path, blocks) for path, (blocks, reason) in zip(files, found, strict=True) if blocks or not reason]
    if not good:
        path, reason = bad[0]
        others = f" (none of the {len(files):,} files can be read)" if len(files) > 1 else ""
        raise UserError(f"{path}: {reason}{others}.")
    rows = [(path, sum(size for size, _ in blocks)) for path, blocks in good]
    if not any(size for _, size in rows):
        raise UserError(f"{source.path}: there is no row in {'it' if len(files) == 1 else 'any of its files'}.")
    paths, blocks = [path for path, _ in good], [blocks for _, blocks in good]
    return DatasetIndex(paths, blocks, bad, _fingerprint(source, rows), format)


def _fingerprint(source: Source, rows: list[tuple[str, int]]) -> str:
    """sha256 over names relative to the root of the data set, and their numbers of rows."""
    root = f"{Path(source.path).expanduser()}/"
    digest = hashlib.sha256()
    for path, size in rows:
        if path.startswith("hf://datasets/"):
            name = path.removeprefix("hf://datasets/").split("/", 2)[-1]
        else:
            name = path.removeprefix(root) if path.startswith(root) else os.path.basename(path)
        # A file name need not be text.
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


class AudioDataset:
    """Rows of a data set by their numbers, which count through its files in order.

    Nothing is held open between calls, and several threads may read at once.

    Attributes:
        source, name, index, fingerprint: what it was made from.
        block_sizes: int64 [number of blocks], rows of the consecutive blocks over all files.

    Args:
        source: the data set's facts.
        index: as :func:`index_files` gives it.
        retries: how often a read that failed for a reason that may pass is tried again.
    """

    def __init__(self, source: Source, index: DatasetIndex, retries: int = 5):
        if index.format == "codes":
            raise UserError(f"{source.path}: these are codes, not recordings.")
        self.source, self.index, self.name, self.fingerprint = source, index, source.name, index.fingerprint
        self.retries = retries
        self._reader = _reader(source, index.format, retries, index.files)
        sizes = [size for blocks in index.blocks for size, _ in blocks]
        self.block_sizes = np.array(sizes, dtype=np.int64)
        self._length = int(self.block_sizes.sum())
        # Groups: runs of blocks with the same offset. Where they begin, and what they are.
        self._group_starts: np.ndarray
        self._groups: list[tuple[int, int, int]] = []  # (number of the file, its first row, the group's offset)
        starts, total = [], 0
        for number, blocks in enumerate(index.blocks):
            before = total
            last: int | None = None
            for size, offset in blocks:
                if offset != last:
                    starts.append(total)
                    self._groups.append((number, before, offset))
                last = offset
                total += size
        self._group_starts = np.array(starts, dtype=np.int64)

    def __len__(self) -> int:
        """Number of rows."""
        return self._length

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """(number, row) for each of the ascending numbers, in that order; neighbours are read at one go.

        What cannot be read comes as a row with an ``error``; nothing is raised for bad data.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        if numbers.size == 0:
            return
        if numbers[0] < 0 or numbers[-1] >= self._length or (np.diff(numbers) <= 0).any():
            raise ValueError(f"rows must ascend between 0 and {self._length - 1}")
        groups = np.searchsorted(self._group_starts, numbers, side="right") - 1
        edges = np.flatnonzero(np.diff(groups)) + 1
        for wanted, group in zip(np.split(numbers, edges), groups[np.r_[0, edges]], strict=True):
            yield from self._read_group(wanted.tolist(), int(group))

    def _read_group(self, wanted: list[int], group: int) -> Iterator[tuple[int, Row]]:
        number, file_start, offset = self._groups[group]
        start = int(self._group_starts[group])
        path = self.index.files[number]
        done = 0
        reason = "the file is shorter than when it was indexed"
        try:
            for found, row in self._reader.read(path, start - file_start, offset, [w - start for w in wanted]):
                done += 1
                yield start + found, row
        except Exception as error:  # whatever a damaged file raises costs the rest of this group
            reason = first_line(error)
        if done == len(wanted):
            return
        missing = wanted[done:]
        low, high = missing[0] - file_start, missing[-1] - file_start
        logger.warning(f"{path}: rows {low:,} to {high:,} cannot be read ({reason})")
        for row in missing:
            yield row, Row(f"{path}:{row - file_start}", None, None, None, reason)

"""Shards of codes: recordings are encoded once, stored in Arrow files, and read through memory maps.

A set of shards is a folder of ``codes-00000-of-00012.arrow``, ... (Arrow's IPC file format, uncompressed). A row is one
recording. Its codes are stored frame by frame, with the Q codes of a frame side by side:

    id string, codes list<uint16> [T * Q], frames int32 (T), seconds float64, text string or null, source string

The schema's metadata has a JSON header under ``llama_mimi``: the codec with its conventions and resampler, the data
set, and the bad rows (under the key ``failed``). A file does not depend on when or where it was written.

:class:`ShardedCodes` reads such a set. Opening it reads headers and lengths; a recording's codes are a view of the
mapped file. Before the first codes of a shard are used, its checksum is verified.
"""

import hashlib
import json
import os
import re
import socket
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.audio.waveform import recorded_resampler
from torchtitan.tools.errors import UserError, first_line

if TYPE_CHECKING:  # imported where it is used, since training on audio files does not need it
    import pyarrow as pa

FORMAT = 1
HEADER_KEY = b"llama_mimi"
# Header keys that differ between the shards of a set. The versions may change if a tokenization is continued after an
# update.
_OF_ONE_SHARD = ("shard", "rows", "failed", "left_out", "checksum", "versions")
# Maximum number of codes in a record batch, because the offsets of a list are int32. A shard is usually one batch.
_MAX_BATCH_CODES = 1 << 28
_SHARD_NAME = re.compile(r"codes-(\d{5,})-of-(\d{5,})\.arrow")


class ShardError(UserError):
    """Shards that are damaged, incomplete or do not fit."""


class WriteError(UserError):
    """A file could not be written. No partial file is left."""


@dataclass(frozen=True)
class Recording:
    """A row of a shard.

    Attributes:
        key: its id in the source, without absolute paths.
        codes: uint16 [T, Q].
        seconds: length of the encoded audio.
        text: transcription.
        source: name of the data set.
    """

    key: str
    codes: np.ndarray
    seconds: float
    text: str | None
    source: str


@cache
def schema() -> "pa.Schema":
    """Columns of a shard, without the header."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("codes", pa.list_(pa.field("item", pa.uint16(), nullable=False)), nullable=False),
            pa.field("frames", pa.int32(), nullable=False),
            pa.field("seconds", pa.float64(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("source", pa.string(), nullable=False),
        ]
    )


def shard_name(number: int, total: int) -> str:
    return f"codes-{number:05d}-of-{total:05d}.arrow"


def find_shards(folder: str | Path) -> list[str]:
    """Sorted paths of the shards in a folder."""
    folder = Path(folder).expanduser()
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [str(folder / name) for name in names if _SHARD_NAME.fullmatch(name)]


# --- writing


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that it is either complete and on the disk, or does not exist.

    Args:
        path: path of the file.
        write: function that writes bytes to an open file.

    Raises:
        WriteError: the disk is full, or the folder is not writable.
    """
    # The name is unique, since several machines may write to one folder, and killed processes leave such files.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        try:
            with open_for_writing(temporary) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(f"{path.parent}: {path.name} cannot be written there ({error.strerror or error}).") from None


def open_for_writing(path: Path) -> BinaryIO:
    """Open an output file; all output files are opened here."""
    return path.open("wb")


def _sync_folder(folder: Path) -> None:
    """Make sure that a rename is on the disk, if the file system supports this for folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(descriptor)


def write_part(path: Path, recordings: Sequence[Recording], header: dict[str, Any]) -> None:
    """Write a part of a shard. Its header has ``failed`` ([key, reason] of bad rows) and ``left_out`` (a number)."""
    import pyarrow as pa

    arrays = [
        pa.array([r.key for r in recordings], pa.string()),
        _list_array([r.codes for r in recordings]),
        pa.array([len(r.codes) for r in recordings], pa.int32()),
        pa.array([r.seconds for r in recordings], pa.float64()),
        pa.array([r.text for r in recordings], pa.string()),
        pa.array([r.source for r in recordings], pa.string()),
    ]
    _write_batches(path, header, [pa.record_batch(arrays, schema=schema())])


def read_part(path: Path) -> "tuple[list[pa.RecordBatch], dict[str, Any]]":
    """Record batches (memory-mapped) and header of a part or a shard.

    Raises:
        ShardError: the file is missing, damaged or not a shard.
    """
    import pyarrow as pa

    try:
        # A process can have fewer open files than there are shards, so the file is closed at once. The mapping lives on
        # as long as the batches.
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            stored = (reader.schema.metadata or {}).get(HEADER_KEY)
            if stored is None or not reader.schema.remove_metadata().equals(schema()):
                raise ShardError(f"{path}: this is not a shard of codes.")
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        return batches, json.loads(stored)
    except FileNotFoundError:
        raise ShardError(f"{path}: there is no such shard.") from None
    except (OSError, pa.ArrowException, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: the shard is damaged or cut off ({first_line(error)}).") from None


def merge_parts(parts: Sequence[Path], path: Path, header: dict[str, Any]) -> None:
    """Join parts, in order, into a shard.

    Args:
        header: header of the shard without ``failed``, ``left_out`` and ``checksum``, which are added here.
    """
    import pyarrow as pa

    bad_rows: list[list[str]] = []
    left_out, checksum, size = 0, 0, 0
    groups: list[list[Any]] = [[]]
    for part in parts:
        batches, part_header = read_part(part)
        bad_rows += part_header["failed"]
        left_out += part_header["left_out"]
        for batch in batches:
            values = _values(batch)
            checksum = zlib.crc32(values.data, checksum)
            if groups[-1] and size + len(values) > _MAX_BATCH_CODES:
                groups.append([])
                size = 0
            groups[-1].append(batch)
            size += len(values)
    header = {**header, "failed": bad_rows, "left_out": left_out, "checksum": f"{checksum:08x}"}
    _write_batches(path, header, (pa.concat_batches(group) for group in groups if group))


def _write_batches(path: Path, header: dict[str, Any], batches: "Iterable[pa.RecordBatch]") -> None:
    import pyarrow as pa

    text = json.dumps(header, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with_header = schema().with_metadata({HEADER_KEY: text.encode()})

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_file(file, with_header) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(with_header.metadata))

    write_atomically(path, write)


def _list_array(codes: Sequence[np.ndarray]) -> "pa.Array":
    """Arrays uint16 [T, Q] as a column of flat lists."""
    import pyarrow as pa

    offsets = np.zeros(len(codes) + 1, np.int64)
    np.cumsum([one.size for one in codes], out=offsets[1:])
    values = np.concatenate([one.reshape(-1) for one in codes]) if codes else np.zeros(0, np.uint16)
    if values.size > np.iinfo(np.int32).max:
        raise UserError("a part of a shard has more codes than one can hold; cut the recordings (max_seconds).")
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values, pa.uint16()), type=schema().field("codes").type
    )


def _buffer(batch: "pa.RecordBatch", column: str, number: int, dtype: type, length: int) -> np.ndarray:
    """A buffer of a column as an array, without a copy. Raises ValueError if its length is wrong.

    Arrow trusts the nulls, lengths and offsets in a damaged file. This function does not.
    """
    buffer = batch.column(column).buffers()[number]
    size = length * np.dtype(dtype).itemsize
    if (0 if buffer is None else buffer.size) - size not in range(64):  # the size may include padding
        raise ValueError("its lengths contradict its codes")
    return np.frombuffer(buffer, dtype, length) if length else np.zeros(0, dtype)


def _values(batch: "pa.RecordBatch") -> np.ndarray:
    """All codes of a batch as one flat uint16 array, without a copy."""
    return batch.column("codes").values.to_numpy(zero_copy_only=True)


# --- reading


class _Shard:
    """An open file, with its batches as arrays that are views of the mapped file."""

    def __init__(self, path: str):
        self.batches, self.header = read_part(Path(path))
        self.frames: list[np.ndarray] = []  # int32 [N] of each batch
        self.seconds: list[np.ndarray] = []  # float64 [N] of each batch
        self.codes: list[np.ndarray] = []  # uint16 [frames of the batch, Q] of each batch
        try:
            _check_header(self.header)
            num_quantizers = self.header["num_quantizers"]
            for batch in self.batches:
                frames = _buffer(batch, "frames", 1, np.int32, batch.num_rows)
                size = int(frames.sum(dtype=np.int64)) * num_quantizers
                if len(frames) and frames.min() < 1:
                    raise ValueError("its lengths contradict its codes")
                self.frames.append(frames)
                self.seconds.append(_buffer(batch, "seconds", 1, np.float64, batch.num_rows))
                self.codes.append(_buffer(batch, "codes", 3, np.uint16, size).reshape(-1, num_quantizers))
        except (ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors too
            raise ShardError(f"{path}: the shard is damaged ({first_line(error)}).") from None


class ShardedCodes:
    """A set of shards as one sequence of recordings.

    Opening reads headers, lengths and durations. The object can be forked and pickled; it then maps the files again
    when it needs them.

    Args:
        files: paths of all shards of the set, in any order.

    Raises:
        ShardError: there are no files, some are missing, they do not belong together, or one is damaged or not a shard.

    Attributes:
        header: the common part of the headers of all shards.
        name: name of the data set.
        fingerprint: hash of the stored codes, equal for equal sets at any place.
        frames: int32 [N], T of each recording.
        seconds: float64 [N], duration of each recording.
        bad_rows: (id, reason) of the bad rows of the source.
    """

    def __init__(self, files: Sequence[str | Path]):
        if not files:
            raise ShardError("a set of shards needs at least one file.")
        shards: dict[int, tuple[str, _Shard]] = {}
        for path in sorted(map(str, files)):
            shard = _Shard(path)
            number = shard.header["shard"]
            first_path, first = next(iter(shards.values()), (path, shard))
            _check_same(first_path, first.header, path, shard.header)
            if number in shards:
                raise ShardError(f"{path}: it has the number {number}, as {shards[number][0]} has.")
            shards[number] = (path, shard)
        any_path, any_shard = next(iter(shards.values()))
        total = any_shard.header["of"]
        missing = [shard_name(number, total) for number in range(total) if number not in shards]
        if missing:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ShardError(
                f"{Path(any_path).parent}: {len(missing)} of the {total} shards are missing ({names}); finish the "
                "tokenization by running its command again."
            )
        self.header: dict[str, Any] = {k: v for k, v in any_shard.header.items() if k not in _OF_ONE_SHARD}
        self.name: str = self.header["source"]["name"]
        self.files = [shards[number][0] for number in range(total)]
        self._open: list[_Shard | None] = [shards[number][1] for number in range(total)]
        opened = [shards[number][1] for number in range(total)]
        self.bad_rows = [(key, reason) for shard in opened for key, reason in shard.header["failed"]]
        per_batch = [frames for shard in opened for frames in shard.frames]
        self.frames = np.concatenate([np.zeros(0, np.int32), *per_batch])
        self.seconds = np.concatenate([np.zeros(0), *(seconds for shard in opened for seconds in shard.seconds)])
        checksums = [(shard.header["checksum"], sum(map(len, shard.frames))) for shard in opened]
        described = json.dumps([self.header, checksums], sort_keys=True)
        self._checksums = [checksum for checksum, _ in checksums]
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        # A recording is in the batch with the last first recording before it. Its place in the batch is its first frame
        # minus the first frame of the batch.
        self._places = [(s, b) for s, shard in enumerate(opened) for b in range(len(shard.frames))]
        self._first_recording = np.cumsum([0, *map(len, per_batch)])[:-1].tolist() or [0]
        self._ends = np.cumsum(self.frames, dtype=np.int64)
        before = np.concatenate([[0], self._ends])
        self._first_frame: list[int] = before[self._first_recording].tolist()
        self._codes: list[np.ndarray | None] = [None] * len(self._places)  # those of verified shards

    def __len__(self) -> int:
        return len(self.frames)

    def __getstate__(self) -> dict[str, Any]:
        # The copy has no mapped files, and opens them when it needs them.
        return {**self.__dict__, "_open": [None] * len(self._open), "_codes": [None] * len(self._codes)}

    def codes(self, i: int, start: int = 0, stop: int | None = None, num_quantizers: int | None = None) -> np.ndarray:
        """Codes of recording ``i``.

        Args:
            start, stop: wanted frames, as in a slice.
            num_quantizers: wanted number of codebooks, from the first on.

        Returns:
            uint16 [T', Q], a read-only view of the file.
        """
        if not 0 <= i < len(self.frames):
            raise IndexError(f"recording {i} of {len(self)}")
        batch = bisect_right(self._first_recording, i) - 1
        codes = self._codes[batch]
        if codes is None:
            codes = self._load(batch)
        frames = self.frames.item(i)
        begin = self._ends.item(i) - frames - self._first_frame[batch]
        if start or stop is not None:
            start, stop, _ = slice(start, stop).indices(frames)
            return codes[begin + start : begin + max(start, stop), :num_quantizers]
        return codes[begin : begin + frames, :num_quantizers]

    def text(self, i: int) -> str | None:
        """Transcription of recording ``i``."""
        return self._value("text", i)

    def key(self, i: int) -> str:
        """Id of recording ``i`` in its source."""
        return self._value("id", i)

    def check_codec(
        self, audio_tokenizer: str, num_quantizers: int, padding: str, window: str, resampler: str = "torchaudio"
    ) -> None:
        """Refuse shards whose codes differ from those of a model's codec.

        If the codec has another name than that of the shards, or is in a local folder, its weights are compared.

        Args:
            audio_tokenizer: hub name or folder of the codec.
            num_quantizers: wanted number of codebooks; the shards may have more.
            padding: ``exact`` or ``aligned``.
            window: ``codec`` or ``full``.
            resampler: one of :data:`~torchtitan.audio.waveform.RESAMPLERS`.

        Raises:
            ShardError: the shards do not fit; the message names all differences.
            CodecError: the codec cannot be loaded.
        """
        stored = self.header
        where = f"{Path(self.files[0]).parent}: the shards of codes do not fit"
        wrong = []
        if num_quantizers > stored["num_quantizers"]:
            wrong.append(f"they have {stored['num_quantizers']} quantizers, but {num_quantizers} are needed")
        recorded = {**stored, "resampler": recorded_resampler(stored.get("resampler"))}
        for key, wanted in (("codec_padding", padding), ("codec_window", window), ("resampler", resampler)):
            if recorded[key] != wanted:
                wrong.append(f"{key} is {recorded[key]} in them, but {wanted} is needed")
        if wrong:
            raise ShardError(f"{where}: {', and '.join(wrong)}.")
        if audio_tokenizer == stored["audio_tokenizer"] and not Path(audio_tokenizer).expanduser().exists():
            return
        from torchtitan.audio.codec import Codec

        codec = Codec.load(audio_tokenizer, stored["num_quantizers"], padding, window)
        if codec.fingerprint() != stored["codec_fingerprint"]:
            raise ShardError(
                f"{where}: they were made with the codec {stored['audio_tokenizer']}, whose weights differ from "
                f"those of {audio_tokenizer}."
            )

    def verify(self) -> None:
        """Read all codes and compare their checksums.

        Raises:
            ShardError: a shard has changed.
        """
        for number in range(len(self.files)):
            self._verify(number)

    def _value(self, column: str, i: int) -> Any:
        if not 0 <= i < len(self.frames):
            raise IndexError(f"recording {i} of {len(self)}")
        batch = bisect_right(self._first_recording, i) - 1
        shard, within = self._places[batch]
        array = self._shard(shard).batches[within].column(column)
        row = i - self._first_recording[batch]
        # Arrow trusts offsets. A damaged one would read past the end of the file.
        offsets = np.frombuffer(array.buffers()[1], np.int32, 2, 4 * row)
        data = array.buffers()[2]
        if not 0 <= offsets[0] <= offsets[1] <= (data.size if data is not None else 0):
            raise ShardError(f"{self.files[shard]}: the shard is damaged (its column {column} is not readable).")
        try:
            return array[row].as_py()
        except UnicodeDecodeError:
            raise ShardError(f"{self.files[shard]}: the shard is damaged (its column {column} is not text).") from None

    def _load(self, batch: int) -> np.ndarray:
        """The codes of a batch. The whole shard is verified first, so that a changed byte is never trained on."""
        shard, within = self._places[batch]
        self._verify(shard)
        first = batch - within
        self._codes[first : first + len(self._shard(shard).codes)] = self._shard(shard).codes
        return self._shard(shard).codes[within]

    def _verify(self, number: int) -> None:
        checksum, largest = 0, 0
        for codes in self._shard(number).codes:
            checksum = zlib.crc32(codes.data, checksum)
            largest = max(largest, int(codes.max(initial=0)))
        if f"{checksum:08x}" != self._checksums[number]:
            raise ShardError(f"{self.files[number]}: the shard is damaged (its codes have another checksum).")
        if largest >= CODEBOOK_SIZE:
            raise ShardError(f"{self.files[number]}: the shard holds the code {largest}, which no codebook has.")

    def _shard(self, number: int) -> _Shard:
        shard = self._open[number]
        if shard is None:
            shard = _Shard(self.files[number])
            if shard.header["checksum"] != self._checksums[number]:
                raise ShardError(f"{self.files[number]}: the shard has changed since it was first opened.")
            self._open[number] = shard
        return shard


def _check_header(header: Any) -> None:
    """Raise ValueError for a header that this version does not write."""
    if not isinstance(header, dict) or "format" not in header:
        raise ValueError("its header is not readable")
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {header['format']}, but this version reads {FORMAT}")
    codec = ("audio_tokenizer", "codec_fingerprint", "codec_padding", "codec_window", "num_quantizers")
    for key in ("shard", "of", *codec, "source", "failed", "checksum"):
        if key not in header:
            raise ValueError(f"its header lacks {key}")
    if not 0 <= header["shard"] < header["of"] or header["num_quantizers"] < 1:
        raise ValueError("its header contradicts itself")


def _check_same(first_path: str, first: dict[str, Any], path: str, header: dict[str, Any]) -> None:
    """Raise ShardError if two shards are not from the same set."""
    for key in sorted({*first, *header} - {*_OF_ONE_SHARD}):
        if first.get(key) != header.get(key):
            raise ShardError(
                f"{path}: it does not belong to the same set as {first_path}: {key} is {header.get(key)!r} in one and "
                f"{first.get(key)!r} in the other."
            )

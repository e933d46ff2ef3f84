"""Rows of lists of recordings: manifests (also of Kaldi and lhotse) and folders of audio files."""

import csv
import gzip
import io
import json
import math
import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from torchtitan.audio.recording import Part, audio_of
from torchtitan.datasets import files
from torchtitan.datasets.files import Damage, File
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.rows import Block, Found, Reader, Row, text_of
from torchtitan.datasets.sources import lhotse_name
from torchtitan.tools.errors import first_line

T = TypeVar("T")

# Audio files, or lines of a list, in a block.
LIST_BLOCK = 256
# Maximum size of a list after decompression.
UNPACKED_BYTES = 2 << 30
# Maximum length of a line: a file without line breaks is not a list.
MAX_LINE_BYTES = 1 << 24
# Maximum size of the files that a reader caches whole.
KEPT_BYTES = 4 << 30

AUDIO_KEYS = ("audio", "path", "audio_filepath", "audio_path", "file_name", "filename", "file", "wav", "flac", "mp3")
TEXT_KEYS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_text")
ID_KEYS = ("id", "utt_id", "utterance_id")


class _Entry(NamedTuple):
    """What a list says about one recording, or the ``error`` that makes it bad."""

    audio: Any = None
    id: Any = None
    text: str | None = None
    seconds: float | None = None
    part: Part | None = None
    error: str | None = None


class _List(Reader):
    """What lists of recordings have in common. A block never mixes negative offsets with others."""

    def __init__(self, source: Source, retries: int):
        super().__init__(source, retries)
        self._kept: OrderedDict[tuple[str, ...], tuple[Any, int]] = OrderedDict()
        self._lock = threading.RLock()

    def _entries(self, path: str, offset: int | None) -> Iterator[tuple[int, Callable[[], _Entry]]]:
        """(offset, a function that gives the entry) of the entries from an offset on; None: from the first."""
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
            raise Damage(reason)
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
                # Only the part is read from the hub, not the whole file for each of its parts.
                recording = f"{path.rsplit('/', 1)[0]}/{recording}"
            else:
                recording = self._recording(path, entry.audio)
        except Exception as error:
            return Row(key, None, None, None, first_line(error))
        return Row(key, recording, entry.text, entry.seconds, None, entry.part, self.source)

    def _keep(self, key: tuple[str, ...], make: Callable[[], tuple[T, int]]) -> T:
        """The first result of ``make``, cached. Its second one is its size; the cache holds :data:`KEPT_BYTES`."""
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
            with File(path, self.retries) as file:
                try:
                    file.size()
                except FileNotFoundError:
                    return False, 0
            return True, 0

        return self._keep(("there", path), look)

    def _lines(self, path: str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of each line that is not empty."""
        with io.BytesIO(self._unpacked(path)) if path.endswith(".gz") else File(path, self.retries) as file:
            lines = _Lines(file, offset)
            for line in lines:
                if line.strip():
                    yield lines.start, line

    def _unpacked(self, path: str) -> bytes:
        def unpack() -> tuple[bytes, int]:
            pieces, size = [], 0
            with File(path, self.retries) as file, gzip.GzipFile(fileobj=file) as unpacked:  # type: ignore[arg-type]
                while piece := unpacked.read(files.READ_BYTES):
                    pieces.append(piece)
                    size += len(piece)
                    if size > UNPACKED_BYTES:
                        raise Damage(f"the file has more than {UNPACKED_BYTES:,} bytes when unpacked; unpack it")
            return b"".join(pieces), size

        return self._keep(("unpacked", path), unpack)

    def _lookup(self, path: str, name: Callable[[bytes], bytes | None]) -> "_Lookup":
        """The lines of a file by their names, which the function ``name`` extracts."""

        def make() -> tuple[_Lookup, int]:
            made = _Lookup(self._unpacked(path) if path.endswith(".gz") else self._contents(path), name)
            return made, made.size

        return self._keep((name.__name__, path), make)


class _Lookup:
    """The lines of a file by their names. If several lines have the same name, the first one counts.

    It holds the file in memory, and 16 bytes per line.
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
    """A time in seconds. Raises Damage for other values."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise Damage(f"{what} {value!r} is not a time in seconds")
    return seconds


class Manifest(_List):
    """Lists of audio files: JSON lines or a JSON list, CSV or TSV with a header, and fairseq's TSV.

    A row with an ``offset`` (NeMo) is the part of its file that begins there and lasts for the row's duration.
    """

    def _audio_key(self, values: dict[str, Any]) -> str:
        names = AUDIO_KEYS if self.source.audio == "audio" else (self.source.audio,)
        for name in names:
            if name in values:
                return name
        raise Damage(f"there is no key {' or '.join(names)} (keys: {', '.join(map(str, values))})")

    def _entries(self, path: str, offset: int | None) -> Iterator[tuple[int, Callable[[], _Entry]]]:
        with File(path, self.retries) as file:
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
        except Damage as error:
            return _Entry(id=name, error=str(error))
        names = TEXT_KEYS if self.source.text == "text" else (self.source.text,)
        text = next((text_of(values[name]) for name in names if values.get(name) is not None), None)
        return _Entry(audio, name, text, seconds, part)

    def _part(self, values: dict[str, Any], seconds: float | None) -> Part | None:
        if values.get("offset") in (None, ""):
            return None
        start = _time(values["offset"], "offset")
        duration = self._duration_key(values)
        if duration and not seconds:
            raise Damage(f"{duration} {values[duration]!r} is not a valid length")
        return Part(start, None if seconds is None else start + seconds)

    def _located(self, table: str, name: str) -> bytes | str:
        found = super()._located(table, name)
        if isinstance(found, str) and not os.path.isfile(found) and not os.path.isabs(name):
            folder = os.path.dirname(table)
            # Common Voice has its files in a folder beside its tables.
            in_clips = os.path.join(folder, "clips", name)
            return in_clips if os.path.isfile(in_clips) else os.path.join(folder, name)
        return found

    def _records(self, path: str, file: File, offset: int | None) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """(offset, values or an error message) of the records from an offset on; None: from the first."""
        extension = path.rsplit(".", 1)[-1].lower()
        if extension in ("csv", "tsv"):
            yield from self._lines_of_table(file, offset, "," if extension == "csv" else "\t")
            return
        lines = _Lines(file)
        start = next((line for line in lines if line.strip()), b"")
        if start.lstrip().startswith(b"["):  # one JSON list: its offsets count records
            file.seek(0)
            try:
                records = json.loads(file.read())
            except RecursionError:
                raise Damage("its JSON is nested too deeply") from None
            for number, values in enumerate(records):
                if number >= (offset or 0):
                    yield number, values if isinstance(values, dict) else "this record is not a JSON object"
            return
        lines = _Lines(file, offset or 0)
        for line in lines:
            if line.strip():
                yield lines.start, _json_object(line)

    def _lines_of_table(
        self, file: File, offset: int | None, separator: str
    ) -> Iterator[tuple[int, dict[str, Any] | str]]:
        lines = _Lines(file)
        first, second = next(lines, b"").decode("utf-8-sig", "replace").rstrip("\r\n"), next(lines, b"")
        fields = second.decode("utf-8", "replace").rstrip("\r\n").split("\t")
        if separator == "\t" and "\t" not in first and len(fields) == 2 and fields[1].isdigit():
            # fairseq: the first line is the root of all paths; each other line has a path and a number of samples.
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


class Kaldi(_List):
    """Kaldi's data folders. A row is a line of ``segments``, or of ``wav.scp`` if there are no segments."""

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
        except Damage as error:
            return entry._replace(error=str(error))

    def _segment(self, line: bytes, recordings: _Lookup) -> dict[str, Any]:
        """Audio, part and seconds of a line: utterance, recording, start, end (-1: its end), perhaps a channel."""
        told = f"the line {_quoted(line)} of segments"
        words = line.split()
        if len(words) not in (4, 5):
            raise Damage(f"{told} must have an utterance, a recording, a start and an end")
        recording, begin, end = (word.decode("utf-8", "replace") for word in words[1:4])
        start, stop = _time(begin, f"{told} is wrong: its start"), None
        try:
            to_the_end = float(end) == -1
            channel = int(words[4]) if len(words) == 5 else -1
        except ValueError:
            raise Damage(f"{told} is wrong: its end or channel is not a number") from None
        if not to_the_end:
            stop = _time(end, f"{told} is wrong: its end")
            if stop <= start:
                raise Damage(f"{told} is wrong: it ends before it starts")
        found = recordings.find(words[1])
        if found is None:
            raise Damage(f"{told} names the recording {recording!r}, which is not in wav.scp")
        part = Part(start, stop, channel if channel >= 0 else None)
        return {"audio": _plain_path(found), "part": part, "seconds": None if stop is None else stop - start}


def _first_word(line: bytes) -> bytes | None:
    return next(iter(line.split(None, 1)), None)


def _rest(line: bytes) -> str:
    """The line without its first word."""
    return b"".join(line.split(None, 1)[1:]).decode("utf-8", "replace").strip()


def _quoted(line: bytes, longest: int = 200) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= longest else f"{text[:longest]}...")


def _plain_path(line: bytes) -> str:
    """The path in a line of wav.scp. Raises Damage for archives, and for commands, which are never run."""
    path, told = _rest(line), f"the line {_quoted(line)} of wav.scp"
    if not path:
        raise Damage(f"{told} has no path")
    if path.startswith("|") or path.endswith("|"):
        raise Damage(f"{told} holds a command, and commands are not run")
    if re.search(r":\d+$", path):
        raise Damage(f"{told} names a place in an archive, and archives are not read")
    return path


class Lhotse(_List):
    """lhotse's manifests of cuts, or of recordings with their supervisions in a file beside them.

    The rows are the cuts; or all supervisions, and then all recordings that have none. The offsets of the latter are
    inverted (``~offset``).
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
        """The file of the supervisions of a file of recordings, compressed or not."""
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
                    raise Damage(f"there is no recording {values.get('recording_id')!r} for this supervision")
                recording: Any = _json_object(found)
            elif values.get("type") in ("MonoCut", "MultiCut", "Cut"):
                recording, spoken = values.get("recording"), values.get("supervisions") or []
                if recording is None:
                    raise Damage("the cut has no recording, and features are not read")
            elif "type" in values:
                raise Damage(f"a {values['type']} is not read, only a cut of one recording is")
            else:
                raise Damage("the line is neither a cut nor a recording, nor a supervision of a recording")
            start, duration = _time(values.get("start"), "start"), _time(values.get("duration"), "duration")
            audio, channel = _lhotse_source(recording, values.get("channel"))
            texts = [text for one in spoken if (text := text_of(one.get(self.source.text)))]
            return _Entry(audio, name, " ".join(texts) or None, duration, Part(start, start + duration, channel))
        except Damage as error:
            return _Entry(id=name, error=str(error))
        except Exception as error:  # values of types that lhotse does not write
            return _Entry(id=name, error=f"this is not a valid lhotse line ({type(error).__name__}: {error})")

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
    """The path of the file with the wanted channels (None: all), and the channel's number in it; None for all of them.

    Raises Damage if no single file has these channels.
    """
    name = f"recording {recording.get('id')!r}"
    if recording.get("transforms"):
        kinds = ", ".join(str(one.get("name")) for one in recording["transforms"])
        raise Damage(f"{name} has transforms ({kinds}), which are not applied")
    channels = {wanted} if isinstance(wanted, int) else None if wanted is None else set(wanted)
    sources = [one for one in recording["sources"] if channels is None or channels & set(one["channels"])]
    kinds = sorted({one["type"] for one in sources} - {"file"})
    if kinds:
        raise Damage(f"{name} has a source of type {kinds[0]!r}, and only type 'file' is read")
    if len(sources) != 1:
        which = "its channels" if wanted is None else f"channel {wanted}"
        raise Damage(f"{name} has {which} in {len(sources)} files, not in one")
    own = sources[0]["channels"]
    if channels is None or set(own) <= channels:
        return sources[0]["source"], None
    if len(channels & set(own)) > 1:
        raise Damage(f"{name} has other channels beside {wanted}, and only one or all of a file are read")
    return sources[0]["source"], own.index(*(channels & set(own)))


def _json_object(line: bytes) -> dict[str, Any] | str:
    try:
        values = json.loads(line)
    except ValueError:
        return "the line is not JSON"
    except RecursionError:
        return "the line's JSON is nested too deeply"
    return values if isinstance(values, dict) else "the line is not a JSON object"


class _Lines:
    """Lines of a file from an offset on. The last line began at ``start``; the next one begins at ``position``."""

    def __init__(self, file: File | io.BytesIO, offset: int = 0):
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
            data = self.file.read(files.READ_BYTES)
            self._read_to += len(data)
            if not data and not self._tail:
                raise StopIteration
            if len(self._tail) > MAX_LINE_BYTES:
                raise Damage(f"a line is longer than {MAX_LINE_BYTES:,} bytes")
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
    """Lines with their line breaks; only \\n is a line break."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


class AudioFiles(Reader):
    """Audio files as recordings, with transcriptions beside them. A group is a run of files."""

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
                yield number, Row(name, audio, self._beside(name), None, source=self.source)
            except Exception as error:
                yield number, Row(name, None, None, None, first_line(error))

    def _beside(self, path: str) -> str | None:
        """The transcription in NAME.txt, or in LibriSpeech's *.trans.txt; None on the hub."""
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

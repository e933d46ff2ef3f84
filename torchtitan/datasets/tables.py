"""Rows of parquet and Arrow."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from torchtitan.datasets import files
from torchtitan.datasets.files import Damage, File
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.rows import DURATIONS, Block, Found, Reader, Row, text_of
from torchtitan.tools.errors import first_line
from torchtitan.tools.retries import retried

# Maximum number of rows in a block.
BLOCK_ROWS = 128
# Rows decoded from parquet at a time. They and files.READ_BYTES limit the memory of a reader.
BATCH_ROWS = 16


def groups_of(rows: int, offset: int) -> list[Block]:
    """The rows of a group, divided into blocks of at most :data:`BLOCK_ROWS`."""
    return [(min(BLOCK_ROWS, rows - start), offset) for start in range(0, rows, BLOCK_ROWS)]


def audio_fields(kind: Any) -> list[str]:
    """The audio fields of a pyarrow struct type: {bytes, path} or {array, sampling_rate}; [] if it has none."""
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


def cell_value(scalar: Any) -> Any:
    """A cell as a Python value. The samples of decoded audio are an array."""
    import pyarrow

    if isinstance(scalar, pyarrow.StructScalar) and scalar.is_valid and "array" in scalar:
        array = scalar["array"]
        samples = array.values.to_numpy(zero_copy_only=False) if array.is_valid else None
        return {**{name: scalar[name].as_py() for name in scalar if name != "array"}, "array": samples}
    return scalar.as_py()


class Table(Reader):
    """What parquet and Arrow have in common."""

    def _columns(self, schema: Any) -> list[str]:
        """Names of the columns to read. Raises Damage if there is no column with recordings."""
        import pyarrow

        source = self.source
        if source.audio not in schema.names:
            raise Damage(f"there is no column {source.audio!r} (columns: {', '.join(schema.names)})")
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
            raise Damage(f"column {source.audio!r} holds {kind}, which is neither audio nor a path")
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
        return Row(key, recording, text_of(values.get(self.source.text)), self._seconds(values), source=self.source)


class Parquet(Table):
    """Parquet. A group is a row group, which is read in small batches from its start."""

    def __init__(self, source: Source, retries: int):
        super().__init__(source, retries)
        self._footers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _footer(self, path: str, file: File) -> Any:
        """The metadata of a file. Those of the latest few files are cached, because every block needs them."""
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

        with File(path, self.retries) as file:
            footer = pyarrow.parquet.read_metadata(file)
        self._columns(footer.schema.to_arrow_schema())
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return [block for group, rows in enumerate(sizes) for block in groups_of(rows, group)], None

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        import pyarrow.parquet

        with File(path, self.retries) as file:
            footer = self._footer(path, file)
            # Without a buffer, pyarrow would read a column of gigabytes at once.
            size = files.HUB_READ_BYTES if path.startswith("hf://") else files.READ_BYTES
            table = pyarrow.parquet.ParquetFile(file, metadata=footer, buffer_size=size, pre_buffer=False)
            columns = self._columns(table.schema_arrow)
            batches = table.iter_batches(BATCH_ROWS, row_groups=[offset], columns=columns, use_threads=False)
            start, position = 0, 0
            for batch in batches:
                end = start + batch.num_rows
                while position < len(wanted) and wanted[position] < end:
                    number = wanted[position]
                    values = {n: cell_value(batch.column(i)[number - start]) for i, n in enumerate(batch.schema.names)}
                    yield number, self._row(path, first + number, values)
                    position += 1
                if position == len(wanted):
                    return
                start = end


class Arrow(Table):
    """Arrow's IPC stream or file format. A group is a record batch; local files are mapped into memory."""

    audio_needed = True

    def index(self, path: str) -> tuple[list[Block], str | None]:
        import pyarrow

        blocks: list[Block] = []
        with File(path, self.retries) as file:
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
                        raise Damage("the file is cut off")
                except (Damage, IndexError, ValueError) as error:
                    return blocks, f"the rest from byte {offset:,} on is missing: {first_line(error)}"
                if kind == _RECORD_BATCH:
                    blocks += groups_of(rows, offset)
                file.seek(end)

    def _check(self, schema: Any) -> None:
        import pyarrow

        if self.audio_needed:
            self._columns(schema)
        encoded = [f.name for f in schema if pyarrow.types.is_dictionary(f.type)]
        if encoded:
            raise Damage(f"column {encoded[0]!r} is dictionary-encoded, which is not read from Arrow files")

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        for number, batch in self.batches(path, offset, wanted):
            names = {column.split(".")[0] for column in self._columns(batch.schema)}
            values = {name: cell_value(batch.column(name)[number]) for name in names}
            yield number, self._row(path, first + number, values)

    def batches(self, path: str, offset: int, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(number, record batch) for each wanted row of the group."""
        import pyarrow

        with File(path, self.retries) as file:
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


def _stream_start(file: File) -> int:
    """Where the messages begin. An IPC file is an IPC stream between a magic number and a footer."""
    file.seek(0)
    return 8 if file.read(6) == b"ARROW1" else 0


def _message(file: File) -> tuple[bytes, int]:
    """(metadata with its length before it, size of the body) of the next message; (b"", 0) after the last one.

    The file is then at the start of the body.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        if prefix and prefix != b"\xff\xff\xff\xff" and prefix != bytes(4):
            raise Damage("the file is cut off")
        return b"", 0
    if prefix[:4] != b"\xff\xff\xff\xff":
        raise Damage("this is not Arrow data")
    length = int.from_bytes(prefix[4:], "little", signed=True)
    if length == 0:
        return b"", 0
    if not 0 < length <= 1 << 28:
        raise Damage("this is not Arrow data")
    head = file.read(length)
    if len(head) < length:
        raise Damage("the file is cut off")
    return prefix + head, _field(head, _root(head), 3, 8)


def _root(head: bytes) -> int:
    return int.from_bytes(head[:4], "little")


def _describe(message: bytes) -> tuple[int, int]:
    """(kind of header, number of rows of a record batch) from a message's metadata (a flatbuffer)."""
    head = message[8:]
    table = _root(head)
    kind = _field(head, table, 1, 1)
    if kind != _RECORD_BATCH:
        return kind, 0
    at = _place(head, table, 2)
    return kind, _field(head, at + int.from_bytes(head[at : at + 4], "little"), 0, 8)


def _place(head: bytes, table: int, number: int) -> int:
    """Position of a field in a flatbuffer's table; 0 if the field is missing."""
    vtable = table - int.from_bytes(head[table : table + 4], "little", signed=True)
    if 4 + 2 * number >= int.from_bytes(head[vtable : vtable + 2], "little"):
        return 0
    entry = int.from_bytes(head[vtable + 4 + 2 * number : vtable + 6 + 2 * number], "little")
    return table + entry if entry else 0


def _field(head: bytes, table: int, number: int, size: int) -> int:
    """An integer of ``size`` bytes in a flatbuffer's table; 0 if the field is missing."""
    at = _place(head, table, number)
    return int.from_bytes(head[at : at + size], "little", signed=size > 1) if at else 0


class CodeShards(Arrow):
    """Indexes shards of codes like Arrow files. shards.py reads their rows."""

    audio_needed = False

"""Rows of tars in WebDataset's naming."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from torchtitan.datasets.files import Damage, File
from torchtitan.datasets.rows import Block, Found, Reader, Row, text_of
from torchtitan.datasets.sources import AUDIO_EXTENSIONS
from torchtitan.tools.errors import first_line

# Rows of a tar in one block.
TAR_BLOCK = 64


class Tar(Reader):
    """Tars as WebDataset writes them: consecutive members with the same key form a row."""

    def index(self, path: str) -> tuple[list[Block], str | None]:
        starts: list[int] = []
        rest = None
        names: set[str] = set()
        with File(path, self.retries) as file:
            try:
                for tar_row in self._tar_rows(file, 0):
                    names.update(tar_row.members)
                    if tar_row.recording:
                        starts.append(tar_row.start)
            except (Damage, tarfile.TarError) as error:
                rest = f"the rest is missing: {first_line(error)}"
        if not starts and rest is None and names:
            wanted = f"of extension .{self.source.audio}" if self._named else "with audio"
            raise Damage(f"there is no member {wanted} (extensions: {', '.join(sorted(names)[:8])})")
        if not starts and rest is not None:
            raise Damage(rest.removeprefix("the rest is missing: "))
        edges = range(0, len(starts), TAR_BLOCK)
        return [(min(TAR_BLOCK, len(starts) - edge), starts[edge]) for edge in edges], rest

    def read(self, path: str, first: int, offset: int, wanted: Sequence[int]) -> Iterator[Found]:
        with File(path, self.retries) as file:
            remaining = iter(wanted)
            number = next(remaining)
            tar_rows = (tar_row for tar_row in self._tar_rows(file, offset) if tar_row.recording)
            for position, tar_row in enumerate(tar_rows):
                if position == number:
                    yield number, self._row(path, first + number, tar_row, file)
                    if (number := next(remaining, -1)) < 0:
                        return

    @property
    def _named(self) -> bool:
        """Whether the source names the file extension of recordings."""
        return self.source.audio != "audio"

    def _tar_rows(self, file: File, offset: int) -> Iterator["_TarRow"]:
        """Rows from the header at ``offset`` on. Raises Damage or TarError where the tar is damaged."""
        size = file.size()
        file.seek(offset)
        tar_row: _TarRow | None = None
        damage: Exception | None = None
        # Opening the tar already reads the first member, which may be damaged.
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]
                    if member.offset_data + member.size > size:
                        raise Damage("the file is cut off")
                    folder, _, base = member.name.rpartition("/")
                    if not member.isfile() or base.startswith("."):
                        continue
                    stem, _, extension = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if tar_row is None or tar_row.key != key:
                        if tar_row is not None:
                            yield tar_row
                        tar_row = _TarRow(key, member.offset, self.source.audio if self._named else None)
                    tar_row.members.setdefault(extension.lower(), (member.offset_data, member.size))
                end = tar.offset
            file.seek(end)
            if any(file.read(512)):
                raise Damage(f"the header at byte {end:,} is damaged")
        except (Damage, tarfile.TarError) as error:
            damage = error
        if tar_row is not None:
            yield tar_row
        if damage is not None:
            raise damage

    def _row(self, path: str, number: int, tar_row: "_TarRow", file: File) -> Row:
        def contents(extension: str) -> bytes:
            at, size = tar_row.members[extension]
            back = file.tell()
            file.seek(at)
            data = file.read(size)
            file.seek(back)
            if len(data) < size:
                raise Damage("the file is cut off")
            return data

        values: dict[str, Any] = {}
        if "json" in tar_row.members:
            with suppress(ValueError, RecursionError):
                read = json.loads(contents("json"))
                values = read if isinstance(read, dict) else {}
        text = text_of(values.get(self.source.text))
        for extension in (self.source.text, "txt"):
            if extension in tar_row.members and extension != "json":
                text = contents(extension).decode("utf-8", "replace").strip()
                break
        name = values.get(self.source.id) or tar_row.key.rsplit("/", 1)[-1]
        return Row(
            self._key(path, number, name),
            contents(tar_row.recording or ""),
            text,
            self._seconds(values),
            source=self.source,
        )


class _TarRow:
    """Consecutive members with the same key. ``members`` has (offset, size) of the contents by extension."""

    def __init__(self, key: str, start: int, audio: str | None):
        self.key, self.start, self.audio = key, start, audio
        self.members: dict[str, tuple[int, int]] = {}

    @property
    def recording(self) -> str | None:
        """The extension of the audio member; None without one."""
        if self.audio is not None:
            return self.audio.lower() if self.audio.lower() in self.members else None
        return next((e for e in self.members if e.rsplit(".", 1)[-1] in AUDIO_EXTENSIONS), None)

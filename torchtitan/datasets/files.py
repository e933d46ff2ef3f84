"""Files of data sets, local or on the hub, whose reads are tried again.

Reads that fail for a reason that may pass (network, file system) are tried again here, at the lowest level: all that is
raised above is :class:`Damage`, which no second try repairs.
"""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, TypeVar

from torchtitan.tools.retries import retried

T = TypeVar("T")

# Bytes read at a time.
READ_BYTES = 1 << 20
HUB_READ_BYTES = 1 << 23


class Damage(Exception):
    """Data that cannot be read; the message is the reason."""


def open_file(path: str) -> BinaryIO:
    """Open a local file or one on the hub for reading bytes at any position.

    Raises:
        Damage: it is there, but no regular file: a device or a pipe may never end.
        OSError: it is not there, or cannot be opened.
    """
    if not path.startswith("hf://"):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise Damage("this is no regular file")
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(path.removeprefix("hf://"), "rb", block_size=HUB_READ_BYTES)  # type: ignore[return-value]


class File:
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
                    self._raw = open_file(self.path)
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

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class RecordingFile(File):
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

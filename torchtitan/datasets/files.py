"""Files of data sets, local or on the hub, with retries.

A read that fails for a temporary reason (network, file system) is tried again here, at the lowest level. The modules
above raise only :class:`Damage`, which is never tried again.
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
    """Data that are damaged or of another kind; the message is the reason."""


def open_file(path: str) -> BinaryIO:
    """Open a local file or one on the hub for reading bytes at any position.

    Raises:
        Damage: it is not a regular file. A device or a pipe may never end.
        OSError: it does not exist, or cannot be opened.
    """
    if not path.startswith("hf://"):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise Damage("this is not a regular file")
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(path.removeprefix("hf://"), "rb", block_size=HUB_READ_BYTES)  # type: ignore[return-value]


class File:
    """A file that is opened at its first use, and opened again after a failed read."""

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
    """An audio file for libsndfile, which does not allow exceptions: after a failure the file appears to be at its end.

    Attributes:
        failure: the error after all retries.
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

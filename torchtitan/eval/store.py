"""Arrays on disk, by a hash of their inputs: codes of clips, and scores of an unfinished evaluation."""

import hashlib
import json
import os
import sys
import time
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

# A file is written after so many entries or seconds. A killed process loses at most these.
FILE_ENTRIES = 2048
FILE_SECONDS = 10.0


def digest(*parts: Any) -> bytes:
    """SHA-256 of bytes and of values that JSON can hold."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        total.update(len(data).to_bytes(8, "little") + data)
    return total.digest()


def default_cache_folder() -> Path:
    """The default cache folder for codes of evaluation clips."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llama-mimi" / "codes"


class ArrayStore:
    """One-dimensional arrays, each with an integer, by 32-byte keys, in a folder of .npz files.

    The store only grows. Each file is complete and has a unique name, so several processes can share a folder. A killed
    process loses only the entries that it has not written. Unreadable files are ignored. If no file can be written, a
    single warning says so.

    Args:
        folder: created when the first file is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._entries: dict[bytes, tuple[np.ndarray, int]] = {}
        self._waiting: dict[bytes, tuple[np.ndarray, int]] = {}
        self._written = time.monotonic()
        self._broken = False
        for path in sorted(folder.glob("*.npz")):
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                keys, numbers, offsets, values = (file[name] for name in ("keys", "numbers", "offsets", "values"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return
        for i, key in enumerate(keys):
            self._entries[key.tobytes()] = (values[offsets[i] : offsets[i + 1]], int(numbers[i]))

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> tuple[np.ndarray, int] | None:
        """The array and the integer of a key, or None."""
        return self._entries.get(key)

    def put(self, key: bytes, array: np.ndarray, number: int = 0) -> None:
        """Store an array. It is on disk after the next :meth:`flush`, which this method calls now and then."""
        self._entries[key] = self._waiting[key] = (array, number)
        if len(self._waiting) >= FILE_ENTRIES or time.monotonic() - self._written > FILE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all entries since the last flush."""
        self._written = time.monotonic()
        if not self._waiting:
            return
        if self._broken:
            self._waiting.clear()
            return
        try:
            self._write()
        except OSError as error:
            self._broken = True
            print(f"warning: {self.folder}: nothing can be kept there ({error.strerror}).", file=sys.stderr)
        self._waiting.clear()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = [array for array, _ in self._waiting.values()]
        columns = {
            "keys": np.stack([np.frombuffer(key, np.uint8) for key in self._waiting]),
            "numbers": np.array([number for _, number in self._waiting.values()], np.int64),
            "offsets": np.cumsum([0, *map(len, arrays)], dtype=np.int64),
            "values": np.concatenate(arrays),
        }
        path = self.folder / f"{uuid.uuid4().hex}.npz"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **columns)
        os.replace(partial, path)

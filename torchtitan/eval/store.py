"""Arrays on disk by the content that they were computed from: codes of clips, scores of an unfinished evaluation."""

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

# Entries in a file, and seconds after which a file is written anyway: what a killed process loses at most.
FILE_ENTRIES = 2048
FILE_SECONDS = 10.0


def digest(*parts: Any) -> bytes:
    """SHA-256 of bytes and of anything that JSON can say."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        total.update(len(data).to_bytes(8, "little") + data)
    return total.digest()


def default_cache_folder() -> Path:
    """Where codes of evaluation clips are kept if nothing else is said."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llama-mimi" / "codes"


class ArrayStore:
    """One-dimensional arrays, each with a number beside it, by 32-byte keys, in a folder of .npz files.

    It only grows. Each file is written whole under a name of its own, so any number of processes may use one folder,
    and be killed at any time: they lose what they had not written yet. Files that cannot be read are passed over, and
    if none can be written, that is said once.

    Args:
        folder: is made when something is written.
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
        """The array and the number of a key, or None."""
        return self._entries.get(key)

    def put(self, key: bytes, array: np.ndarray, number: int = 0) -> None:
        """Keep an array; it is on disk after the next :meth:`flush`, which happens by itself now and then."""
        self._entries[key] = self._waiting[key] = (array, number)
        if len(self._waiting) >= FILE_ENTRIES or time.monotonic() - self._written > FILE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was put in since the last time."""
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

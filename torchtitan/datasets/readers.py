"""Random access to rows of parquet, Arrow, tars, manifests (also of Kaldi and lhotse) and folders of audio files.

:func:`index_files` looks at each file once, without reading audio. Its :class:`DatasetIndex` says how many rows are in
which *block*; the rows of a block are read together. :class:`AudioDataset` then reads any rows by their numbers.
Audio is not decoded here, so a broken recording costs one row. Bad data give a row with an ``error``, never an
exception.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torchtitan.datasets import lists
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.lists import AudioFiles, Kaldi, Lhotse, Manifest
from torchtitan.datasets.rows import Block, Reader, Row
from torchtitan.datasets.sources import kind_of
from torchtitan.datasets.tables import Arrow, CodeShards, Parquet
from torchtitan.datasets.tars import Tar
from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.logging import logger

# Threads that index files.
INDEX_THREADS = 16


@dataclass
class DatasetIndex:
    """The places of all rows. One rank makes it and sends it to the others.

    Attributes:
        files: the readable files, as :func:`~torchtitan.datasets.sources.find_files` gives them.
        blocks: for each file, (rows, offset) of its consecutive blocks. The offset tells the reader where to read: the
            number of a parquet row group, or the byte at which an Arrow batch, a member of a tar or a line (of the
            unpacked file) begins. Blocks of one file with the same offset belong to one row group or batch. All audio
            files together have one list of blocks, whose offsets count files.
        bad_files: (path, reason) of files that are left out, entirely or from some point on.
        fingerprint: sha256 over the relative names and numbers of rows of the files; equal for a copy elsewhere.
        format: format of the files.
    """

    files: list[str]
    blocks: list[list[tuple[int, int]]]
    bad_files: list[tuple[str, str]]
    fingerprint: str
    format: str = field(default="parquet")


def _reader(source: Source, format: str, retries: int, files: list[str]) -> Reader:
    if format == "audio":
        return AudioFiles(source, retries, files)
    kinds = {
        "parquet": Parquet,
        "arrow": Arrow,
        "webdataset": Tar,
        "manifest": Manifest,
        "kaldi": Kaldi,
        "lhotse": Lhotse,
        "codes": CodeShards,
    }
    return kinds[format](source, retries)


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


def index_files(source: Source, files: list[str], retries: int = 5, progress: bool = False) -> DatasetIndex:
    """Find the rows of each file, without reading audio.

    Args:
        files: as :func:`~torchtitan.datasets.sources.find_files` gives them, all of one format.
        retries: how often a read is tried again after a temporary error.
        progress: show a bar on stderr.

    Raises:
        UserError: no file can be read or has recordings, or there is no row at all.
    """
    if not files:
        raise UserError(f"{source.path}: there are no files to read.")
    format = source.format if source.format != "auto" else kind_of(files[0], alone=True) or "audio"
    if format == "audio":
        sizes = [(min(lists.LIST_BLOCK, len(files) - start), start) for start in range(0, len(files), lists.LIST_BLOCK)]
        return DatasetIndex(list(files), [sizes], [], _fingerprint(source, [(path, 1) for path in files]), format)
    reader = _reader(source, format, retries, files)

    def look(path: str) -> tuple[list[Block], str | None]:
        try:
            return reader.index(path)
        except Exception as error:  # a damaged file may raise anything; only this file is left out
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
        raise UserError(f"{source.path}: there is no row in {'the file' if len(files) == 1 else 'any of its files'}.")
    paths, blocks = [path for path, _ in good], [blocks for _, blocks in good]
    return DatasetIndex(paths, blocks, bad, _fingerprint(source, rows), format)


def _fingerprint(source: Source, rows: list[tuple[str, int]]) -> str:
    """sha256 over the names of the files, relative to the root of the data set, and their numbers of rows."""
    root = f"{Path(source.path).expanduser()}/"
    digest = hashlib.sha256()
    for path, size in rows:
        if path.startswith("hf://datasets/"):
            name = path.removeprefix("hf://datasets/").split("/", 2)[-1]
        else:
            name = path.removeprefix(root) if path.startswith(root) else os.path.basename(path)
        # A file name may contain bytes that are not text.
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


class AudioDataset:
    """The rows of a data set by their numbers, which count through its files in order.

    No file stays open between calls, and several threads can read at once.

    Attributes:
        block_sizes: int64 [number of blocks], rows of the consecutive blocks over all files.

    Args:
        source: description of the data set.
        index: as :func:`index_files` gives it.
        retries: how often a read is tried again after a temporary error.
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
        # Groups are runs of blocks with the same offset.
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
        return self._length

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """(number, row) for each of the ascending numbers, in that order. Rows of one group are read together.

        A row that cannot be read has an ``error``. Bad data raise nothing.
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
        except Exception as error:  # a damaged file may raise anything; the rest of this group is lost
            reason = first_line(error)
        if done == len(wanted):
            return
        missing = wanted[done:]
        low, high = missing[0] - file_start, missing[-1] - file_start
        logger.warning(f"{path}: rows {low:,} to {high:,} cannot be read ({reason})")
        for row in missing:
            yield row, Row(f"{path}:{row - file_start}", None, None, None, reason)

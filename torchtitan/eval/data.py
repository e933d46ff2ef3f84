"""Pairs of clips, from the Hugging Face hub or from a local folder of the same layout.

A benchmark has several tasks. On the hub they are configurations of one data set (``slprl/SALMon``) or data sets of
one owner (``speed/sWUGGY``). On disk, a task is a folder of parquet files with its name; the parent folder stands for
all tasks. Audio is ``{bytes, path}``, which is decoded only when a clip is encoded, or ``{array, sampling_rate}``.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.audio.recording import Samples, audio_of
from torchtitan.datasets.tables import audio_fields
from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.hub import NotOnHub, fetch

_ROWS_PER_READ = 16
# Files or folders of a split begin with its name. These splits are known, besides those of --splits.
_SPLITS = ("train", "dev", "test", "valid")


class DataError(UserError):
    """A data set that does not exist, or is not in the layout of the benchmark."""


@dataclass(frozen=True)
class Task:
    """The pairs of one task. The files are checked, but not read yet.

    Attributes:
        name: ``sWUGGY``, ``bg_alignment``, ...; for other splits than train ``sWUGGY_dev``, ``sWUGGY_test``, ...
        source: the folder or hub name, for messages and records.
        revision: the commit on the hub; None for a folder, or if it is unknown.
        columns: names of the columns with the positive and the negative clip.
        num_pairs: number of rows.
        folder: folder of the files.
        files: parquet files.
    """

    name: str
    source: str
    revision: str | None
    columns: tuple[str, str]
    num_pairs: int
    folder: Path
    files: list[Path]

    def pairs(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The first ``limit`` rows (None: all), in the order of the data set.

        Raises:
            DataError: a parquet file cannot be read any further.
        """
        for index, row in enumerate(_parquet_rows(self.files)):
            if limit is not None and index >= limit:
                return
            yield row

    def audio(self, row: dict[str, Any], column: str) -> bytes | Path | Samples | None:
        """The audio in a column of a row: bytes, a path, decoded samples, or None if there is no audio."""
        found = audio_of(row[column])
        return self.folder / found if isinstance(found, str) else found


def open_tasks(
    dataset: str,
    names: Sequence[str],
    columns: tuple[str, str],
    as_configurations: bool,
    split: str = "train",
    revision: str | None = None,
) -> tuple[list[Task], list[str]]:
    """Open a benchmark's tasks.

    Args:
        dataset: a local folder (the parent of the tasks, or the folder of one task) or a hub name.
        names: the benchmark's tasks.
        columns: the columns with the positive and the negative clip.
        as_configurations: on the hub the tasks are configurations of the data set ``dataset``; otherwise they are data
            sets of the owner ``dataset``, or ``dataset`` is one of them (``owner/task``).
        split: split of the data sets. In a local folder, files or folders of a split begin with its name.
        revision: commit, branch or tag of the data sets on the hub. Default: the newest.

    Returns:
        the tasks that exist, in the order of ``names``, and the names of the missing tasks.

    Raises:
        DataError: no task exists, a column is missing, or the hub cannot be reached.
    """
    path = Path(os.path.abspath(Path(dataset).expanduser()))
    if path.is_dir():
        if path.name in names and _parquet_files(path, split):
            return [_open_folder(path.name, path, columns, split)], []
        there = [name for name in names if _parquet_files(path / name, split)]
        found = [_open_folder(name, path / name, columns, split) for name in there]
        where = f"the folder {dataset} has none of the task folders {', '.join(names)} and is none of them itself"
        if not found and (others := _other_splits([path / name for name in ("", *names)])):
            where = f"the files in {dataset} are of other splits (--splits {' '.join(others)})"
    elif path.exists():
        raise DataError(f"{dataset}: this is a file; give the folder of the task, or the folder of all tasks.")
    elif dataset.startswith((".", "/", "~")):
        raise DataError(f"{dataset}: there is no such folder.")
    elif as_configurations:
        if dataset.count("/") != 1:
            raise DataError(f"{dataset}: there is no such folder, and a hub name has the form owner/name.")
        found = [task for name in names if (task := _open_hub(name, dataset, name, columns, split, revision))]
        where = f"{dataset} is not a folder, and the hub has no data set of that name with one of {', '.join(names)}"
    else:
        owner, _, name = dataset.partition("/")
        if name and name not in names:
            raise DataError(f"{dataset}: there is no such folder, and a hub name must end in {' or '.join(names)}.")
        names = [name] if name else names
        hub_ids = {name: f"{owner}/{name}" for name in names}
        found = [task for name in names if (task := _open_hub(name, hub_ids[name], None, columns, split, revision))]
        where = f"{dataset} is not a folder, and the hub has none of {', '.join(f'{owner}/{name}' for name in names)}"
    if not found:
        of_split = "" if split == "train" else f" (split {split})"
        raise DataError(f"There is nothing to evaluate: {where}{of_split}.")
    named = [_task_name(name, split) for name in names]
    return found, [name for name in named if name not in {task.name for task in found}]


def _task_name(name: str, split: str) -> str:
    return name if split == "train" else f"{name}_{split}"


def task_folders(dataset: str) -> list[str]:
    """Names of the folders with parquet files in a local folder, or its own name if it has such files itself."""
    path = Path(os.path.abspath(Path(dataset).expanduser()))
    if not path.is_dir():
        return []
    if any(path.glob("*.parquet")):
        return [path.name]
    return sorted(child.name for child in path.iterdir() if child.is_dir() and _parquet_files(child))


def _parquet_files(folder: Path, split: str = "train") -> list[Path]:
    """The parquet files of a split in a task folder. Files without the name of a split are of train."""
    files: dict[Path, str] = {}
    for file in sorted(folder.rglob("*.parquet")):
        parts = file.relative_to(folder).parts
        if not any(part.startswith(".") for part in parts):
            leading = (found for part in parts for found in (split, *_SPLITS) if part.startswith(found))
            files[file] = next(leading, "")
    named = [file for file, found in files.items() if found == split]
    return named or ([file for file, found in files.items() if not found] if split == "train" else [])


def _other_splits(folders: Sequence[Path]) -> list[str]:
    """Splits other than train that have files."""
    return [split for split in _SPLITS[1:] if any(_parquet_files(folder, split) for folder in folders)]


def _open_folder(name: str, folder: Path, columns: tuple[str, str], split: str, repository: str | None = None) -> Task:
    """A task from a folder. ``repository`` is its name in messages and records; None: its path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = _parquet_files(folder, split)
    num_pairs = 0
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: not a readable parquet file ({first_line(error)}).") from None
        schema = parquet.schema_arrow
        _require_columns(name, str(file), columns, schema)
        num_pairs += parquet.metadata.num_rows
    _require_pairs(name, str(folder), num_pairs)
    return Task(_task_name(name, split), repository or str(folder), None, columns, num_pairs, folder, files)


def _parquet_rows(files: list[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            for batch in pq.ParquetFile(file).iter_batches(_ROWS_PER_READ):
                yield from batch.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: the parquet file is damaged ({first_line(error)}).") from None


def _open_hub(
    name: str, repository: str, configuration: str | None, columns: tuple[str, str], split: str, revision: str | None
) -> Task | None:
    """Download a task from the hub; None if the hub has no such data set or task."""

    def wanted(files: list[str]) -> list[str]:
        tables = [file for file in files if file.endswith(".parquet")]
        return [file for file in tables if configuration is None or configuration in file.split("/")[:-1]]

    try:
        folder, commit = fetch(repository, "dataset", wanted, revision)
    except NotOnHub:
        return None
    if folder is not None and configuration is not None:
        folder = next(folder.rglob(f"{configuration}/"), None)
    if folder is None or not _parquet_files(folder, split):
        return None
    return replace(_open_folder(name, folder, columns, split, repository), revision=commit)


def _require_columns(name: str, where: str, columns: Sequence[str], schema: Any) -> None:
    for column in columns:
        if column not in schema.names:
            raise DataError(
                f"{where}: task {name} needs the column {column!r}; the columns are {', '.join(schema.names)}."
            )
        if not audio_fields(schema.field(column).type):
            kinds = "{bytes, path} or {array, sampling_rate}"
            raise DataError(f"{where}: column {column!r} of task {name} must contain audio as {kinds}.")


def _require_pairs(name: str, where: str, num_pairs: int) -> None:
    if num_pairs == 0:
        raise DataError(f"{where}: task {name} has no pairs.")

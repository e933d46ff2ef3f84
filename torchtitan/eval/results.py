"""What an evaluation writes: accuracy.json, results.json and samples.parquet.

``samples.parquet`` has a row per clip; docs/evaluation.md lists its columns and metadata. All figures are computed from
it.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtitan.eval.metrics import TaskResult, averages
from torchtitan.tools.errors import UserError

# Names of folders that tell nothing of the run that they are in.
_IN_ANY_RUN = re.compile(r"hf|checkpoints?|exports?|final|last|best|snapshots?|((step|checkpoint|epoch)[-_])?\d+")


@dataclass
class Clip:
    """One side of a pair with its codes and NLLs. The attributes are the columns of samples.parquet.

    Attributes:
        codes: int16 [Q, T]; None for an unreadable clip.
        nll: float32 [Q * T + 2]; None before scoring.
        columns: the columns of the data set with plain values.
    """

    task: str
    pair: int
    side: str
    item: str
    codes: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    cut: float = 0.0
    context_cut: float = 0.0
    error: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def samples_table(clips: Sequence[Clip], num_quantizers: int, settings: dict[str, Any]) -> Any:
    """The samples as a pyarrow table with the columns and metadata of docs/evaluation.md."""
    import pyarrow as pa

    nothing = torch.empty(0)
    table: dict[str, Any] = {
        "task": pa.array([clip.task for clip in clips], pa.string()),
        "pair": pa.array([clip.pair for clip in clips], pa.int64()),
        "side": pa.array([clip.side for clip in clips], pa.string()),
        "item": pa.array([clip.item for clip in clips], pa.string()),
        "frames": pa.array([0 if clip.codes is None else clip.codes.shape[1] for clip in clips], pa.int32()),
        "codes": _list_array([nothing if c.codes is None else c.codes.T.reshape(-1) for c in clips], np.int16),
        "nll": _list_array([nothing if c.nll is None else c.nll for c in clips], np.float32),
        "cut": pa.array([clip.cut for clip in clips], pa.float64()),
        "context_cut": pa.array([clip.context_cut for clip in clips], pa.float64()),
        "error": pa.array([clip.error for clip in clips], pa.string()),
    }
    for name in dict.fromkeys(name for clip in clips for name in clip.columns):
        if name not in table:
            table[name] = _plain_array([clip.columns.get(name) for clip in clips])
    metadata = {"num_quantizers": json.dumps(num_quantizers), "settings": json.dumps(settings)}
    return pa.table(table).replace_schema_metadata(metadata)


def _list_array(rows: list[torch.Tensor], dtype: Any) -> Any:
    import pyarrow as pa

    offsets = np.cumsum([0, *(row.numel() for row in rows)], dtype=np.int32)
    values = torch.cat(rows).numpy().astype(dtype) if rows else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _plain_array(values: list[Any]) -> Any:
    """A column of one type. Values of several types, which two tasks may have, become strings."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])


def results_folder(output_dir: str | Path, benchmark: str, model_name: str) -> Path:
    """``<output_dir>/<benchmark>/<model_name>``.

    A local folder is called by its last two parts, and by further ones as long as the first of them may be in any run:
    outputs/run/hf/step-60 is run/hf/step-60.
    """
    path = Path(model_name).expanduser()
    if path.is_dir():
        parts = Path(os.path.abspath(path)).parts[1:]
        number = 2
        while number < len(parts) and _IN_ANY_RUN.fullmatch(parts[-number]):
            number += 1
        model_name = os.path.join(*parts[-number:])
    return Path(output_dir).expanduser() / benchmark / model_name


def require_no_other_model(folder: Path, model_folder: Path) -> None:
    """Refuse to overwrite the results of a model in another local folder.

    Raises:
        UserError: such results are there.
    """
    try:
        found = json.loads((folder / "results.json").read_bytes())["settings"]["model"]["folder"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if found is not None and found != os.path.abspath(model_folder):
        raise UserError(f"{folder}: it holds the results of another model ({found}); give another --output_dir.")


def make_folder(folder: Path) -> None:
    """Create the results folder.

    Raises:
        UserError: it cannot be created, or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the results folder cannot be created ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: the results folder cannot be written to.")


def write_results(
    folder: Path,
    samples: Any,
    results: dict[str, TaskResult],
    localized: dict[str, dict[str, TaskResult]],
    report: dict[str, Any],
) -> None:
    """Write the three files. A file that exists is complete.

    Args:
        samples: the table of :func:`samples_table`.
        results: the figures of each task.
        localized: the same for each window of localized likelihood, by its name.
        report: further content of results.json, such as ``settings``.
    """
    import pyarrow.parquet as pq

    figures = {
        "tasks": {name: dataclasses.asdict(result) for name, result in results.items()},
        "averages": averages(results),
        "localized": {
            window: {
                "tasks": {name: _short(result) for name, result in found.items()},
                "averages": averages(found),
            }
            for window, found in localized.items()
        },
    }
    with Replacing(folder / "samples.parquet") as path:
        pq.write_table(samples, path)
    with Replacing(folder / "results.json") as path:
        path.write_text(json.dumps({**figures, **report}, indent=2, allow_nan=False) + "\n")
    with Replacing(folder / "accuracy.json") as path:
        accuracies = {name: result.accuracy for name, result in results.items()}
        path.write_text(json.dumps(accuracies, indent=4, allow_nan=False) + "\n")


def _short(result: TaskResult) -> dict[str, Any]:
    """The figures of a task that depend on the rule."""
    names = ("accuracy", "standard_error", "interval", "pairs", "ties", "zerospeech")
    return {**{name: getattr(result, name) for name in names}, "left_out": len(result.left_out)}


class Replacing:
    """Gives a temporary path for writing. The file replaces the real one if no exception is raised."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def format_share(share: float | None) -> str:
    """A share, or its standard error, with four digits; nan for None."""
    return f"{math.nan if share is None else share:.4f}"


def format_table(results: dict[str, TaskResult]) -> str:
    """The accuracies as lines of text."""
    width = max(len("task"), *map(len, results))
    lines = [f"{'task':<{width}}  accuracy  std. error   pairs  ties  left out  cut"]
    for name, result in results.items():
        accuracy, error = format_share(result.accuracy), format_share(result.standard_error)
        cut = result.cut_clips + result.context_cut_clips
        lines.append(
            f"{name:<{width}}  {accuracy:>8}  {error:>10}  {result.pairs:>6}  {result.ties:>4}  "
            f"{len(result.left_out):>8}  {cut:>3}"
        )
    return "\n".join(lines)

"""What the benchmarks share: the command line, timing, ways that take turns, processes and the report."""

import io
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from torchtitan.tools.errors import UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
SPEECH_RATE = 16_000  # of the repository's prompt
Found = TypeVar("Found")


def run(main: Callable[[Any], None], options: type, description: str | None) -> None:
    """Run a benchmark with the options of the command line, which tyro makes from a dataclass.

    Without tyro (a bare GPU machine may lack it) it runs with the defaults, and refuses options in one sentence.
    """

    def parsed() -> None:
        try:
            import tyro
        except ModuleNotFoundError:
            if len(sys.argv) > 1:
                raise UserError(
                    f"tyro is missing, so {' '.join(sys.argv[1:])} cannot be read; install it (`pip install tyro`), or "
                    "give no options to run with the defaults."
                ) from None
            main(options())
            return
        main(tyro.cli(options, description=description, use_underscores=True))

    run_command(parsed)


def find_device(name: str | None = None) -> torch.device:
    """The device of this name; by default, and for ``auto``, the GPU if there is one."""
    return (
        torch.device("cuda" if torch.cuda.is_available() else "cpu") if name in (None, "auto") else torch.device(name)
    )


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(way: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes."""
    synchronize(device)
    begin = time.perf_counter()
    way()
    synchronize(device)
    return time.perf_counter() - begin


def median_seconds(way: Callable[[], Any], device: torch.device, turns: int) -> float:
    """The median time of some calls, after one that is not counted."""
    way()
    return statistics.median(seconds_of(way, device) for _ in range(turns))


def in_turns(
    ways: dict[str, Callable[[], Found]], turns: int, progress: Callable[[Found], str] | None = None
) -> dict[str, list[Found]]:
    """What each way gives in each turn; in a turn all ways run, one after the other.

    Args:
        progress: words about a result, to print as it comes.
    """
    found: dict[str, list[Found]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            found[name].append(way())
            if progress:
                print(f"{name}: {progress(found[name][-1])}", file=sys.stderr, flush=True)
    return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    """The median of each way's turns."""
    return {name: statistics.median(values) for name, values in found.items()}


def over(speeds: dict[str, float], first: str) -> dict[str, float]:
    """How many times as fast as the first the others are."""
    return {name: speed / speeds[first] for name, speed in speeds.items() if name != first}


def in_processes(function: Callable[..., Found], *calls: tuple[Any, ...]) -> list[Found]:
    """What a function gives for each tuple of arguments, all at once, each in a new process."""
    with ProcessPoolExecutor(len(calls), multiprocessing.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(function, *arguments) for arguments in calls]]


def report(figures: dict[str, Any], options: Any, device: torch.device | None = None) -> None:
    """Print figures as JSON, with the device, the version and the options."""
    cuda = (device or find_device()).type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({**figures, **machine, "options": vars(options)}, indent=1, default=str))


def speech(start: float, seconds: float) -> torch.Tensor:
    """Part of the repository's prompt, repeated without end: a waveform [n] at :data:`SPEECH_RATE`."""
    import soundfile

    prompt, rate = soundfile.read(ROOT / "assets" / "prompt.flac", dtype="float32")
    places = torch.arange(round(start * rate), round((start + seconds) * rate)) % len(prompt)
    return torch.from_numpy(prompt)[places]


def write_audio_table(path: Path, columns: dict[str, Iterable[torch.Tensor]], rate: int, **audio_format: str) -> None:
    """A parquet file whose columns hold waveforms [n], in a format of soundfile, FLAC by default."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import soundfile

    def encoded(waveform: torch.Tensor) -> dict[str, Any]:
        file = io.BytesIO()
        soundfile.write(file, waveform.numpy(), rate, **(audio_format or {"format": "FLAC"}))
        return {"bytes": file.getvalue(), "path": None}

    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = {name: pa.array(map(encoded, waveforms), audio) for name, waveforms in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), path, row_group_size=100)

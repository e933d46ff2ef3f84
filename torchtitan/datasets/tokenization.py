"""Turn a data set into shards of codes, once, ahead of training.

The unit of work is a shard: a run of consecutive rows in the source's own order, so that what a shard holds depends on
the source and ``rows_per_shard`` alone. Shards are shared out among worker processes, or among the ranks of torchrun.
Within a shard, every :data:`PART_ROWS` rows are written as a part; a run that is stopped or killed, wherever that is,
continues after its last part, with any number of processes, and ends with the same bytes. Codes are those of a lone
``Codec.encode`` of the whole recording; on a GPU, where equal clips in other batches may differ in a rare code,
batches are a function of the rows' places too.

A recording that cannot be used is named in its shard and in ``failed_rows.tsv``, and never ends the run.
"""

import ctypes
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torchtitan.audio.codec import FRAME_RATE, Codec, CodecError
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError
from torchtitan.datasets.decoding import decode_row
from torchtitan.datasets.readers import AudioDataset, DatasetIndex, Row, index_files
from torchtitan.datasets.shards import (
    FORMAT,
    Recording,
    ShardError,
    WriteError,
    merge_parts,
    read_part,
    shard_name,
    write_atomically,
    write_part,
)
from torchtitan.datasets.sources import ALIASES, SOURCES, Source, find_files, sources_from_config
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import quiet_transformers
from torchtitan.tools.memory import tune_malloc

PART_ROWS = 128
SETTINGS_FILE = "tokenization.json"
FAILED_FILE = "failed_rows.tsv"
# A data set of which too much fails is not the one that was meant; a few rows at the start prove nothing.
BAD_SHARE_ROWS = 1000
# What the codec is given at a time on a GPU, and what may lie decoded ahead of it, in seconds of audio.
GPU_GROUP_SECONDS = 1280
AHEAD_SECONDS = {"cpu": 120.0, "cuda": 2 * 1280.0, "mps": 600.0}
# Without a header, a recording is taken to be as long as FLAC of speech of its size.
_BYTES_PER_SECOND = 16_000
_LOG_SECONDS = 10.0
_SEND_SECONDS = 0.2
CONTINUE = "run the same command again to continue"


@dataclass
class Options:
    """Turn a data set into shards of codes, which training reads instead of the recordings."""

    dataset: str
    """A built-in data set, a local folder or file, or a hub id."""
    output: str
    """Folder to write."""
    dataset_path: str | None = None
    """Where a built-in data set lies: a folder of its layout, or another hub id."""
    split: str | None = None
    """Split to take, if the files tell splits; train by default."""
    source_file: str | None = None
    """Settings file (TOML) of a training; dataset is then the name or path of one of its [[training.source]] tables."""
    audio_tokenizer: str = "kyutai/mimi"
    """Codec: hub name or local folder."""
    num_quantizers: int = 8
    """Codebooks to store; models may use fewer."""
    codec_padding: str = "exact"
    """How a clip ends: exact or aligned."""
    codec_window: str = "codec"
    """The codec's attention window: codec or full."""
    resampler: str = "torchaudio"
    """How recordings become 24 kHz: torchaudio, soxr_hq or ffmpeg."""
    num_processes: int | None = None
    """Processes; by default one a CPU core, or one a GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    max_seconds: float | None = None
    """Encode only this much from the start of each recording; all of it by default."""
    rows_per_shard: int = 4096
    """Rows of the source in a shard."""
    max_bad_share: float = 0.2
    """Stop when more than this share of the rows cannot be used."""


@dataclass(frozen=True)
class Plan:
    """What the workers need to know.

    Attributes:
        header: what the headers of all shards have in common.
    """

    source: Source
    index: DatasetIndex
    output: Path
    audio_tokenizer: str
    num_quantizers: int
    padding: str
    window: str
    max_seconds: float | None
    rows_per_shard: int
    max_bad_share: float
    num_rows: int
    header: dict[str, Any]
    rows_per_part: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """Numbers of a shard's rows in the source."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def part_rows(self, shard: int, part: int) -> range:
        """Numbers of the rows of a part of a shard."""
        return self.rows(shard)[part * self.rows_per_part : (part + 1) * self.rows_per_part]

    def num_parts(self, shard: int) -> int:
        return -(-len(self.rows(shard)) // self.rows_per_part)

    def shard_path(self, shard: int) -> Path:
        return self.output / shard_name(shard, self.num_shards)

    def partial_folder(self, shard: int) -> Path:
        return self.shard_path(shard).with_suffix(".partial")

    def part_path(self, shard: int, part: int) -> Path:
        # Not .arrow: an unfinished folder must not be taken for a data set of Arrow files.
        return self.partial_folder(shard) / f"part-{part:04d}"


@dataclass
class Counts:
    """What became of rows: all of them, those that failed, those that the source's limits leave out."""

    rows: int = 0
    failed: int = 0
    left_out: int = 0
    recordings: int = 0
    seconds: float = 0.0
    frames: int = 0

    def add(self, other: "Counts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


# --- before the work


def find_source_of(options: Options) -> Source:
    """The source that the options mean.

    Raises:
        UserError: there is none of that name.
    """
    if options.source_file:
        from torchtitan.config_manager import ConfigManager

        config = ConfigManager().parse_args(["--job.config_file", options.source_file])
        sources = sources_from_config(config.training)
        chosen = [source for source in sources if options.dataset in (source.name, source.path)]
        if len(chosen) != 1:
            names = ", ".join(source.name for source in sources)
            raise UserError(
                f"{options.source_file}: dataset {options.dataset!r} must be one of its sources, which are {names}."
            )
        return chosen[0]
    built_in = options.dataset in SOURCES or options.dataset in ALIASES
    table = {"name" if built_in else "path": options.dataset}
    if options.dataset_path:
        if not built_in:
            raise UserError(f"dataset_path is for built-in data sets; give {options.dataset_path} as the dataset.")
        table["path"] = options.dataset_path
    if options.split:
        table["split"] = options.split
    return sources_from_config(SimpleNamespace(source=[table]))[0]


def check_options(options: Options) -> None:
    """Raise UserError for values that can mean nothing."""
    if options.rows_per_shard < 1:
        raise UserError(f"rows_per_shard must be at least 1, not {options.rows_per_shard}.")
    if options.num_processes is not None and options.num_processes < 1:
        raise UserError(f"num_processes must be at least 1, not {options.num_processes}.")
    if not 0 <= options.max_bad_share <= 1:
        raise UserError(f"max_bad_share must be a share, 0 to 1, not {options.max_bad_share}.")
    if options.max_seconds is not None and not options.max_seconds > 0:
        raise UserError(f"max_seconds must be more than 0, not {options.max_seconds}.")


def prepare(options: Options) -> Plan:
    """Look at the data, the codec and the output folder, and write down the settings.

    Raises:
        UserError: any of the three is not usable, or the folder holds a tokenization with other settings.
    """
    check_options(options)
    output = Path(options.output).expanduser()
    source = find_source_of(options)
    index = index_files(source, find_files(source), progress=sys.stderr.isatty())
    num_rows = len(AudioDataset(source, index))
    codec = Codec.load(
        options.audio_tokenizer,
        options.num_quantizers,
        options.codec_padding,
        options.codec_window,
        resampler=options.resampler,
    )
    # Where a local copy of the data lies is no fact about them.
    local = Path(source.path).expanduser().exists()
    described = {key: value for key, value in asdict(source).items() if value not in (None, (), "")}
    for key in ("weight", "hours", "licence", "download", *(["path"] if local else [])):
        described.pop(key, None)
    header = {
        "format": FORMAT,
        "audio_tokenizer": options.audio_tokenizer,
        "codec_fingerprint": codec.fingerprint(),
        "revision": codec.revision,
        "codec_padding": options.codec_padding,
        "codec_window": options.codec_window,
        "num_quantizers": options.num_quantizers,
        "resampler": options.resampler,
        "sample_rate": SAMPLE_RATE,
        "frame_rate": FRAME_RATE,
        "source": described,
        "data_fingerprint": index.fingerprint,
        "max_seconds": options.max_seconds,
        "rows_per_shard": options.rows_per_shard,
    }
    header = json.loads(json.dumps(header))
    header = _agree(output, header)
    plan = Plan(
        source=source,
        index=index,
        output=output,
        audio_tokenizer=options.audio_tokenizer,
        num_quantizers=options.num_quantizers,
        padding=options.codec_padding,
        window=options.codec_window,
        max_seconds=options.max_seconds,
        rows_per_shard=options.rows_per_shard,
        max_bad_share=options.max_bad_share,
        num_rows=num_rows,
        header=header,
        rows_per_part=PART_ROWS,
    )
    if not (output / SETTINGS_FILE).exists():
        _write_settings(plan, None)
    return plan


def _agree(output: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The header to use: that of the tokenization in the folder, if there is one that may be continued."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(13, "Permission denied")
        path = output / SETTINGS_FILE
        shards = sorted(output.glob("codes-*"))  # looked for first: another rank writes the settings before any
        if not path.exists():
            if shards:
                raise UserError(f"{output}: {shards[0].name} lies there without {SETTINGS_FILE}; give another output.")
            return header
        stored = json.loads(path.read_text())["settings"]
    except OSError as error:
        raise UserError(f"{output}: this folder cannot be written to ({error.strerror or error}).") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{output / SETTINGS_FILE}: the file is damaged; remove the folder or give another output."
        ) from None
    # The codec is known by its weights: its name, or its commit, may be another one.
    named = ("audio_tokenizer", "revision")
    wrong = [key for key in header if key not in named and stored.get(key) != header[key]]
    if wrong:
        told = [
            f"{key} is {json.dumps(stored.get(key))} there and {json.dumps(header[key])} now"
            for key in wrong
            if key not in ("codec_fingerprint", "data_fingerprint")
        ]
        if "codec_fingerprint" in wrong and "num_quantizers" not in wrong:
            told.append(f"the codec {header['audio_tokenizer']} has other weights than {stored.get('audio_tokenizer')}")
        if "data_fingerprint" in wrong:
            told.append("the data are others (names of files, or numbers of rows)")
        raise UserError(
            f"{output}: it holds a tokenization with other settings: {', and '.join(told)}; give another output, or "
            "the same settings to continue."
        )
    return stored


def _write_settings(plan: Plan, totals: dict[str, Any] | None) -> None:
    content = {
        "settings": plan.header,
        "files": len(plan.index.files),
        "rows": plan.num_rows,
        "shards": plan.num_shards,
        "totals": totals,
    }
    _write_text(plan.output / SETTINGS_FILE, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write a file unless it says that already."""
    data = text.encode(errors="replace")
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, lambda file: file.write(data))


def _remove_stale_files(plan: Plan) -> None:
    """Remove what killed processes of this machine left: temporary files, and parts of shards that are done."""
    lead = f"{socket.gethostname()}-"
    for path in [*plan.output.glob(".*.tmp"), *plan.output.glob("codes-*.partial/.*.tmp")]:
        process = path.name.removesuffix(".tmp").rpartition(lead)[2]
        if process.isdigit() and not _is_running(int(process)):
            path.unlink(missing_ok=True)
    for folder in plan.output.glob("codes-*.partial"):
        if folder.with_suffix(".arrow").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _count(path: Path, num_rows: int) -> Counts:
    """What a shard or part holds."""
    batches, header = read_part(path)
    return Counts(
        rows=num_rows,
        failed=len(header["failed"]),
        left_out=header["left_out"],
        recordings=sum(batch.num_rows for batch in batches),
        seconds=sum(float(batch.column("seconds").to_numpy().sum()) for batch in batches),
        frames=sum(int(batch.column("frames").to_numpy().sum(dtype="int64")) for batch in batches),
    )


def _is_whole(part: Path) -> bool:
    if not part.exists():
        return False
    try:
        read_part(part)
    except ShardError:
        part.unlink(missing_ok=True)
        return False
    return True


def survey(plan: Plan, shards: Sequence[int]) -> tuple[Counts, list[int]]:
    """What is done already, and the shards that are not. Damaged parts are removed, so that they are made again."""
    done, missing = Counts(), []
    for shard in shards:
        path = plan.shard_path(shard)
        if path.exists():
            try:
                done.add(_count(path, len(plan.rows(shard))))
            except ShardError as error:
                hint = "remove it and run the same command again to make it anew"
                raise UserError(f"{str(error).rstrip('.')}; {hint}.") from None
            continue
        missing.append(shard)
        for part in range(plan.num_parts(shard)):
            path = plan.part_path(shard, part)
            if _is_whole(path):
                with suppress(ShardError):  # merged by another process in between
                    done.add(_count(path, len(plan.part_rows(shard, part))))
    return done, missing


# --- the work of a process


@dataclass
class _Decoded:
    """A row that was decoded, or why it was not: ``error``; neither if the source's limits leave it out."""

    key: str
    text: str | None
    seconds: float = 0.0
    waveform: torch.Tensor | None = None
    error: str | None = None


@dataclass
class _Ahead:
    """A row on its way: ``seconds`` of audio are expected at first, and known once it is decoded."""

    seconds: float
    result: "Future[_Decoded]" = field(default_factory=Future)


class Decoder:
    """Reads and decodes rows in threads, ahead of whoever takes them.

    Args:
        data: the rows.
        max_seconds: where recordings are cut.
        threads: that decode.
        ahead_seconds: how much audio may wait to be taken. A recording that alone is longer waits alone.
        resampler: one of :data:`~torchtitan.audio.waveform.RESAMPLERS`.
    """

    def __init__(
        self,
        data: AudioDataset,
        max_seconds: float | None,
        threads: int,
        ahead_seconds: float,
        resampler: str = "torchaudio",
    ):
        self.data, self.max_seconds, self.threads, self.ahead_seconds = data, max_seconds, threads, ahead_seconds
        self.resampler = resampler

    def __call__(self, numbers: Sequence[int]) -> Iterator[_Decoded]:
        """The rows of ascending numbers, in order."""
        waiting: deque[_Ahead | BaseException | None] = deque()  # None: there are no more
        changed = threading.Condition()
        stopped = False

        def room_for(seconds: float) -> bool:
            rows = [item for item in waiting if isinstance(item, _Ahead)]
            held = sum(item.seconds for item in rows)
            return not rows or (len(rows) < 2 * PART_ROWS and held + seconds <= self.ahead_seconds)

        def put(item: _Ahead | BaseException | None) -> None:
            with changed:
                waiting.append(item)
                changed.notify_all()

        def decode(row: Row, item: _Ahead) -> None:
            try:
                decoded = self._decode(row)
                with changed:
                    item.seconds = 0.0 if decoded.waveform is None else decoded.waveform.numel() / SAMPLE_RATE
                    changed.notify_all()
                item.result.set_result(decoded)
            except BaseException as error:
                item.result.set_exception(error)

        def read() -> None:
            try:
                for _, row in self.data.read(numbers):
                    item = _Ahead(self._expected_seconds(row))
                    with changed:
                        changed.wait_for(lambda item=item: stopped or room_for(item.seconds))
                        if stopped:
                            return
                    put(item)
                    pool.submit(decode, row, item)
                put(None)
            except BaseException as error:  # raised again where the rows are taken
                put(error)

        pool = ThreadPoolExecutor(self.threads, "decode")
        reader = threading.Thread(target=read, name="read", daemon=True)
        reader.start()
        try:
            while True:
                with changed:
                    changed.wait_for(lambda: len(waiting) > 0)
                    item = waiting[0]
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                decoded = item.result.result()
                with changed:
                    waiting.popleft()
                    changed.notify_all()
                yield decoded
        finally:
            with changed:
                stopped = True
                changed.notify_all()
            pool.shutdown(wait=False, cancel_futures=True)

    def _expected_seconds(self, row: Row) -> float:
        seconds = row.seconds
        if seconds is None and row.audio is not None:
            try:
                size = os.path.getsize(row.audio) if isinstance(row.audio, str) else row.size
            except OSError:
                size = 0
            seconds = size / _BYTES_PER_SECOND
        return min(seconds or 0.0, self.max_seconds or math.inf)

    def _decode(self, row: Row) -> _Decoded:
        source = self.data.source
        decoded = _Decoded(_storable(relative(row.key, source)), row.text and _storable(row.text))
        if row.error is not None or source.admits(row.seconds):
            try:
                waveform, whole = decode_row(row, self.max_seconds, self.data.retries, self.resampler)
                cut = self.max_seconds is not None and waveform.numel() >= round(self.max_seconds * SAMPLE_RATE)
                decoded.seconds = max(waveform.numel() / SAMPLE_RATE, whole if cut else 0.0)
                if source.admits(decoded.seconds):
                    decoded.waveform = waveform
            except AudioError as error:
                decoded.error = _storable(relative(str(error), source))
        return decoded


def _storable(text: str) -> str:
    """A text without what UTF-8 cannot hold: file names need not be text, and JSON may hold half a character."""
    return text.encode(errors="replace").decode()


def relative(text: str, source: Source) -> str:
    """A row's key or a message, with paths relative to the source's root."""
    root = os.path.expanduser(source.path).rstrip("/")
    if os.path.isfile(root):
        root = os.path.dirname(root) or "."
    # A path begins a word, or it is the end of a longer one.
    on_hub = rf"hf://datasets/{re.escape(source.path)}(@[^/]*)?/"
    return re.sub(rf"(?<![^\s'\"(])({re.escape(root)}/|{on_hub})", "", text)


class ShardTokenizer:
    """Makes parts and shards in one process.

    Args:
        plan: what to make.
        device: of the codec.
        threads: that decode.
        report: told the rows as they are done, then, in place of them, the parts as they are written.
    """

    def __init__(self, plan: Plan, device: torch.device, threads: int, report: "Callable[[str, Counts], None]"):
        self.plan, self.device, self.report = plan, device, report
        settings = (plan.audio_tokenizer, plan.num_quantizers, plan.padding, plan.window)
        self.codec = Codec.load(*settings, device, resampler=plan.header["resampler"])
        ahead = AHEAD_SECONDS.get(device.type, 120.0)
        data = AudioDataset(plan.source, plan.index)
        self.decoder = Decoder(data, plan.max_seconds, threads, ahead, self.codec.resampler)

    def make_parts(self, shard: int, parts: Sequence[int]) -> None:
        """Write those of a shard's parts that are not there."""
        plan = self.plan
        try:
            plan.partial_folder(shard).mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"{plan.output}: this folder cannot be written to ({error.strerror or error}).") from None
        missing = [part for part in parts if not _is_whole(plan.part_path(shard, part))]
        numbers = [number for part in missing for number in plan.part_rows(shard, part)]
        decoded = self.decoder(numbers)
        try:
            for part in missing:
                self._make_part(shard, part, decoded)
        finally:
            decoded.close()  # type: ignore[attr-defined]

    def merge(self, shard: int) -> None:
        """Make a shard of its parts, all of which are there."""
        plan = self.plan
        import transformers

        rows = plan.rows(shard)
        header = {
            **plan.header,
            "shard": shard,
            "of": plan.num_shards,
            "rows": [rows.start, rows.stop],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        parts = [plan.part_path(shard, part) for part in range(plan.num_parts(shard))]
        merge_parts(parts, plan.shard_path(shard), header)
        shutil.rmtree(plan.partial_folder(shard), ignore_errors=True)

    def _make_part(self, shard: int, part: int, rows: Iterator[_Decoded]) -> None:
        counts = Counts(rows=len(self.plan.part_rows(shard, part)))
        recordings: list[Recording] = []
        failed: list[tuple[str, str]] = []
        for group in self._groups(rows, counts.rows):
            done = Counts(rows=len(group))
            codes = self._encode([row for row in group if row.waveform is not None])
            for row in group:
                found = codes.get(id(row), row.error)
                if isinstance(found, torch.Tensor):
                    # uint16 [T, Q]
                    frames = found.T.contiguous().to(torch.int16).numpy().view("uint16")
                    recordings.append(Recording(row.key, frames, row.seconds, row.text, self.plan.source.name))
                    done.recordings += 1
                    done.seconds += row.seconds
                    done.frames += len(frames)
                elif found is None:
                    done.left_out += 1
                else:
                    failed.append((row.key, found))
                    done.failed += 1
            self.report("rows", done)
            done.rows = 0
            counts.add(done)
        header = {"failed": failed, "left_out": counts.left_out}
        write_part(self.plan.part_path(shard, part), recordings, header)
        self.report("part", counts)

    def _groups(self, rows: Iterator[_Decoded], number: int) -> Iterator[list[_Decoded]]:
        """The next ``number`` rows in groups that are encoded together: one by one on a CPU, where it costs nothing."""
        group: list[_Decoded] = []
        seconds = 0.0
        for _ in range(number):
            row = next(rows)
            group.append(row)
            seconds += 0.0 if row.waveform is None else row.waveform.numel() / SAMPLE_RATE
            if self.device.type == "cpu" or seconds >= GPU_GROUP_SECONDS:
                yield group
                group, seconds = [], 0.0
        if group:
            yield group

    def _encode(self, rows: list[_Decoded]) -> dict[int, torch.Tensor | str]:
        """Codes [Q, T] of each row, or why it has none, by the row's id()."""
        waveforms = [row.waveform for row in rows if row.waveform is not None]
        try:
            return {id(row): codes for row, codes in zip(rows, self.codec.encode(waveforms), strict=True)}
        except Exception as error:  # one recording is to blame: find out which
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # raises where the GPU itself has failed
            if len(rows) == 1:
                reason = str(error) if isinstance(error, CodecError) else f"{type(error).__name__}: {error}"
                return {id(rows[0]): f"its audio cannot be encoded ({reason.splitlines()[0].rstrip('.')})."}
        return {key: found for row in rows for key, found in self._encode([row]).items()}


# --- many processes


class Progress:
    """How far all processes are: a bar on a terminal, else a line now and then.

    Raises UserError from :meth:`report` when too large a share of the rows fails.
    """

    def __init__(self, plan: Plan, done: Counts, rows: int):
        self.plan, self.total = plan, rows
        self.shown, self.written = replace(done), replace(done)
        self._at_start = replace(done)
        self._begin = self._told = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=rows, initial=done.rows, desc=plan.source.name, unit=" rows", dynamic_ncols=True)

    def report(self, kind: str, counts: Counts) -> None:
        """Take note of rows that are done, or of a part that is written."""
        if kind == "part":
            self.written.add(counts)
            check_share(self.plan, self.written, BAD_SHARE_ROWS)
            return
        self.shown.add(counts)
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts(), refresh=False)
            self._bar.update(counts.rows)
        elif time.monotonic() - self._told >= _LOG_SECONDS:
            self._told = time.monotonic()
            rows = self.shown.rows
            rate = (rows - self._at_start.rows) / (self._told - self._begin)
            left = f"{timedelta(seconds=round((self.total - rows) / rate))} left" if rate else "time left unknown"
            share = f"{rows:,} of {self.total:,} rows ({100 * rows / self.total:.1f} %)"
            print(f"{self.plan.source.name}: {share}, {self._facts()}, {left}", file=sys.stderr, flush=True)

    def speed(self) -> float:
        """Seconds of audio a second, since this run began."""
        return (self.shown.seconds - self._at_start.seconds) / max(1e-9, time.monotonic() - self._begin)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _facts(self) -> str:
        facts = f"{self.shown.seconds / 3600:.2f} h of audio, {self.speed():.0f} s of it a second"
        return facts + f", {self.shown.failed:,} failed"


def check_share(plan: Plan, counts: Counts, at_least: int) -> None:
    """Raise UserError if more than the accepted share of the rows failed, once there are ``at_least`` rows."""
    if counts.rows >= at_least and counts.failed > plan.max_bad_share * counts.rows:
        write_failed_rows(plan)
        raise UserError(
            f"{plan.source.path}: {counts.failed:,} of the first {counts.rows:,} rows cannot be used, more than "
            f"max_bad_share {plan.max_bad_share:g} accepts; {plan.output / FAILED_FILE} lists them."
        )


def _work(plan: Plan, device: torch.device, threads: int, channel: Any) -> None:
    """A worker process: does the jobs that the parent sends."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others.
    signal.signal(signal.SIGTERM, _exit_cleanly)
    shown = Counts()
    sent = time.monotonic()

    def report(kind: str, counts: Counts) -> None:
        nonlocal shown, sent
        if kind == "rows":
            shown.add(counts)
        if kind == "part" or time.monotonic() - sent >= _SEND_SECONDS:
            channel.send(("rows", shown))
            shown, sent = Counts(), time.monotonic()
        if kind == "part":
            channel.send((kind, counts))

    try:
        _settle(device)
        worker = ShardTokenizer(plan, device, threads, report)
        channel.send(("idle", None))
        while True:
            shard, parts = channel.recv()
            if parts is None:
                worker.merge(shard)
            else:
                worker.make_parts(shard, parts)
            channel.send(("idle", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return
    except UserError as error:
        channel.send(("unwritable" if isinstance(error, WriteError) else "error", str(error)))
    except Exception:
        channel.send(("crash", traceback.format_exc()))


def _settle(device: torch.device) -> None:
    """Make the process one that shares its machine with others of its kind."""
    quiet_transformers()
    tune_malloc()
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _die_with_parent() -> None:
    """Have the system end this process with its parent, however that ends."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _exit_cleanly(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the main thread as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit_cleanly)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Jobs:
    """What is still to do: (shard, parts to make), and (shard, None) to merge one whose parts are all there."""

    def __init__(self, plan: Plan, shards: Sequence[int], num_processes: int):
        # With few shards, each is worked at by several, so that all processes have work up to the end.
        pieces = -(-4 * num_processes // max(1, len(shards)))
        self._waiting: deque[tuple[int, list[int] | None]] = deque()
        self._unfinished: dict[int, int] = {}
        for shard in shards:
            parts = [p for p in range(plan.num_parts(shard)) if not plan.part_path(shard, p).exists()]
            size = max(1, -(-len(parts) // pieces))
            runs = [parts[i : i + size] for i in range(0, len(parts), size)] or [[]]
            self._waiting.extend((shard, run) for run in runs)
            self._unfinished[shard] = len(runs)
        self.largest = len(self._waiting)

    def next(self) -> tuple[int, list[int] | None] | None:
        return self._waiting.popleft() if self._waiting else None

    def done(self, job: tuple[int, list[int] | None]) -> None:
        shard, parts = job
        if parts is not None:
            self._unfinished[shard] -= 1
            if self._unfinished[shard] == 0:
                self._waiting.appendleft((shard, None))


@dataclass
class _Worker:
    number: int
    process: Any
    channel: Any
    job: tuple[int, list[int] | None] | None = None
    idle: bool = False


def run_processes(plan: Plan, shards: Sequence[int], devices: Sequence[torch.device], progress: Progress) -> None:
    """Make shards with one process for each of the devices.

    Raises:
        UserError: a process died, the output cannot be written, or too many rows fail; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    jobs = _Jobs(plan, shards, len(devices))
    workers: list[_Worker] = []
    try:
        for number, device in enumerate(devices[: jobs.largest]):
            ours, theirs = context.Pipe()
            arguments = (plan, device, _decoding_threads(device, len(devices)), theirs)
            process = context.Process(target=_work, args=arguments, name=f"tokenizer {number}", daemon=True)
            process.start()
            theirs.close()  # or else the end of the process would not end the channel
            workers.append(_Worker(number, process, ours))
        while True:
            for worker in workers:
                if worker.idle and (job := jobs.next()) is not None:
                    worker.job, worker.idle = job, False
                    with suppress(OSError):  # a dead one is noticed below
                        worker.channel.send(job)
            if all(worker.idle for worker in workers):
                return
            for ready in connection.wait([worker.channel for worker in workers]):
                worker = next(worker for worker in workers if worker.channel is ready)
                _receive(plan, worker, jobs, progress)
    finally:
        _end(workers)


def _receive(plan: Plan, worker: _Worker, jobs: _Jobs, progress: Progress) -> None:
    """Take one message of a worker. Raises UserError where it is the last."""
    try:
        kind, content = worker.channel.recv()
    except (EOFError, OSError):
        raise UserError(_obituary(plan, worker)) from None
    if kind in ("error", "unwritable"):
        raise (WriteError if kind == "unwritable" else UserError)(content)
    if kind == "crash":
        raise RuntimeError(f"worker process {worker.number} failed:\n{content}")
    if kind == "idle":
        if worker.job is not None:
            jobs.done(worker.job)
        worker.job, worker.idle = None, True
    else:
        progress.report(kind, content)


def _obituary(plan: Plan, worker: _Worker) -> str:
    worker.process.join(10)
    code = worker.process.exitcode
    if code is not None and code < 0:
        with suppress(ValueError):
            code = signal.Signals(-code).name
        how = f"was ended by {code}"
        if code == "SIGKILL":
            how += ", perhaps for lack of memory"
    else:
        how = f"ended with exit code {code}"
    place = "before its first shard" if worker.job is None else f"at {plan.shard_path(worker.job[0]).name}"
    return (
        f"worker process {worker.number} (pid {worker.process.pid}) {how}, {place}; nothing finished is lost: "
        f"{CONTINUE}."
    )


def _end(workers: list[_Worker]) -> None:
    """End the processes: those that wait for a job, which have nothing to tidy up, at once."""
    for worker in workers:
        if worker.idle:
            worker.process.kill()
        elif worker.process.is_alive():
            worker.process.terminate()
    deadline = time.monotonic() + 10
    for worker in workers:
        worker.process.join(max(0.1, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.channel.close()


def _decoding_threads(device: torch.device, num_processes: int) -> int:
    """Threads of one process: a codec on a CPU takes most of its core, one on a GPU leaves the cores to them."""
    return 1 if device.type == "cpu" else max(1, min(8, _num_cores() // max(1, num_processes)))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- the whole


def choose_devices(name: str, num_processes: int | None, local_rank: int | None = None) -> list[torch.device]:
    """The device of each process.

    Raises:
        UserError: the name is unknown, or there is no such device here.
    """
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if num_gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}.") from None
    available = {"cpu": 1, "cuda": num_gpus, "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        raise UserError(f"device {name!r} is not available on this machine; cpu always is.")
    if device.type == "cuda" and device.index is None:
        if local_rank is not None:
            return [torch.device("cuda", local_rank % num_gpus)]
        return [torch.device("cuda", number % num_gpus) for number in range(num_processes or num_gpus)]
    if local_rank is not None:
        return [device]
    return [device] * (num_processes or (_num_cores() if device.type == "cpu" else 1))


def write_failed_rows(plan: Plan) -> None:
    """Write the list of rows and files that could not be used, of all that is there so far."""
    lines = [(relative(path, plan.source), relative(reason, plan.source)) for path, reason in plan.index.bad_files]
    for shard in range(plan.num_shards):
        if plan.shard_path(shard).exists():
            paths = [plan.shard_path(shard)]
        else:
            paths = [p for i in range(plan.num_parts(shard)) if (p := plan.part_path(shard, i)).exists()]
        for path in paths:
            with suppress(ShardError):  # merged by another process in between
                lines += [(key, reason) for key, reason in read_part(path)[1]["failed"]]
    text = "".join("\t".join(" ".join(part.split()) for part in line) + "\n" for line in sorted(lines))
    _write_text(plan.output / FAILED_FILE, text)


def finish(plan: Plan) -> str | None:
    """Write totals and failed rows once all shards are there; a sentence about them, or None if some are missing.

    Raises:
        UserError: too many rows failed.
    """
    counts, missing = survey(plan, range(plan.num_shards))
    if missing:
        return None
    write_failed_rows(plan)
    check_share(plan, counts, 1)
    totals = {
        "recordings": counts.recordings,
        "hours": counts.seconds / 3600,
        "frames": counts.frames,
        "failed": counts.failed,
        "left_out": counts.left_out,
        "bad_files": len(plan.index.bad_files),
    }
    _write_settings(plan, totals)
    told = (
        f"{plan.output}: {plan.num_shards:,} shards hold {counts.recordings:,} recordings, "
        f"{counts.seconds / 3600:,.2f} h, {counts.frames:,} frames of {plan.num_quantizers} codes"
    )
    if counts.left_out:
        told += f"; {counts.left_out:,} rows are shorter or longer than the source's limits"
    if counts.failed or plan.index.bad_files:
        files = f" and {len(plan.index.bad_files):,} files" if plan.index.bad_files else ""
        told += f"; {counts.failed:,} rows{files} could not be used and are listed in {FAILED_FILE}"
    return told + "."


def tokenize(options: Options) -> str:
    """Do all of it, or what is left of it.

    Returns:
        what to tell at the end, in a sentence.

    Raises:
        UserError: something in the way that its message names; nothing finished is lost.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if ranked and (options.num_processes or 1) > 1:
        raise UserError("num_processes is for runs without torchrun, whose ranks are the processes.")
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if ranked else None
    devices = choose_devices(options.device, options.num_processes, local_rank)
    quiet_transformers()
    plan = prepare(options)
    _remove_stale_files(plan)
    shards = range(rank, plan.num_shards, world_size) if ranked else range(plan.num_shards)
    done, missing = survey(plan, shards)
    if not missing and (told := finish(plan)):
        return f"all was done already. {told}"
    progress = Progress(plan, done, sum(len(plan.rows(shard)) for shard in shards))
    try:
        with _terminable():
            if len(devices) == 1:
                _settle(devices[0])
                threads = _decoding_threads(devices[0], world_size if ranked else 1)
                worker = ShardTokenizer(plan, devices[0], threads, progress.report)
                for shard in missing:
                    worker.make_parts(shard, range(plan.num_parts(shard)))
                    worker.merge(shard)
            else:
                run_processes(plan, missing, devices, progress)
    except (KeyboardInterrupt, SystemExit):
        progress.close()
        print(f"stopped; nothing finished is lost: {CONTINUE}.", file=sys.stderr)
        raise
    except WriteError as error:
        raise UserError(f"{str(error).rstrip('.')}; nothing finished is lost: {CONTINUE}.") from None
    finally:
        progress.close()
    told = finish(plan) or f"{plan.output}: rank {rank} is done, others are not yet."
    return f"{told} {progress.speed():.0f} s of audio a second."

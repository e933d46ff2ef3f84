"""The work of one process: rows are read and decoded ahead, encoded, and written as parts and shards."""

import math
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from torchtitan.audio.codec import Codec, CodecError
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError
from torchtitan.datasets.decoding import decode_row
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.readers import AudioDataset
from torchtitan.datasets.rows import Row
from torchtitan.datasets.shards import (
    Recording,
    WriteError,
    merge_parts,
    write_part,
)
from torchtitan.tokenization.plan import PART_ROWS, Counts, Plan, is_whole

# What the codec is given at a time on a GPU, and what may lie decoded ahead of it, in seconds of audio.
GPU_GROUP_SECONDS = 1280
AHEAD_SECONDS = {"cpu": 120.0, "cuda": 2 * 1280.0, "mps": 600.0}
# Without a header, a recording is taken to be as long as FLAC of speech of its size.
_BYTES_PER_SECOND = 16_000


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
        decoded = _Decoded(storable(relative(row.key, source)), row.text and storable(row.text))
        if row.error is not None or source.admits(row.seconds):
            try:
                waveform, whole = decode_row(row, self.max_seconds, self.data.retries, self.resampler)
                cut = self.max_seconds is not None and waveform.numel() >= round(self.max_seconds * SAMPLE_RATE)
                decoded.seconds = max(waveform.numel() / SAMPLE_RATE, whole if cut else 0.0)
                if source.admits(decoded.seconds):
                    decoded.waveform = waveform
            except AudioError as error:
                decoded.error = storable(relative(str(error), source))
        return decoded


def storable(text: str) -> str:
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
        missing = [part for part in parts if not is_whole(plan.part_path(shard, part))]
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

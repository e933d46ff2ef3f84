"""From rows to batches of ids: decode, encode with Mimi, lay out as rows of tokens.

One background thread per rank keeps a few batches ready. It reads rows, has a small pool of threads decode and
resample them (libsndfile and torchaudio release the interpreter lock), gives the waveforms of a batch to the codec on
the training device in one call, and lays out the ids. Codes are kept in memory, so that later epochs of a small data
set and repeated validations cost no encoding.

On a GPU, where equal clips in other batches may differ in a rare code, a resumed run encodes later epochs in other
batches than one that still has their codes in memory.

The position that comes with each batch is that of the last row used in it: a checkpoint taken after a batch resumes
with the next row, whatever had been prepared ahead.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from torchtitan.audio.codec import Codec
from torchtitan.audio.token_stream import TokenStream
from torchtitan.audio.waveform import AudioError, load_audio
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.datasets.hf_dataset import HuggingFaceDataset, Position, Row
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

PREFETCH_BATCHES = 2
CACHE_BYTES = 1 << 30
# Rows of a batch are as long as its longest sample, rounded up to this.
LENGTH_MULTIPLE = 32


@dataclass
class Counters:
    """What happened to the rows of one rank so far.

    ``rows`` were read; ``bad_rows`` of them could not be used; ``cut_rows`` lost ``cut_frames`` frames because they
    did not fit the row length (audio past ``max_seconds`` is not counted, it is never encoded); ``bad_files`` could not
    be read to their end.
    """

    rows: int = 0
    bad_rows: int = 0
    cut_rows: int = 0
    cut_frames: int = 0
    bad_files: int = 0


@dataclass
class Batch:
    """Ids of one microbatch.

    Attributes:
        tokens: int64 [B, S]; S is the longest sample of the batch, rounded up.
        targets: int64 [B, S], the next id at each position, IGNORE_INDEX after a sample's last id.
        num_tokens: ids that are not padding.
        state: the loader's state after this batch.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    num_tokens: int
    state: dict[str, Any] = field(repr=False)


def collate(
    samples: list[torch.Tensor], max_length: int, fixed_length: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad samples (int64 [n], n <= max_length) to tokens and targets [B, S]."""
    longest = max(sample.numel() for sample in samples)
    length = max_length if fixed_length else min(max_length, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    tokens = torch.zeros(len(samples), length, dtype=torch.int64)
    targets = torch.full((len(samples), length), IGNORE_INDEX, dtype=torch.int64)
    for i, sample in enumerate(samples):
        tokens[i, : sample.numel()] = sample
        targets[i, : sample.numel() - 1] = sample[1:]
    return tokens, targets


class BadRows:
    """Names every row that could not be used: once in the log, once in a file."""

    def __init__(self, file: Path | None = None):
        self.file = file
        self._known: set[str] = set()

    def add(self, key: str, reason: str) -> None:
        if key in self._known:
            return
        self._known.add(key)
        logger.warning("skipped %s: %s", key, reason)
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(f"{key}\t{reason}\n")


class SpeechDataLoader:
    """Batches of one rank.

    Args:
        dataset: the rank's rows.
        stream: the token stream.
        codec: the codec, on the device that is to encode.
        tokenizer: for the text of task ``tts``; unused otherwise.
        task: ``a2a`` (audio alone) or ``tts`` (transcription, then audio).
        seq_len: longest row, in ids.
        batch_size: rows of a batch.
        max_seconds: audio after this is left out.
        num_workers: threads that decode; 0 decodes in the background thread itself.
        infinite: begin another epoch at the end of one.
        fixed_length: all batches are ``seq_len`` long, as compiled graphs want it.
        bad_rows: where unusable rows are reported.
    """

    def __init__(
        self,
        dataset: HuggingFaceDataset,
        stream: TokenStream,
        codec: Codec,
        tokenizer: Any,
        task: str,
        seq_len: int,
        batch_size: int,
        max_seconds: float,
        num_workers: int = 2,
        infinite: bool = True,
        fixed_length: bool = False,
        bad_rows: BadRows | None = None,
    ):
        self.dataset, self.stream, self.codec, self.tokenizer = dataset, stream, codec, tokenizer
        self.task, self.seq_len, self.batch_size, self.max_seconds = task, seq_len, batch_size, max_seconds
        self.num_workers, self.infinite, self.fixed_length = num_workers, infinite, fixed_length
        self.bad_rows = bad_rows or BadRows()
        self.position, self.counters = Position(), Counters()
        self._codes: dict[str, torch.Tensor] = {}
        self._codes_bytes = 0
        dataset.on_bad_file = self._bad_file

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that came with ``state``."""
        self.position, self.counters = Position(**state["position"]), Counters(**state["counters"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on, prepared ahead by a thread.

        Raises:
            UserError: a file has no audio column, or, if infinite, no row of a whole epoch could be used.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH_BATCHES)
        stopped = threading.Event()

        def put(item: Batch | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for batch in self._batches(stopped):
                    put(batch)
                put(None)
            except BaseException as error:  # raised again by the consumer
                put(error)

        thread = threading.Thread(target=produce, name="data loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _batches(self, stopped: threading.Event) -> Iterator[Batch]:
        counters = replace(self.counters)
        self.counters = counters
        cuda = self.codec.device.type == "cuda"
        side_stream = torch.cuda.stream(torch.cuda.Stream(self.codec.device)) if cuda else nullcontext()
        pool = ThreadPoolExecutor(max(1, self.num_workers), "decode")
        with side_stream, pool:
            samples: list[torch.Tensor] = []
            position = self.position
            for rows in self._groups(pool, samples, stopped):
                samples += self._encode(rows, counters)
                position = rows[-1].following
                if len(samples) == self.batch_size:
                    yield self._batch(samples, position, counters)
                    samples.clear()
            if samples and not stopped.is_set():
                yield self._batch(samples, position, counters)
            pool.shutdown(cancel_futures=True)

    def _batch(self, samples: list[torch.Tensor], position: Position, counters: Counters) -> Batch:
        tokens, targets = collate(samples, self.seq_len, self.fixed_length)
        if self.codec.device.type == "cuda":
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        state = {"position": position.to_dict(), "counters": asdict(counters)}
        return Batch(tokens, targets, sum(sample.numel() for sample in samples), state)

    def _groups(
        self, pool: ThreadPoolExecutor, samples: list[torch.Tensor], stopped: threading.Event
    ) -> Iterator[list["_PendingRow"]]:
        """Rows in groups of as many as the current batch still misses, their decoding started ahead."""
        ahead = self.batch_size + 2 * max(1, self.num_workers)
        pending: deque[_PendingRow] = deque()
        for row, following in self._rows(ahead):
            if stopped.is_set():
                return
            pending.append(_PendingRow(row, following, self._start_decoding(pool, row)))
            while len(pending) >= ahead:
                yield [pending.popleft() for _ in range(self.batch_size - len(samples))]
        while pending and not stopped.is_set():
            missing = self.batch_size - len(samples)
            yield [pending.popleft() for _ in range(min(missing, len(pending)))]

    def _rows(self, ahead: int) -> Iterator[tuple[Row, Position]]:
        """Rows of this and, if infinite, the following epochs; ``ahead`` of them may be unused so far."""
        position = self.position
        used, unused = self._num_used(), 0
        while True:
            epoch, from_start, read = position.epoch, position == Position(epoch=position.epoch), 0
            for row, following in self.dataset.epoch(position):
                read, position = read + 1, following
                yield row, following
            position = Position(epoch=epoch + 1)
            if not self.infinite:
                return
            if from_start and read == 0:
                files = ", ".join(self.dataset.files[:3]) + (", ..." if len(self.dataset.files) > 3 else "")
                raise UserError(f"the data set holds no readable row for this rank (its files: {files}).")
            used, unused = (used, unused + read) if self._num_used() == used else (self._num_used(), 0)
            if unused > ahead + read:
                raise UserError("no row of a whole epoch could be used; the log names each one's reason.")

    def _num_used(self) -> int:
        return self.counters.rows - self.counters.bad_rows

    def _start_decoding(self, pool: ThreadPoolExecutor, row: Row) -> "Future[torch.Tensor] | None":
        if row.key in self._codes:
            return None
        if self.num_workers == 0:
            future: Future[torch.Tensor] = Future()
            try:
                future.set_result(self._decode(row))
            except AudioError as error:
                future.set_exception(error)
            return future
        return pool.submit(self._decode, row)

    def _decode(self, row: Row) -> torch.Tensor:
        if row.audio is None:
            raise AudioError("the row has neither audio bytes nor a path.")
        try:
            return load_audio(row.audio, self.max_seconds, name="its audio")
        except AudioError:
            raise
        except Exception as error:  # whatever else one recording brings about must not end the run
            raise AudioError(f"its audio: cannot be decoded ({type(error).__name__}: {error}).") from None

    def _encode(self, rows: list["_PendingRow"], counters: Counters) -> list[torch.Tensor]:
        """The samples of a group of rows; those that cannot be used are reported and left out."""
        waveforms: dict[str, torch.Tensor] = {}
        reasons: dict[str, str] = {}
        for pending in rows:
            if pending.waveform is not None and pending.row.key not in self._codes:
                try:
                    waveforms[pending.row.key] = pending.waveform.result()
                except AudioError as error:
                    reasons[pending.row.key] = str(error)
        new = dict(zip(waveforms, self.codec.encode(list(waveforms.values())), strict=True)) if waveforms else {}
        samples = []
        for pending in rows:
            row = pending.row
            counters.rows += 1
            reason = reasons.get(row.key)
            if reason is None:
                codes = new[row.key] if row.key in new else self._codes[row.key].long()
                self._remember(row.key, codes)
                try:
                    samples.append(self._sample(codes, row.text, counters))
                except AudioError as error:
                    reason = str(error)
            if reason is not None:
                counters.bad_rows += 1
                self.bad_rows.add(row.key, reason)
        return samples

    def _sample(self, codes: torch.Tensor, text: str | None, counters: Counters) -> torch.Tensor:
        """Ids of one sample, cut to the row length by whole frames of audio."""
        text_ids: list[int] = []
        if self.task == "tts":
            if not isinstance(text, str) or not text.strip():
                raise AudioError("the row has no transcription, which task tts needs.")
            text_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if any(i >= self.stream.base_size for i in text_ids):
                raise AudioError("the transcription contains the name of an audio token.")
        fitting = self.stream.max_frames(self.seq_len, len(text_ids))
        if fitting < 1:
            raise AudioError(f"a transcription of {len(text_ids)} ids leaves no room for audio in {self.seq_len} ids.")
        if codes.shape[1] > fitting:
            counters.cut_rows += 1
            counters.cut_frames += codes.shape[1] - fitting
        return self.stream.sample(codes[:, :fitting], text_ids)

    def _remember(self, key: str, codes: torch.Tensor) -> None:
        if key not in self._codes and self._codes_bytes < CACHE_BYTES:
            self._codes[key] = codes.to(torch.int16)
            self._codes_bytes += 2 * codes.numel() + 200  # and the entry itself, roughly

    def _bad_file(self, path: str, reason: str) -> None:
        self.counters.bad_files += 1
        self.bad_rows.add(path, f"the rest of the file is left out: {reason}")


@dataclass
class _PendingRow:
    row: Row
    following: Position
    waveform: "Future[torch.Tensor] | None"  # None: its codes were known when it was read

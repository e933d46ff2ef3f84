"""From recordings or stored codes to rows of ids, the same rows for any number of ranks and workers.

All ranks walk through one endless order of draws (datasets/order.py). Of recordings, each rank reads, decodes and
encodes its share ahead of time, and the ranks exchange the codes, which are small (4 KB a recording); so every rank
knows all samples of a stretch of the order, packs the same rows from them, and takes its own. Codes in shards need no
exchange: each rank looks up those of its rows. A rank's threads are

    read      rows of files, a window of the order (1,024 recordings) ahead, of which a rank holds its share
    decode    ``num_workers`` threads: audio file to mono waveform at 24 kHz (libsndfile and torch release the lock)
    encode    waveforms to codes, batched by length, on the training device, on CUDA on the codec's own stream

and where nothing has to be exchanged, the last of them makes whole batches, ready for the step.

The state that comes with a batch is a place in the order: the draw with which the current packing window begins
(without packing: the next draw), and how many of that window's rows are used. Any number of ranks can go on from there.
With a window that is begun come the lengths of its samples: its rows stay the same even if a recording, unreadable for
a while, is there again, or no longer is.

Codes of recordings are kept in memory up to a limit, so that later epochs of a small data set and repeated validations
cost no encoding. On a GPU, where equal clips in other batches may differ in a rare code, a resumed run therefore can
meet other codes than one that still has them in memory; on a CPU they are the same.
"""

import math
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from torchtitan.audio.codec import FRAME_RATE, FRAME_SIZE, Codec, CodecError
from torchtitan.audio.token_stream import TokenStream, mark_ids
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError
from torchtitan.datasets.decoding import UnreadError, decode_row
from torchtitan.datasets.order import Mixture, Permutation
from torchtitan.datasets.packing import best_fit_decreasing
from torchtitan.datasets.readers import Row
from torchtitan.datasets.sources import Source
from torchtitan.datasets.streams import AudioStream, CodeItem, CodeStream
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.prefetch import prefetch

CACHE_BYTES = 1 << 30
# Rows of a batch are as long as the longest of them, rounded up to this.
LENGTH_MULTIPLE = 32
# What is prepared ahead: batches, where they are made by a thread; encoded recordings that make so many batches else.
BATCHES_AHEAD = 4
# Recordings that a GPU encodes at once, at least: fewer leave it idle.
GPU_CLIPS = 32
# Decoded audio that waits to be encoded together, at most, but for one recording. 1,000 s are 96 MB.
SECONDS_AT_ONCE = 1000.0
# Audio files that a rank holds of a window at most; what is more is read one by one when its turn comes.
WINDOW_BYTES = 1 << 30
# From so many recordings on, training.max_bad_share is looked at.
MIN_JUDGED = 1000


@dataclass
class Counters:
    """What happened to the recordings so far, on all ranks together.

    Of ``rows`` that were drawn (recordings; of split codes, pieces), ``bad_rows`` could not be used and
    ``filtered_rows`` are shorter or longer than the source admits. ``cut_rows`` lost ``cut_frames`` frames at their
    ends. ``bad_files`` could not be read to their end when the data were opened.
    """

    rows: int = 0
    bad_rows: int = 0
    filtered_rows: int = 0
    cut_rows: int = 0
    cut_frames: int = 0
    bad_files: int = 0


@dataclass
class Batch:
    """Ids of one microbatch of this rank.

    Attributes:
        tokens: int64 [B, S]; S is the length of the longest row, rounded up.
        targets: int64 [B, S], the next id at each position, IGNORE_INDEX after a sample's last id and in padding.
        num_tokens: ids that are not padding.
        num_squares: the sum of the squared lengths of the samples, which attention costs.
        state: the loader's state after this batch, on all ranks.
        positions: int64 [B, S], each id's place in its sample (padding counts from 0 again); None without packing.
        counters: what happened so far, including what was prepared with this batch.
        keys: names of the recordings, by row.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    num_tokens: int
    state: dict[str, Any] = field(repr=False)
    num_squares: int = 0
    positions: torch.Tensor | None = None
    counters: Counters = field(default_factory=Counters)
    keys: list[list[str]] = field(default_factory=list, repr=False)


class BadRows:
    """Names every recording that could not be used: once in the log, and once in a file, over resumed runs too.

    Args:
        file: lines of name, tab, reason.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self._known: set[str] = set()
        if file and file.is_file():
            self._known = {line.partition("\t")[0] for line in file.read_text(errors="replace").splitlines()}

    def add(self, key: str, reason: str) -> None:
        if key in self._known:
            return
        self._known.add(key)
        logger.warning("skipped %s: %s", key, reason)
        if self.file:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a") as file:
                    file.write(f"{key}\t{' '.join(reason.split())}\n")
            except OSError as error:  # no reason to end a run
                logger.warning("%s cannot be written (%s)", self.file, error.strerror)
                self.file = None


class Encoded(NamedTuple):
    """What a drawn recording came to.

    ``codes`` int16 [T, Q] and ``text_ids`` int32, or the ``reason`` why it cannot be used; neither if its duration is
    not admitted. Of the recording's ``whole`` frames those after ``codes`` were cut off. ``lasts`` is false where it
    could not be read, which may pass.
    """

    key: str
    codes: np.ndarray | None
    text_ids: np.ndarray
    whole: int
    reason: str | None
    lasts: bool = True


# The draws from the first to (not with) the second number, and those of them that were encoded on this rank.
Part = tuple[int, int, dict[int, Encoded]]


class Sample(NamedTuple):
    """One sample of a row: ``num_frames`` frames of ``codes`` from ``start`` on, ``length`` ids in all."""

    draw: int
    length: int
    codes: Encoded | CodeItem
    start: int
    num_frames: int
    text_ids: np.ndarray
    end: bool


class RowOfSamples(NamedTuple):
    """The samples of one row, the loader's state after it and the counters by then."""

    samples: list[Sample]
    state: dict[str, Any]
    counters: Counters


_NO_TEXT = np.empty(0, dtype=np.int32)


class SpeechDataLoader:
    """Batches of one rank.

    Args:
        streams: what to draw from.
        mixture: in which order; it is finite for validation.
        stream: the token stream.
        codec: the codec, on the device that is to encode; None if all streams are codes.
        tokenizer: for the text of tasks ``tts`` and ``asr``; unused otherwise.
        task: ``a2a`` (audio alone), ``tts`` (transcription, then audio) or ``asr`` (audio, then transcription).
        seq_len: longest row, in ids.
        batch_size: rows of a batch.
        max_seconds: a recording longer than this is cut, or split if ``split``.
        end_cut: samples end in ``</audio>`` also where their recording goes on.
        packing: several samples share a row; else each has a row of its own.
        window: samples among which rows are packed, and mixed: without packing so that the pieces of a long recording
            do not follow each other. 1 takes samples as they are drawn.
        num_workers: threads that decode; 0 decodes in the thread that encodes.
        fixed_length: all batches are ``seq_len`` long, as compiled graphs want it.
        bad_rows: where unusable recordings are reported (on rank 0).
        max_bad_share: see the config key.
        seed: of the order of packed rows.
        num_bad_files: files that could not be read, for the counters.
        group: of processes that exchange codes, over the CPU; None is the default one.
        read_retries: how often the reading of a recording's own file is tried again.
        share: this rank's number among those that see different rows, and how many these are; by default all do. The
            encoding of recordings is shared by all.
        length_multiple: rows are padded to a multiple of this.
    """

    def __init__(
        self,
        streams: Sequence[AudioStream | CodeStream],
        mixture: Mixture,
        stream: TokenStream,
        codec: Codec | None,
        tokenizer: Any,
        task: str,
        seq_len: int,
        batch_size: int,
        max_seconds: float,
        rank: int = 0,
        world_size: int = 1,
        split: bool = False,
        end_cut: bool = True,
        packing: bool = False,
        window: int = 1,
        num_workers: int = 2,
        fixed_length: bool = False,
        bad_rows: BadRows | None = None,
        max_bad_share: float = 1.0,
        seed: int = 0,
        num_bad_files: int = 0,
        group: dist.ProcessGroup | None = None,
        read_retries: int = 0,
        share: tuple[int, int] | None = None,
        length_multiple: int = LENGTH_MULTIPLE,
    ):
        self.streams, self.mixture, self.stream, self.codec, self.tokenizer = streams, mixture, stream, codec, tokenizer
        self.task, self.seq_len, self.batch_size, self.max_seconds = task, seq_len, batch_size, max_seconds
        self.rank, self.world_size, self.split, self.end_cut = rank, world_size, split, end_cut
        self.packing, self.window, self.num_workers, self.fixed_length = packing, window, num_workers, fixed_length
        self.bad_rows, self.max_bad_share, self.seed = bad_rows or BadRows(), max_bad_share, seed
        self.num_bad_files, self.group, self.read_retries = num_bad_files, group, read_retries
        self.share, self.length_multiple = share or (rank, world_size), length_multiple
        self._mark_ids = np.array([] if task == "a2a" else sorted(mark_ids(tokenizer)))
        self.max_frames = max_frames_of(max_seconds)
        self.encodes = any(isinstance(stream, AudioStream) for stream in streams)
        self._cache: dict[tuple[int, int], Encoded] = {}
        self._cache_bytes = 0
        self.load_state_dict(self.start_state())

    @staticmethod
    def start_state() -> dict[str, Any]:
        """The state before the first draw."""
        return {"draw": 0, "row": 0, "counters": asdict(Counters())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that came with ``state``, made by any number of ranks."""
        self.draw, self.row, self.counters = state["draw"], state["row"], Counters(**state["counters"])
        self.begun = state.get("window")
        self.counters.bad_files = self.num_bad_files

    def __iter__(self) -> Generator[Batch]:
        """Batches from the current state on, prepared ahead by threads.

        Where recordings are encoded by several ranks, all of them have to take the same number of batches, since each
        batch may need an exchange.

        Raises:
            UserError: no recording of a whole epoch could be used, or too many could not.
        """
        closing = threading.Event()
        parts = self._encode_parts(closing)
        if self.encodes and self.world_size > 1:
            # Exchanges happen in the thread that takes the batches, so that all collectives of a rank are in one order.
            ahead = BATCHES_AHEAD + 2 * self.window // self._draws_a_part()
            batches = self._batches(prefetch(parts, ahead, "encoder"))
        else:
            batches = prefetch(self._batches(parts), BATCHES_AHEAD, "data loader")
        try:
            for batch in batches:  # noqa: UP028 - "yield from" would close them before the rest knows
                yield batch
        finally:
            closing.set()
            batches.close()

    # --- recordings to codes: this rank's share

    def _draws_a_part(self) -> int:
        """Draws that are encoded, and exchanged, together."""
        on_gpu = self.codec is not None and self.codec.device.type == "cuda"
        return self.world_size * max(self.batch_size, GPU_CLIPS if on_gpu and self.encodes else 1)

    def _encode_parts(self, closing: threading.Event) -> Generator[Part]:
        """For one part of the order after the other: its first draw, the draw after it, this rank's encoded draws."""
        start = self.draw
        with ThreadPoolExecutor(max(1, self.num_workers), "decode") as pool:
            waiting: dict[int, Generator[_Pending]] = {}
            try:
                while stop := self._part_end(start):
                    streams, draws = self.mixture.draw(start, stop)
                    own: list[tuple[int, Iterator[_Pending]]] = []
                    for number, stream in enumerate(self.streams):
                        places = np.flatnonzero(streams == number)
                        if not isinstance(stream, AudioStream) or not places.size:
                            continue
                        if number not in waiting:
                            rows = self._read(number, stream, int(draws[places[0]]), closing)
                            waiting[number] = self._decoding(rows, pool)
                        mine = stream.order.readers(draws[places], self.world_size) == self.rank
                        own += [(start + int(place), waiting[number]) for place in places[mine]]
                    yield start, stop, self._encode(own)
                    start = stop
            finally:
                for rows in waiting.values():
                    rows.close()
                pool.shutdown(cancel_futures=True)

    def _part_end(self, start: int) -> int:
        """The draw after the part that begins at ``start``; 0 at the end of finite data."""
        stop = start + self._draws_a_part()
        if not self.mixture.finite:
            return stop
        return min(stop, len(self.mixture)) if start < len(self.mixture) else 0

    def _decoding(self, read: Iterator["_Read | None"], pool: ThreadPoolExecutor) -> Generator["_Pending"]:
        """This rank's recordings of a stream, read and decoded ahead."""
        # Whole recordings, which splitting needs, may be hours long.
        ahead = (0 if self.split else self.batch_size) + 2 * max(1, self.num_workers)
        rows = prefetch(read, ahead, "reader")
        pending: deque[_Pending] = deque()
        try:
            for found in rows:
                future = None if found is None else self._start_decoding(pool, *found)
                pending.append(_Pending(None if found is None else found[1], future))
                if len(pending) > (ahead if self.num_workers else 0):
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            rows.close()

    def _read(self, number: int, stream: AudioStream, draw: int, closing: threading.Event) -> Iterator["_Read | None"]:
        """This rank's rows of a stream from its ``draw`` on; None for one whose codes are known."""
        windows = prefetch(self._read_windows(number, stream, draw, closing), 1, "reader of windows")
        try:
            for items, rows in windows:
                for item in items:
                    if item in rows:
                        yield rows.pop(item) or next(stream.read([item]))[1:]
                    else:
                        yield None
        finally:
            windows.close()

    def _read_windows(
        self, number: int, stream: AudioStream, draw: int, closing: threading.Event
    ) -> Iterator[tuple[list[int], dict[int, "_Read | None"]]]:
        """Windows of the order: this rank's items, and the rows of those whose codes are unknown.

        A row is None where the window's audio files were too many to hold.
        """
        while not self.mixture.finite or draw < len(stream.order):
            end = stream.order.window_end(draw)
            draws = np.arange(draw, end)
            items = stream.order.items(draws[stream.order.readers(draws, self.world_size) == self.rank]).tolist()
            unknown = sorted(item for item in items if (number, item) not in self._cache)
            rows: dict[int, _Read | None] = dict.fromkeys(unknown)
            size = 0
            for item, source, row in stream.read(unknown):
                size += row.size
                if closing.is_set():
                    raise _Closing
                if size > WINDOW_BYTES:
                    break
                rows[item] = (source, row)
            yield items, rows
            draw = end

    def _start_decoding(self, pool: ThreadPoolExecutor, source: Source, row: Row) -> "Future[_Waveform]":
        if self.num_workers:
            return pool.submit(self._decode, source, row)
        future: Future[_Waveform] = Future()
        try:
            future.set_result(self._decode(source, row))
        except AudioError as error:
            future.set_exception(error)
        return future

    def _decode(self, source: Source, row: Row) -> "_Waveform":
        if row.error is None and not source.admits(row.seconds):
            return _Waveform(None, 0)
        # Cut to whole frames, so that codes that were stored uncut are the same.
        limit = None if self.split else self.max_frames * FRAME_SIZE / SAMPLE_RATE
        assert self.codec is not None
        waveform, seconds = decode_row(row, limit, self.read_retries, self.codec.resampler)
        if not source.admits(seconds):
            return _Waveform(None, 0)
        cut = limit is not None and waveform.numel() >= round(limit * SAMPLE_RATE)
        return _Waveform(waveform, math.ceil(seconds * FRAME_RATE - 1e-6) if cut else 0)

    def _encode(self, own: list[tuple[int, Iterator["_Pending"]]]) -> dict[int, Encoded]:
        """Take and encode recordings; those whose codes all ranks know are left out of the result."""
        results: dict[int, Encoded] = {}
        group: dict[int, tuple[Row, _Waveform]] = {}
        seconds = 0.0
        for draw, decoding in own:
            pending = next(decoding)
            if pending.row is None or pending.waveform is None:
                continue
            try:
                waveform = pending.waveform.result()
            except AudioError as error:
                lasts = not isinstance(error, UnreadError)
                results[draw] = Encoded(pending.row.key, None, _NO_TEXT, 0, str(error), lasts)
                continue
            if waveform.samples is None:
                results[draw] = Encoded(pending.row.key, None, _NO_TEXT, 0, None)
                continue
            group[draw] = (pending.row, waveform)
            seconds += waveform.samples.numel() / SAMPLE_RATE
            if seconds >= SECONDS_AT_ONCE:
                results |= self._encode_group(group)
                group, seconds = {}, 0.0
        return results | self._encode_group(group)

    def _encode_group(self, group: dict[int, tuple[Row, "_Waveform"]]) -> dict[int, Encoded]:
        """Encode recordings together."""
        if not group:
            return {}
        assert self.codec is not None
        results: dict[int, Encoded] = {}
        try:
            encoded = self.codec.encode([waveform.samples for _, waveform in group.values()])  # type: ignore[misc]
        except CodecError as error:
            if len(group) == 1:
                ((draw, (row, _)),) = group.items()
                return {draw: Encoded(row.key, None, _NO_TEXT, 0, f"its audio: {error}")}
            # One recording is to blame; the others are encoded without it.
            return {k: v for draw, one in group.items() for k, v in self._encode_group({draw: one}).items()}
        for (draw, (row, waveform)), codes in zip(group.items(), encoded, strict=True):
            text_ids, reason = self._text_ids([row.text])[0] if self.task != "a2a" else (_NO_TEXT, None)
            frames = codes.T.contiguous().to(torch.int16).numpy()
            whole = max(waveform.whole, len(frames))
            results[draw] = Encoded(row.key, None if reason else frames, text_ids, whole, reason)
        return results

    def _text_ids(self, texts: Sequence[str | None]) -> list[tuple[np.ndarray, str | None]]:
        """Ids of transcriptions, or the reason why one cannot be used."""
        usable = [isinstance(text, str) and bool(text.strip()) for text in texts]
        chosen = [text for text, use in zip(texts, usable, strict=True) if use]
        ids = iter(self.tokenizer(chosen, add_special_tokens=False)["input_ids"] if chosen else [])
        results: list[tuple[np.ndarray, str | None]] = []
        for use in usable:
            if not use:
                results.append((_NO_TEXT, f"the row has no transcription, which task {self.task} needs."))
                continue
            text_ids = np.array(next(ids), dtype=np.int32)
            special = (text_ids >= self.stream.base_size).any() or np.isin(text_ids, self._mark_ids).any()
            reason = "the transcription contains the name of an audio token or a special one." if special else None
            results.append((text_ids, reason))
        return results

    # --- codes of all ranks to samples

    def _merged(self, parts: Iterable[Part]) -> Iterator[tuple[int, Encoded | CodeItem, tuple[np.ndarray, str | None]]]:
        """Every draw in order, with what all ranks together know of it, and the text of stored codes."""
        for start, stop, own in parts:
            encoded = own
            if self.encodes and self.world_size > 1:
                encoded = self._exchange(own)
            streams, draws = self.mixture.draw(start, stop)
            items = np.empty_like(draws)
            for number, stream in enumerate(self.streams):
                places = np.flatnonzero(streams == number)
                items[places] = stream.order.items(draws[places])
            found: list[Encoded | CodeItem] = []
            for draw, number, item in zip(range(start, stop), streams.tolist(), items.tolist(), strict=True):
                stream = self.streams[number]
                if isinstance(stream, CodeStream):
                    found.append(stream.item(item))
                elif draw in encoded:
                    found.append(encoded[draw])
                    self._remember((number, item), encoded[draw])
                else:
                    found.append(self._cache[number, item])
            yield from zip(range(start, stop), found, self._texts(found), strict=True)

    def _exchange(self, own: dict[int, Encoded]) -> dict[int, Encoded]:
        """What all ranks encoded.

        Raises:
            UserError: another rank ended, or has no data within the time that the group allows.
        """
        gathered: list[dict[int, Encoded]] = [{} for _ in range(self.world_size)]
        try:
            dist.all_gather_object(gathered, own, group=self.group)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"rank {self.rank}: the data of the other ranks did not come ({reason}).") from None
        return {draw: result for results in gathered for draw, result in results.items()}

    def _texts(self, found: list[Encoded | CodeItem]) -> list[tuple[np.ndarray, str | None]]:
        """The text of each of some samples: known for recordings, looked up for stored codes."""
        if self.task == "a2a":
            return [(_NO_TEXT, None)] * len(found)
        stored = [item for item in found if isinstance(item, CodeItem)]
        texts = iter(self._text_ids([item.shards.text(item.number) for item in stored]))
        return [next(texts) if isinstance(item, CodeItem) else (item.text_ids, None) for item in found]

    def _remember(self, key: tuple[int, int], encoded: Encoded) -> None:
        """Keep what is known. The same on every rank, since all meet the same in the same order."""
        if encoded.lasts and key not in self._cache and self._cache_bytes < CACHE_BYTES:
            self._cache[key] = encoded
            size = 0 if encoded.codes is None else encoded.codes.nbytes
            self._cache_bytes += size + encoded.text_ids.nbytes + 500  # and the entry itself, roughly

    def _samples(
        self, draw: int, drawn: Encoded | CodeItem, text: tuple[np.ndarray, str | None], counters: Counters
    ) -> list[Sample]:
        """The samples that a drawn item becomes: none, one, or with ``split`` several of a long recording."""
        counters.rows += 1
        text_ids, reason = text
        if isinstance(drawn, Encoded):
            reason = drawn.reason
            if reason is None and drawn.codes is None:
                counters.filtered_rows += 1
                return []
            first, num_frames = 0, 0 if drawn.codes is None else len(drawn.codes)
        else:
            first, num_frames = drawn.start, drawn.stop - drawn.start
        fitting = self.stream.max_frames(self.seq_len, len(text_ids))
        if reason is None and fitting < 1:
            reason = f"a transcription of {len(text_ids)} ids leaves no room for audio in {self.seq_len} ids."
        if reason is not None:
            counters.bad_rows += 1
            if self.rank == 0:
                self.bad_rows.add(drawn.key, reason)
            self._judge(counters)
            return []
        pieces = [(0, num_frames)]
        if self.split:
            size = min(self.max_frames, fitting)
            pieces = [(start, min(start + size, num_frames)) for start in range(0, num_frames, size)]
        samples = []
        for start, stop in pieces:
            goes_on = first + stop < drawn.whole
            end = not goes_on or self.end_cut
            if not self.split and (goes_on or stop > fitting):
                end = self.end_cut
                stop = min(stop, self.stream.max_frames(self.seq_len, len(text_ids), end))
                counters.cut_rows += 1
                counters.cut_frames += drawn.whole - stop
            length = self.stream.sample_length(stop - start, len(text_ids), end)
            samples.append(Sample(draw, length, drawn, start, stop - start, text_ids, end))
        return samples

    def _judge(self, counters: Counters) -> None:
        """Stop when too many recordings are bad.

        Raises:
            UserError: they are.
        """
        if counters.rows >= MIN_JUDGED and counters.bad_rows > self.max_bad_share * counters.rows:
            raise UserError(
                f"{counters.bad_rows:,} of {counters.rows:,} recordings could not be used, more than the share of "
                f"{self.max_bad_share} that training.max_bad_share allows"
                + (f"; {self.bad_rows.file} lists them." if self.bad_rows.file else ".")
            )

    # --- samples to rows to batches

    def _rows(self, parts: Iterable[Part]) -> Iterator[RowOfSamples]:
        """Rows of samples in the global order, from the current state on."""
        skip, begin, begun = self.row, self.draw, self.begun
        before, counters = replace(self.counters), replace(self.counters)
        window: list[Sample] = []
        unused = 0
        for draw, drawn, text in self._merged(parts):
            samples = self._samples(draw, drawn, text, counters)
            window += samples
            unused = 0 if samples else unused + 1
            if unused > self.mixture.two_epochs:
                raise UserError(
                    "no recording of a whole epoch could be used; the log names each one's reason."
                    if counters.bad_rows
                    else "no recording has a duration between min_seconds and max_seconds."
                )
            after = draw + 1
            if begun:
                complete = after == begun["after"]
            else:
                complete = len(window) >= self.window or (bool(window) and self.mixture.ends_epoch(after))
            if complete:
                yield from islice(self._window_rows(window, begin, after, before, counters, begun), skip, None)
                skip, begin, begun, before, window = 0, after, None, replace(counters), []
        if window:
            after = len(self.mixture)
            yield from islice(self._window_rows(window, begin, after, before, counters, begun), skip, None)

    def _window_rows(
        self,
        window: list[Sample],
        begin: int,
        after: int,
        before: Counters,
        counters: Counters,
        begun: dict[str, Any] | None,
    ) -> Iterator[RowOfSamples]:
        """The rows that the samples of one window become.

        Args:
            window: the samples, of the draws from ``begin`` to ``after``.
            before, counters: before and after the window.
            begun: what the window was when it was begun, by an earlier process: its samples' draws, starts and lengths.
        """
        found: Sequence[Sample | None] = window
        facts = [[sample.draw, sample.start, sample.length] for sample in window]
        if begun:
            here = {(sample.draw, sample.start): sample for sample in window}
            facts = begun["samples"]
            # What is not as it was cannot stand in its place.
            found = [s if (s := here.get((d, start))) and s.length == length else None for d, start, length in facts]
        rows = [[i] for i in range(len(found))]
        if self.packing:
            rows = best_fit_decreasing([length for _, _, length in facts], self.seq_len)
        if self.window > 1:
            # Neither their order by length nor that of the pieces of a recording must become the order of training.
            rows = [rows[i] for i in Permutation(len(rows), self.seed, "rows of a window", begin).all()]
        counters = replace(counters)
        for number, row in enumerate(rows, start=1):
            if number < len(rows):
                state: dict[str, Any] = {"draw": begin, "row": number, "counters": before}
                if self.window > 1 and self.encodes:
                    state["window"] = {"after": after, "samples": facts}
            else:
                state = {"draw": after, "row": 0, "counters": counters}
            yield RowOfSamples([sample for i in row if (sample := found[i])], state, counters)

    def _batches(self, parts: Generator[Part]) -> Generator[Batch]:
        """This rank's batches: of each group of rows of the global order, a batch for each share, its own."""
        try:
            rows = self._rows(parts)
            number, degree = self.share
            while group := list(islice(rows, degree * self.batch_size)):
                own = [row.samples for row in group[number::degree]]
                if not own:  # the last rows of finite data did not go round
                    return
                state = {**group[-1].state, "counters": asdict(group[-1].state["counters"])}
                yield self._batch(own, state, group[-1].counters)
        finally:
            parts.close()

    def _batch(self, rows: list[list[Sample]], state: dict[str, Any], counters: Counters) -> Batch:
        longest = max(1, *(sum(sample.length for sample in row) for row in rows))
        length = self.seq_len
        if not self.fixed_length:
            length = min(length, -(-longest // self.length_multiple) * self.length_multiple)
        tokens = np.zeros((len(rows), length), dtype=np.int64)
        targets = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
        positions = np.zeros((len(rows), length), dtype=np.int64) if self.packing else None
        count = np.arange(length)
        for row, samples in enumerate(rows):
            place = 0
            for sample in samples:
                stop = place + sample.length
                ids = tokens[row, place:stop]
                self.stream.write_sample(
                    ids, self._codes(sample), sample.text_ids, sample.end, text_last=self.task == "asr"
                )
                targets[row, place : stop - 1] = ids[1:]
                if positions is not None:
                    positions[row, place:stop] = count[: sample.length]
                place = stop
            if positions is not None:
                positions[row, place:] = count[: length - place]
        tensors = [torch.from_numpy(array) for array in (tokens, targets)]
        if positions is not None:
            tensors.append(torch.from_numpy(positions))
        if torch.cuda.is_available():
            tensors = [tensor.pin_memory() for tensor in tensors]
        lengths = [sample.length for samples in rows for sample in samples]
        keys = [[_name(sample) for sample in samples] for samples in rows]
        packed = tensors[2] if positions is not None else None
        squares = sum(length * length for length in lengths)
        return Batch(tensors[0], tensors[1], sum(lengths), state, squares, packed, counters, keys)

    def _codes(self, sample: Sample) -> np.ndarray:
        """Codes [T, Q] of a sample."""
        if isinstance(sample.codes, CodeItem):
            item = sample.codes
            place = item.start + sample.start
            return item.shards.codes(item.number, place, place + sample.num_frames, self.stream.num_quantizers)
        assert sample.codes.codes is not None
        return sample.codes.codes[sample.start : sample.start + sample.num_frames]


@dataclass
class _Waveform:
    """A decoded recording, None if its duration is not admitted; if it was cut, the frames that the whole of it has."""

    samples: torch.Tensor | None
    whole: int


_Read = tuple[Source, Row]


class _Closing(Exception):
    """Nobody takes the batches any longer."""


class _Pending(NamedTuple):
    row: Row | None  # None: its codes were known when it was read
    waveform: "Future[_Waveform] | None"


def max_frames_of(max_seconds: float) -> int:
    """Frames of a recording that was cut at ``max_seconds``."""
    return -(-round(max_seconds * SAMPLE_RATE) // FRAME_SIZE)


def _name(sample: Sample) -> str:
    """The recording's name, with the frames that a later piece of it has."""
    if isinstance(sample.codes, CodeItem) or not sample.start:
        return sample.codes.key
    return f"{sample.codes.key}[{sample.start}:{sample.start + sample.num_frames}]"

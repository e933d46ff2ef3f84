"""Recordings in their order, read, decoded and encoded ahead of time by all ranks together.

Each rank takes its share of every window of the order (1,024 recordings). The ranks then exchange the codes, which are
small (4 KB per recording). A rank's threads are

    read      rows of files, a window ahead
    decode    ``num_workers`` threads: audio file to mono waveform at 24 kHz (libsndfile and torch release the lock)
    encode    waveforms to codes, batched by length, on the training device, with a CUDA stream of the codec's own

Codes are cached in memory up to a limit, so later epochs of a small data set and repeated validations need no encoding.
On a GPU, a clip in another batch may rarely get another code. A resumed run, whose cache is empty, can therefore see
other codes than a run that was not interrupted. On a CPU the codes are the same.
"""

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from torchtitan.audio.codec import Codec
from torchtitan.datasets.corpora import AudioCorpus, CodeCorpus, CodeItem
from torchtitan.datasets.decoding import Decoded, RecordingDecoder, decode_ahead, frames_of
from torchtitan.datasets.encoding import encode_decoded
from torchtitan.datasets.order import Mixture
from torchtitan.datasets.rows import Row
from torchtitan.datasets.samples import NO_TEXT, Encoded, Text, TextEncoder
from torchtitan.tools.errors import UserError
from torchtitan.tools.prefetch import prefetch

CACHE_BYTES = 1 << 30
# Minimum number of recordings that a GPU encodes together.
GPU_CLIPS = 32
# Limit of the bytes of audio files that a rank holds per window. The other files are read one by one in their turn.
WINDOW_BYTES = 1 << 30


@dataclass(frozen=True)
class Ranks:
    """The ranks that load data together.

    Attributes:
        rank, world_size: this rank, and the number of ranks, that share the encoding of recordings.
        group: the process group (on the CPU) in which they exchange codes; None is the default group.
        share: number of this rank among the ranks that see different rows, and the number of such ranks; None: all
            ranks see different rows.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    share: tuple[int, int] | None = None


class Part(NamedTuple):
    """The draws from ``start`` up to ``stop`` (excluded), and those that this rank encoded."""

    start: int
    stop: int
    encoded: dict[int, Encoded]


class _Closing(Exception):
    """The consumer of the codes has stopped."""


class RecordingEncoder:
    """Turns draws into items: encodes recordings, and looks up codes in shards.

    Args:
        corpora: where items are drawn from.
        mixture: the order of the draws; finite for validation.
        codec: the codec on the device that encodes; None if all corpora hold codes.
        decoder: turns recordings into waveforms.
        texts: turns transcriptions into ids.
        ranks: the ranks that share the work.
        batch_size: recordings that a rank encodes, and the ranks exchange, at a time.
        num_workers: threads that decode; 0 decodes in the thread that encodes.
    """

    def __init__(
        self,
        corpora: Sequence[AudioCorpus | CodeCorpus],
        mixture: Mixture,
        codec: Codec | None,
        decoder: RecordingDecoder,
        texts: TextEncoder,
        ranks: Ranks,
        batch_size: int,
        num_workers: int,
    ):
        self.corpora, self.mixture, self.codec, self.decoder, self.texts = corpora, mixture, codec, decoder, texts
        self.ranks, self.num_workers = ranks, num_workers
        self.encodes = any(isinstance(corpus, AudioCorpus) for corpus in corpora)
        on_gpu = codec is not None and codec.device.type == "cuda"
        self.part_size = ranks.world_size * max(batch_size, GPU_CLIPS if on_gpu and self.encodes else 1)
        # Limit of waiting recordings: a batch, and those that the threads work on.
        self._ahead = batch_size + 2 * max(1, num_workers)
        self._cache: dict[tuple[int, int], Encoded] = {}
        self._cache_bytes = 0

    @property
    def exchanges(self) -> bool:
        """Whether the ranks wait for each other's codes."""
        return self.encodes and self.ranks.world_size > 1

    def parts(self, start: int, ending: threading.Event) -> Generator[Part]:
        """The parts of the order, one after the other, from the draw ``start`` on."""
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(max(1, self.num_workers), "decode")
            stack.callback(pool.shutdown, cancel_futures=True)
            decoding: dict[int, Generator[Decoded | None]] = {}
            while stop := self._part_end(start):
                origins, draws = self.mixture.draw(start, stop)
                own: list[tuple[int, Generator[Decoded | None]]] = []
                for number, corpus in enumerate(self.corpora):
                    places = np.flatnonzero(origins == number)
                    if not isinstance(corpus, AudioCorpus) or not places.size:
                        continue
                    if number not in decoding:
                        rows = self._read(number, corpus, int(draws[places[0]]), ending)
                        workers = pool if self.num_workers else None
                        seconds = self._ahead * (self.decoder.max_seconds or 20.0)
                        ahead = decode_ahead(rows, self.decoder, workers, seconds, self._ahead)
                        decoding[number] = stack.enter_context(closing(ahead))
                    mine = corpus.order.readers(draws[places], self.ranks.world_size) == self.ranks.rank
                    own += [(start + int(place), decoding[number]) for place in places[mine]]
                yield Part(start, stop, self._encode(own))
                start = stop

    def items(self, parts: Iterable[Part]) -> Iterator[tuple[int, Encoded | CodeItem, Text]]:
        """For each draw in order: its number, its item from whichever rank encoded it, and its text."""
        for start, stop, encoded in parts:
            if self.exchanges:
                encoded = self._exchange(encoded)
            origins, draws = self.mixture.draw(start, stop)
            numbers = np.empty_like(draws)
            for number, corpus in enumerate(self.corpora):
                places = np.flatnonzero(origins == number)
                numbers[places] = corpus.order.items(draws[places])
            found: list[Encoded | CodeItem] = []
            for draw, number, item in zip(range(start, stop), origins.tolist(), numbers.tolist(), strict=True):
                corpus = self.corpora[number]
                if isinstance(corpus, CodeCorpus):
                    found.append(corpus.item(item))
                elif draw in encoded:
                    found.append(encoded[draw])
                    self._remember((number, item), encoded[draw])
                else:
                    found.append(self._cache[number, item])
            stored = [item for item in found if isinstance(item, CodeItem)]
            has_text = self.texts.task != "a2a"
            texts = iter(self.texts([item.shards.text(item.number) if has_text else None for item in stored]))
            for draw, item in zip(range(start, stop), found, strict=True):
                yield draw, item, next(texts) if isinstance(item, CodeItem) else Text(item.text_ids)

    def _part_end(self, start: int) -> int:
        """The draw after the part that begins at ``start``; 0 at the end of finite data."""
        stop = start + self.part_size
        if not self.mixture.finite:
            return stop
        return min(stop, len(self.mixture)) if start < len(self.mixture) else 0

    def _read(self, number: int, corpus: AudioCorpus, draw: int, ending: threading.Event) -> Generator[Row | None]:
        """This rank's rows of a corpus from its ``draw`` on; None for a row whose codes are cached."""
        with closing(prefetch(self._windows(number, corpus, draw, ending), 1, "reader of windows")) as windows:
            for items, rows in windows:
                for item in items:
                    yield (rows.pop(item) or next(corpus.read([item]))[1]) if item in rows else None

    def _windows(
        self, number: int, corpus: AudioCorpus, draw: int, ending: threading.Event
    ) -> Iterator[tuple[list[int], dict[int, Row | None]]]:
        """For each window of the order: this rank's items, and the rows of the items whose codes are not cached.

        A row is None if the window's audio files exceed :data:`WINDOW_BYTES`.
        """
        while not self.mixture.finite or draw < len(corpus.order):
            end = corpus.order.window_end(draw)
            draws = np.arange(draw, end)
            own = corpus.order.readers(draws, self.ranks.world_size) == self.ranks.rank
            items = corpus.order.items(draws[own]).tolist()
            unknown = sorted(item for item in items if (number, item) not in self._cache)
            rows: dict[int, Row | None] = dict.fromkeys(unknown)
            size = 0
            for item, row in corpus.read(unknown):
                size += row.size
                if ending.is_set():
                    raise _Closing
                if size > WINDOW_BYTES:
                    break
                rows[item] = row
            yield items, rows
            draw = end

    def _encode(self, own: list[tuple[int, Generator[Decoded | None]]]) -> dict[int, Encoded]:
        """Take and encode recordings. The result leaves out recordings whose codes are cached on all ranks."""
        if not own:
            return {}
        assert self.codec is not None
        taken: list[int] = []

        def unknown() -> Iterator[Decoded]:
            for draw, decoding in own:
                if (decoded := next(decoding)) is not None:
                    taken.append(draw)
                    yield decoded

        encoded: dict[int, Encoded] = {}
        for place, (decoded, codes) in enumerate(encode_decoded(unknown(), self.codec)):
            text, frames = Text(NO_TEXT), None
            if isinstance(codes, torch.Tensor):
                (text,) = self.texts([decoded.row.text])
                frames = codes.T.contiguous().to(torch.int16).numpy() if text.reason is None else None
            elif codes:
                text = Text(NO_TEXT, codes)
            whole = frames_of(decoded.seconds)
            encoded[taken[place]] = Encoded(decoded.row.key, frames, text.ids, whole, text.reason, decoded.lasts)
        return encoded

    def _exchange(self, own: dict[int, Encoded]) -> dict[int, Encoded]:
        """The codes from all ranks.

        Raises:
            UserError: another rank ended, or sent no data within the time limit of the group.
        """
        gathered: list[dict[int, Encoded]] = [{} for _ in range(self.ranks.world_size)]
        try:
            dist.all_gather_object(gathered, own, group=self.ranks.group)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"rank {self.ranks.rank}: the data of the other ranks did not arrive ({reason}).") from None
        return {draw: result for results in gathered for draw, result in results.items()}

    def _remember(self, key: tuple[int, int], encoded: Encoded) -> None:
        """Cache an item. The caches of all ranks are equal, because all ranks see the same items in the same order."""
        if encoded.lasts and key not in self._cache and self._cache_bytes < CACHE_BYTES:
            self._cache[key] = encoded
            self._cache_bytes += encoded.nbytes

"""From recordings or stored codes to rows of ids, the same rows for any number of ranks and workers.

All ranks walk through one endless order of draws (datasets/order.py). Together they encode its recordings
(datasets/recordings.py), so every rank knows all samples of a stretch of the order, packs the same rows from them
(datasets/packing.py), and takes its own. Codes in shards need no exchange: each rank looks up those of its rows. Where
nothing is exchanged, a thread makes whole batches, ready for the step.

The state that comes with a batch is a place in the order. Any number of ranks can go on from there.
"""

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from torchtitan.audio.codec import FRAME_SIZE, Codec
from torchtitan.audio.token_stream import TokenStream
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.datasets.bad_rows import MIN_JUDGED, BadRows, require_usable
from torchtitan.datasets.corpora import AudioCorpus, CodeCorpus
from torchtitan.datasets.decoding import RecordingDecoder
from torchtitan.datasets.order import Mixture
from torchtitan.datasets.packing import PackedRow, Place, RowPacker
from torchtitan.datasets.recordings import Part, Ranks, RecordingEncoder
from torchtitan.datasets.samples import Counters, Sample, SampleMaker, TextEncoder
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools.prefetch import prefetch

# Rows of a batch are as long as the longest of them, rounded up to this.
LENGTH_MULTIPLE = 32
# How many batches to prefetch.
BATCHES_AHEAD = 4


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


@dataclass(frozen=True)
class LoaderSettings:
    """How a loader makes batches.

    Attributes:
        task: ``a2a`` (audio alone), ``tts`` (transcription, then audio) or ``asr`` (audio, then transcription).
        seq_len: longest row, in ids.
        batch_size: rows of a batch.
        max_seconds: a recording longer than this is cut, or split if ``split``.
        end_cut: samples end in ``</audio>`` also where their recording goes on.
        packing, window, seed: see :class:`~torchtitan.datasets.packing.RowPacker`.
        num_workers: threads that decode; 0 decodes in the thread that encodes.
        fixed_length: all batches are ``seq_len`` long, as compiled graphs want it.
        length_multiple: rows are padded to a multiple of this.
        read_retries: how often the reading of a recording's own file is tried again.
        max_bad_share: see the config key.
        num_bad_files: files that could not be read, for the counters.
    """

    task: str
    seq_len: int
    batch_size: int
    max_seconds: float
    split: bool = False
    end_cut: bool = True
    packing: bool = False
    window: int = 1
    seed: int = 0
    num_workers: int = 2
    fixed_length: bool = False
    length_multiple: int = LENGTH_MULTIPLE
    read_retries: int = 0
    max_bad_share: float = 1.0
    num_bad_files: int = 0


class SpeechDataLoader:
    """Batches of one rank.

    Args:
        corpora: where items are drawn from.
        mixture: in which order; it is finite for validation.
        stream: the token stream.
        codec: the codec, on the device that is to encode; None if all corpora hold codes.
        tokenizer: for the text of tasks ``tts`` and ``asr``; unused otherwise.
        settings: how batches are made.
        ranks: who loads together.
        bad_rows: where unusable recordings are reported (on rank 0).
    """

    def __init__(
        self,
        corpora: Sequence[AudioCorpus | CodeCorpus],
        mixture: Mixture,
        stream: TokenStream,
        codec: Codec | None,
        tokenizer: Any,
        settings: LoaderSettings,
        ranks: Ranks | None = None,
        bad_rows: BadRows | None = None,
    ):
        self.settings, self.ranks, self.bad_rows = settings, ranks or Ranks(), bad_rows or BadRows()
        max_frames = max_frames_of(settings.max_seconds)
        # Cut to whole frames, so that codes that were stored uncut are the same.
        limit = None if settings.split else max_frames * FRAME_SIZE / SAMPLE_RATE
        resampler = codec.resampler if codec is not None else "torchaudio"
        decoder = RecordingDecoder(limit, settings.read_retries, resampler)
        texts = TextEncoder(settings.task, stream, tokenizer)
        self.encoder = RecordingEncoder(
            corpora, mixture, codec, decoder, texts, self.ranks, settings.batch_size, settings.num_workers
        )
        piece = max_frames if settings.split else None
        self.samples = SampleMaker(stream, settings.seq_len, piece, settings.end_cut)
        self.packer = RowPacker(
            mixture, settings.seq_len, settings.window, settings.packing, settings.seed, self.encoder.encodes
        )
        self.collator = Collator(stream, settings)
        self.load_state_dict(self.start_state())

    @staticmethod
    def start_state() -> dict[str, Any]:
        """The state before the first draw."""
        return Place().state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that came with ``state``, made by any number of ranks."""
        self.place = Place.from_state(state)
        self.place.counters.bad_files = self.settings.num_bad_files

    def __iter__(self) -> Generator[Batch]:
        """Batches from the current state on, prepared ahead by threads.

        Where recordings are encoded by several ranks, all of them have to take the same number of batches, since each
        batch may need an exchange.

        Raises:
            UserError: no recording of a whole epoch could be used, or too many could not.
        """
        ending = threading.Event()
        parts = self.encoder.parts(self.place.draw, ending)
        if self.encoder.exchanges:
            # Exchanges happen in the thread that takes the batches, so that all collectives of a rank are in one order.
            ahead = BATCHES_AHEAD + 2 * self.settings.window // self.encoder.part_size
            batches = self._batches(prefetch(parts, ahead, "encoder"))
        else:
            batches = prefetch(self._batches(parts), BATCHES_AHEAD, "data loader")
        try:
            for batch in batches:  # noqa: UP028 - "yield from" would close them before the rest knows
                yield batch
        finally:
            ending.set()
            batches.close()

    def _batches(self, parts: Generator[Part]) -> Generator[Batch]:
        """This rank's batches: of each group of rows of the global order, a batch for each share, its own."""
        number, degree = self.ranks.share or (self.ranks.rank, self.ranks.world_size)
        counters = replace(self.place.counters)
        try:
            rows = self.packer.rows(self._drawn(parts, counters), self.place, counters)
            while group := list(islice(rows, degree * self.settings.batch_size)):
                own = group[number::degree]
                if not own:  # the last rows of finite data did not go round
                    return
                yield self.collator(own, group[-1])
        finally:
            parts.close()

    def _drawn(self, parts: Iterable[Part], counters: Counters) -> Iterator[tuple[int, list[Sample]]]:
        """Each draw with the samples that it becomes: none, one, or several pieces of a long recording."""
        for draw, item, text in self.encoder.items(parts):
            samples = self.samples(draw, item, text, counters)
            if isinstance(samples, str):
                if self.ranks.rank == 0:
                    self.bad_rows.add(item.key, samples)
                if counters.rows >= MIN_JUDGED:
                    share, file = self.settings.max_bad_share, self.bad_rows.file
                    require_usable(counters.bad_rows, counters.rows, share, "training.max_bad_share", file)
                samples = []
            yield draw, samples


class Collator:
    """Rows of samples to a batch."""

    def __init__(self, stream: TokenStream, settings: LoaderSettings):
        self.stream, self.settings = stream, settings

    def __call__(self, rows: Sequence[PackedRow], last: PackedRow) -> Batch:
        """The batch of some rows; ``last`` is the last row of this step's batches on all ranks."""
        settings = self.settings
        longest = max(1, *(sum(sample.length for sample in row.samples) for row in rows))
        length = settings.seq_len
        if not settings.fixed_length:
            length = min(length, -(-longest // settings.length_multiple) * settings.length_multiple)
        tokens = np.zeros((len(rows), length), dtype=np.int64)
        targets = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
        positions = np.zeros((len(rows), length), dtype=np.int64)
        count = np.arange(length)
        for number, row in enumerate(rows):
            place = 0
            for sample in row.samples:
                stop = place + sample.length
                ids = tokens[number, place:stop]
                codes = sample.frames(self.stream.num_quantizers)
                self.stream.write_sample(ids, codes, sample.text_ids, sample.end, text_last=settings.task == "asr")
                targets[number, place : stop - 1] = ids[1:]
                positions[number, place:stop] = count[: sample.length]
                place = stop
            positions[number, place:] = count[: length - place]
        tensors = [torch.from_numpy(array) for array in (tokens, targets, positions)]
        if torch.cuda.is_available():
            tensors = [tensor.pin_memory() for tensor in tensors]
        lengths = [sample.length for row in rows for sample in row.samples]
        return Batch(
            tokens=tensors[0],
            targets=tensors[1],
            num_tokens=sum(lengths),
            state=last.place.state(),
            num_squares=sum(length * length for length in lengths),
            positions=tensors[2] if settings.packing else None,
            counters=last.counters,
            keys=[[sample.key for sample in row.samples] for row in rows],
        )


def max_frames_of(max_seconds: float) -> int:
    """Frames of a recording that was cut at ``max_seconds``."""
    return -(-round(max_seconds * SAMPLE_RATE) // FRAME_SIZE)

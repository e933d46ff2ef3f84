"""From codes to samples: the text of a sample, and how recordings are cut or split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from torchtitan.audio.token_stream import TokenStream, mark_ids
from torchtitan.datasets.corpora import CodeItem

NO_TEXT = np.empty(0, dtype=np.int32)


@dataclass
class Counters:
    """Counts of recordings so far, over all ranks.

    Attributes:
        rows: recordings that were drawn; pieces, where codes are split.
        bad_rows: rows that cannot be used.
        filtered_rows: rows outside the duration limits of their source.
        cut_rows, cut_frames: rows that were cut, and the frames that they lost.
        bad_files: files that could not be read to their end when the data were opened.
    """

    rows: int = 0
    bad_rows: int = 0
    filtered_rows: int = 0
    cut_rows: int = 0
    cut_frames: int = 0
    bad_files: int = 0


class Encoded(NamedTuple):
    """A recording after encoding.

    Attributes:
        key: its name in messages.
        codes: int16 [T, Q]; None for a bad recording, and for one outside the duration limits of its source.
        text_ids: int32.
        whole: frames of the whole recording; ``codes`` may be only its beginning.
        reason: why the recording is bad; None if it is not.
        lasts: False if the recording could not be read, which may succeed later.
    """

    key: str
    codes: np.ndarray | None
    text_ids: np.ndarray
    whole: int
    reason: str | None
    lasts: bool = True

    @property
    def start(self) -> int:
        return 0

    @property
    def num_frames(self) -> int:
        return 0 if self.codes is None else len(self.codes)

    @property
    def nbytes(self) -> int:
        """Approximate size in memory, in bytes."""
        return 500 + self.text_ids.nbytes + (0 if self.codes is None else self.codes.nbytes)

    def frames(self, start: int, stop: int, num_quantizers: int) -> np.ndarray:
        """Codes, int16 [stop - start, Q]."""
        assert self.codes is not None
        return self.codes[start:stop, :num_quantizers]


class Text(NamedTuple):
    """The ids of a transcription, int32 [n], or the reason why it cannot be used."""

    ids: np.ndarray
    reason: str | None = None


class TextEncoder:
    """Turns transcriptions into ids.

    Args:
        task: ``a2a`` (samples without text), ``tts`` or ``asr``.
        tokenizer: unused for a2a.
    """

    def __init__(self, task: str, stream: TokenStream, tokenizer: Any):
        self.task, self.stream, self.tokenizer = task, stream, tokenizer
        self._mark_ids = np.array([] if task == "a2a" else sorted(mark_ids(tokenizer)))

    def __call__(self, texts: Sequence[str | None]) -> list[Text]:
        if self.task == "a2a":
            return [Text(NO_TEXT)] * len(texts)
        usable = [text for text in texts if isinstance(text, str) and text.strip()]
        ids = iter(self.tokenizer(usable, add_special_tokens=False)["input_ids"] if usable else [])
        found = []
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                found.append(Text(NO_TEXT, f"the row has no transcription, which task {self.task} needs."))
                continue
            text_ids = np.array(next(ids), dtype=np.int32)
            special = (text_ids >= self.stream.base_size).any() or np.isin(text_ids, self._mark_ids).any()
            reason = "the transcription contains the name of an audio token or of a special token." if special else None
            found.append(Text(text_ids, reason))
        return found


class Sample(NamedTuple):
    """The frames ``start`` up to ``stop`` of an item, with its text.

    ``end`` says whether the sample ends in ``</audio>``. ``length`` counts all its ids.
    """

    draw: int
    item: Encoded | CodeItem
    start: int
    stop: int
    text_ids: np.ndarray
    end: bool
    length: int

    @property
    def key(self) -> str:
        """The name of its recording, with the range of frames if the sample does not begin with frame 0."""
        start = self.item.start + self.start
        return f"{self.item.key}[{start}:{self.item.start + self.stop}]" if start else self.item.key

    def frames(self, num_quantizers: int) -> np.ndarray:
        """The codes of the sample, [stop - start, Q]."""
        return self.item.frames(self.start, self.stop, num_quantizers)


class SampleMaker:
    """Turns items into samples.

    Args:
        seq_len: maximum length of a sample, in ids.
        piece: maximum length of a sample, in frames, where recordings are split; None cuts them instead.
        end_cut: samples end in ``</audio>`` even if their recording goes on.
    """

    def __init__(self, stream: TokenStream, seq_len: int, piece: int | None, end_cut: bool):
        self.stream, self.seq_len, self.piece, self.end_cut = stream, seq_len, piece, end_cut

    def __call__(self, draw: int, item: Encoded | CodeItem, text: Text, counters: Counters) -> list[Sample] | str:
        """The samples of an item, or the reason why it is bad. Updates the counters."""
        counters.rows += 1
        fitting = self.stream.max_frames(self.seq_len, len(text.ids))
        reason = text.reason
        if isinstance(item, Encoded):
            reason = item.reason
            if reason is None and item.codes is None:
                counters.filtered_rows += 1
                return []
        if reason is None and fitting < 1:
            reason = f"a transcription of {len(text.ids)} ids leaves no room for audio in {self.seq_len} ids."
        if reason is not None:
            counters.bad_rows += 1
            return reason
        if self.piece is None:
            return [self._cut(draw, item, text.ids, fitting, counters)]
        size = min(self.piece, fitting)
        starts = range(0, item.num_frames, size)
        return [self._sample(draw, item, start, min(start + size, item.num_frames), text.ids) for start in starts]

    def _cut(self, draw: int, item: Encoded | CodeItem, ids: np.ndarray, fitting: int, counters: Counters) -> Sample:
        if item.start + item.num_frames >= item.whole and item.num_frames <= fitting:
            return self._sample(draw, item, 0, item.num_frames, ids)
        stop = min(item.num_frames, self.stream.max_frames(self.seq_len, len(ids), self.end_cut))
        counters.cut_rows += 1
        counters.cut_frames += item.whole - stop
        return self._sample(draw, item, 0, stop, ids, self.end_cut)

    def _sample(
        self, draw: int, item: Encoded | CodeItem, start: int, stop: int, ids: np.ndarray, end: bool | None = None
    ) -> Sample:
        if end is None:
            end = self.end_cut or item.start + stop >= item.whole
        return Sample(draw, item, start, stop, ids, end, self.stream.sample_length(stop - start, len(ids), end))

"""The work of one process: it reads rows, decodes them ahead, encodes them, and writes parts and shards."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import torch

from torchtitan.audio.codec import Codec
from torchtitan.datasets.decoding import Decoded, RecordingDecoder, decode_ahead
from torchtitan.datasets.encoding import AHEAD_SECONDS, encode_decoded
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.readers import AudioDataset
from torchtitan.datasets.shards import Recording, WriteError, merge_parts, write_part
from torchtitan.tokenization.spec import Counts, Spec, is_whole


def storable(text: str) -> str:
    """A text that UTF-8 can encode: replaces bytes of file names that are not text, and half characters of JSON."""
    return text.encode(errors="replace").decode()


def relative(text: str, source: Source) -> str:
    """A row's key or a message, with paths relative to the root of the data set."""
    root = os.path.expanduser(source.path).rstrip("/")
    if os.path.isfile(root):
        root = os.path.dirname(root) or "."
    # Only at the start of a word, since the root may also be the end of a longer path.
    on_hub = rf"hf://datasets/{re.escape(source.path)}(@[^/]*)?/"
    return re.sub(rf"(?<![^\s'\"(])({re.escape(root)}/|{on_hub})", "", text)


class ShardTokenizer:
    """Makes parts and shards in one process.

    Args:
        device: device of the codec.
        threads: number of threads that decode.
        report: called with the counts of rows that are done, and again with those of each part that is written.
    """

    def __init__(self, spec: Spec, device: torch.device, threads: int, report: Callable[[str, Counts], None]):
        self.spec, self.threads, self.report = spec, threads, report
        settings = (spec.audio_tokenizer, spec.num_quantizers, spec.padding, spec.window)
        self.codec = Codec.load(*settings, device, resampler=spec.header["resampler"])
        self.data = AudioDataset(spec.source, spec.index)
        self.decoder = RecordingDecoder(spec.max_seconds, self.data.retries, self.codec.resampler)

    def make_parts(self, shard: int, parts: Sequence[int]) -> None:
        """Write the missing ones among these parts of a shard."""
        spec = self.spec
        try:
            spec.partial_folder(shard).mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"{spec.output}: this folder cannot be written to ({error.strerror or error}).") from None
        missing = [part for part in parts if not is_whole(spec.part_path(shard, part))]
        numbers = [number for part in missing for number in spec.part_rows(shard, part)]
        pool = ThreadPoolExecutor(self.threads, "decode")
        try:
            rows = (row for _, row in self.data.read(numbers))
            seconds = AHEAD_SECONDS[self.codec.device.type]
            with closing(decode_ahead(rows, self.decoder, pool, seconds)) as decoded:
                for part in missing:
                    self._make_part(shard, part, decoded)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def merge(self, shard: int) -> None:
        """Join the parts of a shard, which must all be there."""
        spec = self.spec
        import transformers

        rows = spec.rows(shard)
        header = {
            **spec.header,
            "shard": shard,
            "of": spec.num_shards,
            "rows": [rows.start, rows.stop],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        parts = [spec.part_path(shard, part) for part in range(spec.num_parts(shard))]
        merge_parts(parts, spec.shard_path(shard), header)
        shutil.rmtree(spec.partial_folder(shard), ignore_errors=True)

    def _make_part(self, shard: int, part: int, rows: Iterator[Decoded | None]) -> None:
        source = self.spec.source
        total = Counts(rows=len(self.spec.part_rows(shard, part)))
        recordings: list[Recording] = []
        bad_rows: list[tuple[str, str]] = []
        for row, codes in encode_decoded(filter(None, islice(rows, total.rows)), self.codec):
            key, text = storable(relative(row.row.key, source)), row.row.text
            counts = Counts()
            if isinstance(codes, torch.Tensor):
                frames = codes.T.contiguous().to(torch.int16).numpy().view("uint16")
                recordings.append(Recording(key, frames, row.seconds, text and storable(text), source.name))
                counts = Counts(recordings=1, seconds=row.seconds, frames=len(frames))
            elif codes is None:
                counts.left_out = 1
            else:
                bad_rows.append((key, storable(relative(codes, source))))
                counts.bad = 1
            total.add(counts)
            counts.rows = 1
            self.report("rows", counts)
        write_part(self.spec.part_path(shard, part), recordings, {"failed": bad_rows, "left_out": total.left_out})
        self.report("part", total)

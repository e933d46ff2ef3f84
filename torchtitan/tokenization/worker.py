"""The work of one process: rows are read and decoded ahead, encoded, and written as parts and shards."""

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
from torchtitan.tokenization.plan import Counts, Plan, is_whole


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

    def __init__(self, plan: Plan, device: torch.device, threads: int, report: Callable[[str, Counts], None]):
        self.plan, self.threads, self.report = plan, threads, report
        settings = (plan.audio_tokenizer, plan.num_quantizers, plan.padding, plan.window)
        self.codec = Codec.load(*settings, device, resampler=plan.header["resampler"])
        self.data = AudioDataset(plan.source, plan.index)
        self.decoder = RecordingDecoder(plan.max_seconds, self.data.retries, self.codec.resampler)

    def make_parts(self, shard: int, parts: Sequence[int]) -> None:
        """Write those of a shard's parts that are not there."""
        plan = self.plan
        try:
            plan.partial_folder(shard).mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"{plan.output}: this folder cannot be written to ({error.strerror or error}).") from None
        missing = [part for part in parts if not is_whole(plan.part_path(shard, part))]
        numbers = [number for part in missing for number in plan.part_rows(shard, part)]
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

    def _make_part(self, shard: int, part: int, rows: Iterator[Decoded | None]) -> None:
        source = self.plan.source
        total = Counts(rows=len(self.plan.part_rows(shard, part)))
        recordings: list[Recording] = []
        failed: list[tuple[str, str]] = []
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
                failed.append((key, storable(relative(codes, source))))
                counts.failed = 1
            total.add(counts)
            counts.rows = 1
            self.report("rows", counts)
        write_part(self.plan.part_path(shard, part), recordings, {"failed": failed, "left_out": total.left_out})
        self.report("part", total)

"""The data path: ``uv run python benchmarks/loader.py``. Three measurements, each side by side in one run.

1. Real tokens a second of a loader, from stored codes to batches: the plain way (a ``datasets`` table of the same
   codes, shuffled by its own indices, ids by arithmetic, a torch DataLoader without workers, rows padded to the row
   length) and ours, padded and packed.
2. Real tokens per computed position, padded and packed, beside best fit decreasing over all samples at once.
3. A training step while Mimi tokenizes the next rows, over the same step with ready rows. The codec has kyutai/mimi's
   size and random weights. It runs on a GPU if there is one, else on the CPU, where codec and model share the cores.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from models import fill_rows, make_codec, make_train_step

from torchtitan.audio.codec import Codec
from torchtitan.audio.token_stream import TokenStream
from torchtitan.components.dataloader import Batch, LoaderSettings, SpeechDataLoader, max_frames_of
from torchtitan.datasets.corpora import find_data, open_corpora
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.packing import best_fit_decreasing
from torchtitan.datasets.shards import Recording, merge_parts, shard_name, write_part
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.loss import IGNORE_INDEX

# Llama 3 with Q = 4.
STREAM = TokenStream(base_size=128_256, num_quantizers=4, bos_id=128_000)


@dataclass
class Options:
    """Sizes and times."""

    recordings: int = 20_000
    """Recordings of 13 to 15 s, as those of The People's Speech, in the stored codes."""
    seconds: float = 4.0
    """How long each loader is timed."""
    turns: int = 3
    """Times that the loaders run in turn."""
    batch: int = 0
    """Rows of a training step; 0 takes 32 on a GPU and 2 on a CPU."""
    steps: int = 0
    """Training steps that are timed; 0 takes 30 on a GPU and 4 on a CPU."""
    dim: int = 0
    """Width of the trained model; 0 takes that of the 1.3B on a GPU and 512 on a CPU."""


def write_shards(folder: Path, count: int, low: float, high: float) -> list[int]:
    """Random codes of recordings of ``low`` to ``high`` seconds; returns their sample lengths."""
    random = np.random.default_rng(0)
    frames = random.integers(round(low * 12.5), round(high * 12.5) + 1, count)
    recordings = [
        Recording(f"r{i}", random.integers(0, 2048, (n, 8), dtype=np.uint16), n / 12.5, None, "random")
        for i, n in enumerate(frames)
    ]
    codec = {"audio_tokenizer": "random/codes", "codec_fingerprint": "", "num_quantizers": 8}
    header = {"format": 1, **codec, "codec_padding": "exact", "codec_window": "codec", "source": {"name": "random"}}
    shards = [recordings[i : i + 4096] for i in range(0, count, 4096)]
    for number, some in enumerate(shards):
        write_part(folder / "part", some, {"failed": [], "left_out": 0})
        facts = {**header, "shard": number, "of": len(shards), "rows": len(some)}
        merge_parts([folder / "part"], folder / shard_name(number, len(shards)), facts)
        (folder / "part").unlink()
    return [STREAM.sample_length(int(n)) for n in frames]


def our_loader(path: Path, seq_len: int, batch: int, packing: bool, codec: Codec | None = None) -> SpeechDataLoader:
    """The trainer's loader, shuffled and endless."""
    found = find_data([Source(name="benchmark", path=str(path))], 0)
    corpora, mixture = open_corpora(found, 0, max_frames_of(20.0), False, 0)
    window = 2048 if packing else 1
    settings = LoaderSettings("a2a", seq_len, batch, 20.0, packing=packing, window=window, num_workers=4)
    return SpeechDataLoader(corpora, mixture, STREAM, codec, None, settings)


def plain_loader(path: Path, seq_len: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows padded to ``seq_len``, made from the same files by a ``datasets`` table and torch's DataLoader."""
    import pyarrow as pa
    from datasets import Dataset
    from torch.utils.data import DataLoader

    files = sorted(map(str, path.glob("*.arrow")))
    shards = [pa.ipc.open_file(pa.memory_map(file)).read_all().select(["codes"]) for file in files]
    table: Any = Dataset(pa.concat_tables(shards).replace_schema_metadata(None)).shuffle(seed=0)

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        codes = [torch.tensor(row["codes"]).view(-1, 8)[:, : STREAM.num_quantizers] for row in rows]
        tokens, targets, _ = fill_rows([[STREAM.sample(each.T)] for each in codes], seq_len)
        return tokens, targets

    while True:
        yield from DataLoader(table, batch, collate_fn=collate)


def loader_speed(make: Callable[[], Any], seconds: float) -> float:
    """Real tokens a second of a loader's batches, after the first one."""
    batches = iter(make())
    next(batches)
    tokens, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds:
        batch = next(batches)
        targets = batch.targets if isinstance(batch, Batch) else batch[1]
        tokens += int((targets != IGNORE_INDEX).sum()) + len(targets)
    batches.close()
    return tokens / taken


def time_loaders(options: Options, folder: Path) -> dict[str, Any]:
    """Real tokens a second of each loader, and their ratios to the first one."""
    write_shards(folder, options.recordings, 13, 15)
    loaders: dict[str, Callable[[], Any]] = {}
    try:
        import datasets

        datasets.disable_progress_bars()
        loaders["plain, padded to 1,024"] = partial(plain_loader, folder, 1024, 32)
    except ModuleNotFoundError:
        print("the plain loader is left out: the package datasets is not installed", file=sys.stderr, flush=True)
    loaders["ours, one sample a row"] = partial(our_loader, folder, 1024, 32, packing=False)
    loaders["ours, packed to 1,024"] = partial(our_loader, folder, 1024, 32, packing=True)
    loaders["ours, packed to 8,192"] = partial(our_loader, folder, 8192, 4, packing=True)
    ways = {name: partial(loader_speed, make, options.seconds) for name, make in loaders.items()}
    speeds = harness.medians(harness.in_turns(ways, options.turns, lambda speed: f"{speed:,.0f} real tokens/s"))
    return {"real_tokens_per_second": speeds, "over_first": harness.over(speeds, next(iter(speeds)))}


def fill_of_rows(folder: Path) -> dict[str, Any]:
    """Share of real tokens among the positions of rows."""
    shares: dict[str, Any] = {}
    for name, low, high in (("2 to 8 s", 2, 8), ("13 to 15 s", 13, 15)):
        data = folder / name.replace(" ", "")
        data.mkdir()
        lengths = write_shards(data, 8192, low, high)
        for seq_len, batch in ((1024, 32), (8192, 4)):
            rows = best_fit_decreasing(lengths[:2048], seq_len)
            found = {"best fit, decreasing, over 2,048": sum(lengths[:2048]) / (len(rows) * seq_len)}
            found["padded to the row length"] = statistics.mean(lengths) / seq_len
            for way, packing in (("ours, one sample a row", False), ("ours, packed", True)):
                real = positions = 0
                for taken in iter(our_loader(data, seq_len, batch, packing)):
                    real, positions = real + taken.num_tokens, positions + taken.tokens.numel()
                    if taken.state["draw"] >= 8192:
                        break
                found[way] = real / positions
            shares[f"{name}, rows of {seq_len:,}"] = found
    return shares


def write_speech(path: Path, count: int) -> None:
    """A parquet file of synthetic sounds of 13 to 15 s, FLAC at 16 kHz."""
    random = np.random.default_rng(0)

    def sounds() -> Iterator[torch.Tensor]:
        for _ in range(count):
            t = np.arange(round(random.uniform(13, 15) * 16_000)) / 16_000
            tone = 0.3 * np.sin(2 * np.pi * random.uniform(100, 300) * t * (1 + 0.1 * np.sin(t)))
            yield torch.from_numpy(tone + 0.02 * random.standard_normal(len(t)))

    harness.write_audio_table(path, {"audio": sounds()}, 16_000)


def time_steps(options: Options, folder: Path) -> dict[str, Any]:
    """Seconds of a training step with ready rows and with speech that is tokenized meanwhile."""
    device = harness.find_device()
    cuda = device.type == "cuda"
    batch, steps = options.batch or (32 if cuda else 2), options.steps or (30 if cuda else 4)
    dim = options.dim or (2048 if cuda else 512)
    args = Llama3Args(STREAM.vocab_size, dim, 16 if cuda else 8, dim // 64, dim // 256, 64, 4 * dim)
    step = make_train_step(args, device, 1024)

    def timed(batches: Iterator[Batch]) -> tuple[list[float], list[float], list[Batch]]:
        """Seconds of each step but the first three, those of them spent on waiting, and all batches."""
        seconds, waits, kept = [], [], []
        for _ in range(steps + 3):
            begin = time.perf_counter()
            kept.append(next(batches))
            waits.append(time.perf_counter() - begin)
            step(kept[-1].tokens, kept[-1].targets)
            seconds.append(time.perf_counter() - begin)
        return seconds[3:], waits[3:], kept

    write_speech(folder / "train-0.parquet", batch * (steps + 3) + 64)
    batches = iter(our_loader(folder / "train-0.parquet", 1024, batch, False, make_codec(device)))
    online, waits, kept = timed(batches)
    batches.close()
    ready, _, _ = timed(iter(kept))
    seconds = {"ready": statistics.mean(ready), "online": statistics.mean(online)}
    return {
        "rows": batch,
        "parameters": args.num_params,
        "seconds_a_step": seconds,
        "online_over_ready": seconds["online"] / seconds["ready"],
        "share_of_time_waited_for_data": sum(waits) / sum(online),
    }


def main(options: Options) -> None:
    """Run the three measurements and print them as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "codes").mkdir()
        figures = {
            "loader": time_loaders(options, folder / "codes"),
            "real_tokens_per_position": fill_of_rows(folder),
            "step": time_steps(options, folder / "speech"),
        }
    harness.report(figures, options)


if __name__ == "__main__":
    harness.run(main, Options, __doc__)

"""The data path: ``uv run python benchmarks/loader.py``. Three measurements, each side by side in one run.

1. Real tokens a second that a loader makes ready for the step from stored codes: the plain way (a ``datasets`` table of
   the same codes, shuffled by its own indices, ids by arithmetic, a torch DataLoader without workers, rows padded to
   the row length) and ours, padded and packed.
2. Real tokens per position computed, padded and packed, beside best fit, decreasing over all samples at once.
3. A training step with speech that is tokenized meanwhile over the same step with rows that lie ready, with the
   full-size Mimi (random weights, filled codebooks). On a GPU if there is one, else on the CPU, where codec and model
   share the same cores.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import numpy as np
import torch

from torchtitan.audio.codec import Codec
from torchtitan.audio.token_stream import TokenStream
from torchtitan.components.dataloader import Batch, LoaderSettings, SpeechDataLoader, max_frames_of
from torchtitan.datasets.corpora import find_data, open_corpora
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.packing import best_fit_decreasing
from torchtitan.datasets.shards import Recording, merge_parts, shard_name, write_part
from torchtitan.models.loss import IGNORE_INDEX

# Llama 3 with Q = 4.
STREAM = TokenStream(base_size=128_256, num_quantizers=4, bos_id=128_000)


@dataclass
class Options:
    """Sizes."""

    recordings: int = 20_000
    """Recordings of 13 to 15 s, as those of The People's Speech, in the stored codes."""
    seconds: float = 4.0
    """How long each loader is timed."""
    turns: int = 3
    """How often they are timed in turn."""
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
    codec = {
        "audio_tokenizer": "random/codes",
        "codec_fingerprint": "",
        "codec_padding": "exact",
        "codec_window": "codec",
    }
    header = {"format": 1, "num_quantizers": 8, **codec, "source": {"name": "random"}}
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
    """Rows padded to ``seq_len``, made the usual way from the same files."""
    import pyarrow as pa
    from datasets import Dataset
    from torch.utils.data import DataLoader

    files = sorted(map(str, path.glob("*.arrow")))
    shards = [pa.ipc.open_file(pa.memory_map(file)).read_all().select(["codes"]) for file in files]
    table: Any = Dataset(pa.concat_tables(shards).replace_schema_metadata(None)).shuffle(seed=0)

    def to_ids(row: dict[str, Any]) -> torch.Tensor:
        codes = torch.tensor(row["codes"]).view(-1, 8)[:, : STREAM.num_quantizers]
        return STREAM.sample(codes.T)

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(rows), seq_len, dtype=torch.int64)
        targets = torch.full((len(rows), seq_len), IGNORE_INDEX)
        for i, ids in enumerate(map(to_ids, rows)):
            tokens[i, : ids.numel()] = ids
            targets[i, : ids.numel() - 1] = ids[1:]
        return tokens, targets

    while True:
        yield from DataLoader(table, batch, collate_fn=collate)


def time_loaders(options: Options, folder: Path) -> dict[str, Any]:
    """Real tokens a second of each way, and their ratios to the plain one."""
    write_shards(folder, options.recordings, 13, 15)
    ways: dict[str, Any] = {}
    try:
        import datasets

        datasets.disable_progress_bars()
        ways["plain, padded to 1,024"] = lambda: plain_loader(folder, 1024, 32)
    except ModuleNotFoundError:
        print("the plain loader is left out: the package datasets is not installed", flush=True)
    ways["ours, one sample a row"] = lambda: iter(our_loader(folder, 1024, 32, packing=False))
    ways["ours, packed to 1,024"] = lambda: iter(our_loader(folder, 1024, 32, packing=True))
    ways["ours, packed to 8,192"] = lambda: iter(our_loader(folder, 8192, 4, packing=True))
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.turns):
        for name, make in ways.items():
            batches = make()
            next(batches)
            tokens, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < options.seconds:
                targets = next(batches)
                targets = targets.targets if isinstance(targets, Batch) else targets[1]
                tokens += int((targets != IGNORE_INDEX).sum()) + len(targets)
            speeds[name].append(tokens / (time.perf_counter() - begin))
            batches.close()
            print(f"{name}: {speeds[name][-1]:,.0f} real tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    first = next(iter(medians.values()))
    return {"real_tokens_per_second": medians, "over_first": {name: m / first for name, m in medians.items()}}


def fill_of_rows(folder: Path) -> dict[str, Any]:
    """Share of real tokens among the positions of rows."""
    shares: dict[str, Any] = {}
    for name, low, high in (("2 to 8 s", 2, 8), ("13 to 15 s", 13, 15)):
        data = folder / name.replace(" ", "")
        data.mkdir()
        lengths = write_shards(data, 8192, low, high)
        for seq_len in (1024, 8192):
            rows = best_fit_decreasing(lengths[:2048], seq_len)
            found = {"best fit, decreasing, over 2,048": sum(lengths[:2048]) / (len(rows) * seq_len)}
            found["padded to the row length"] = statistics.mean(lengths) / seq_len
            for way, packing in (("ours, one sample a row", False), ("ours, packed", True)):
                real = positions = 0
                batch = 32 if seq_len == 1024 else 4
                for taken in iter(our_loader(data, seq_len, batch, packing)):
                    real, positions = real + taken.num_tokens, positions + taken.tokens.numel()
                    if taken.state["draw"] >= 8192:
                        break
                found[way] = real / positions
            shares[f"{name}, rows of {seq_len:,}"] = found
    return shares


def write_speech(path: Path, count: int) -> None:
    """A parquet file of synthetic sounds of 13 to 15 s, FLAC at 16 kHz."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import soundfile

    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        t = np.arange(round(random.uniform(13, 15) * 16_000)) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * random.uniform(100, 300) * t * (1 + 0.1 * np.sin(t)))
        sound = tone + 0.02 * random.standard_normal(len(t))
        file = io.BytesIO()
        soundfile.write(file, sound, 16_000, format="FLAC", subtype="PCM_16")
        rows.append({"id": str(number), "audio": {"bytes": file.getvalue(), "path": None}})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)


def full_size_mimi() -> Codec:
    """The codec's architecture with random weights and codebooks."""
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    model = MimiModel(MimiConfig()).eval()
    for module in model.modules():
        if hasattr(module, "embed_sum"):
            module.embed_sum.normal_()
            module._embed = None
    return Codec(model, 4)


def time_steps(options: Options, folder: Path) -> dict[str, Any]:
    """Seconds of a training step with ready rows and with speech that is tokenized meanwhile."""
    from torchtitan.models.llama3.args import Llama3Args
    from torchtitan.models.llama3.model import Llama3
    from torchtitan.models.llama3.weights import init_random, materialize

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batch, steps = options.batch or (32 if cuda else 2), options.steps or (30 if cuda else 4)
    dim = options.dim or (2048 if cuda else 512)
    args = Llama3Args(
        vocab_size=STREAM.vocab_size,
        dim=dim,
        n_layers=16 if cuda else 8,
        n_heads=dim // 64,
        n_kv_heads=dim // 256,
        head_dim=64,
        hidden_dim=4 * dim,
    )
    with torch.device("meta"):
        model = Llama3(args)
    materialize(model, device, 1024)
    init_random(model, 0)
    model.train().to(torch.bfloat16 if cuda else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(taken: Batch) -> None:
        tokens, targets = taken.tokens.to(device, non_blocking=True), taken.targets.to(device, non_blocking=True)
        loss = model(tokens, targets)
        (loss / taken.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(batches: Iterator[Batch], waits: list[float]) -> list[float]:
        seconds = []
        for number in range(steps + 3):
            begin = time.perf_counter()
            taken = next(batches)
            waits.append(time.perf_counter() - begin)
            step(taken)
            if cuda:
                torch.cuda.synchronize()
            if number >= 3:
                seconds.append(time.perf_counter() - begin)
        return seconds

    speech = folder / "train-0.parquet"
    write_speech(speech, batch * (steps + 3) + 64)
    online = iter(our_loader(speech, 1024, batch, False, full_size_mimi().to(device)))
    waits: list[float] = []
    kept: list[Batch] = []

    def keep() -> Iterator[Batch]:
        for taken in online:
            kept.append(taken)
            yield taken

    tokenized = timed(keep(), waits)
    online.close()
    ready = timed(iter(kept), [])
    report = {name: statistics.mean(values) for name, values in (("ready", ready), ("online", tokenized))}
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "rows": batch,
        "parameters": args.num_params,
        "seconds_a_step": report,
        "online_over_ready": report["online"] / report["ready"],
        "share_of_time_waited_for_data": sum(waits[3:]) / sum(tokenized),
    }


def main(options: Options) -> None:
    """Run the three measurements and print them as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "codes").mkdir()
        (folder / "speech").mkdir()
        report = {
            "loader": time_loaders(options, folder / "codes"),
            "real_tokens_per_position": fill_of_rows(folder),
            "step": time_steps(options, folder / "speech"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    command.run(main, Options, __doc__)

"""Speech to ids here, side by side with the plain way: ``uv run python benchmarks/tokenization.py``.

Plain: one clip at a time through transformers' MimiModel.encode, the codes as strings ``<code_quantizer>``, joined and
given to the extended tokenizer. Ours: the worker of scripts/tokenize_dataset.py, with ids by arithmetic; on a CPU
pieces of a few seconds and an allocator that keeps its memory, on a GPU batches. Both read the same files in fp32, with
one thread for the codec, into Q = 4 codes a frame. The ways run in turn, each in processes of their own; loading models
is not counted. By default the codec has kyutai/mimi's size and random weights, and the clips (3 to 20 s) are the
repository's prompt, repeated, as FLAC.
"""

import multiprocessing
import random
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from models import QUANTIZERS, make_mimi

from torchtitan import tokenization
from torchtitan.audio.token_stream import TokenStream, extend_tokenizer
from torchtitan.audio.waveform import SAMPLE_RATE, load_audio
from torchtitan.datasets.decoding import num_threads
from torchtitan.datasets.readers import AudioDataset
from torchtitan.tokenization import worker
from torchtitan.tokenization.processes import settle
from torchtitan.tokenization.run import choose_devices
from torchtitan.tokenization.spec import Spec, prepare


@dataclass
class Options:
    """What to measure."""

    dataset: str | None = None
    """Folder of audio files or parquet files, or hub id."""
    audio_tokenizer: str | None = None
    """Hub name or folder of a codec, instead of random weights."""
    clips: int | None = None
    """Number of clips; by default 8 for a CPU process, 128 for a GPU."""
    turns: int = 2
    """Times that the ways run in turn."""
    processes: int | None = None
    """Processes of the third way; by default one for each CPU core or GPU."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass
class Work:
    """The share of one process, of ``of`` in all, that begins when all are ready."""

    dataset: str
    audio_tokenizer: str
    output: str
    clips: int
    device: torch.device
    share: int
    of: int
    barrier: Any

    def spec(self) -> Spec:
        """The tokenization of the clips, a shard for each process."""
        output = f"{self.output}/{self.of}-{self.share}"
        options = tokenization.spec.Options(self.dataset, output, audio_tokenizer=self.audio_tokenizer)
        spec = prepare(replace(options, num_quantizers=QUANTIZERS, max_bad_share=1.0))
        rows = min(self.clips, spec.num_rows)
        return replace(spec, num_rows=rows, rows_per_shard=-(-rows // self.of))


def plain(work: Work) -> tuple[float, float]:
    """(seconds of audio, seconds it took) of the plain way."""
    from transformers import AutoTokenizer, MimiModel

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(harness.ROOT / "assets" / "llama-small")
    extend_tokenizer(tokenizer, QUANTIZERS)
    model = MimiModel.from_pretrained(work.audio_tokenizer, dtype=torch.float32).eval().to(work.device)
    spec = work.spec()

    @torch.no_grad()
    def ids_of(waveform: torch.Tensor) -> list[int]:
        encoded: Any = model.encode(waveform[None, None].to(work.device), num_quantizers=QUANTIZERS)
        frames = encoded.audio_codes[0].T.cpu().tolist()
        text = "".join(f"<{code}_{q}>" for frame in frames for q, code in enumerate(frame))
        return tokenizer(f"<audio>{text}</audio>")["input_ids"]

    ids_of(torch.zeros(5 * SAMPLE_RATE))
    work.barrier.wait()
    begin, seconds = time.perf_counter(), 0.0
    for _, row in AudioDataset(spec.source, spec.index).read(range(spec.num_rows)):
        waveform = load_audio(row.audio)  # type: ignore[arg-type]
        ids_of(waveform)
        seconds += waveform.numel() / SAMPLE_RATE
    return seconds, time.perf_counter() - begin


def ours(work: Work) -> tuple[float, float]:
    """(seconds of audio, seconds it took) of one process of ours, which does its share of the rows."""
    settle(work.device)
    spec, seconds = work.spec(), []
    stream = TokenStream(128_256, QUANTIZERS, 128_000)

    def to_ids(path: Path, recordings: list, header: dict) -> None:
        """In place of writing a part, what training does with it: the plain way writes nothing either."""
        for recording in recordings:
            stream.encode(torch.from_numpy(recording.codes.astype("int64")).T)

    def report(kind: str, counts: Any) -> None:
        if kind == "part":
            seconds.append(counts.seconds)

    worker.write_part = to_ids  # type: ignore[assignment]
    tokenizer = worker.ShardTokenizer(spec, work.device, num_threads(work.device, work.of), report)
    tokenizer.codec.encode([torch.zeros(5 * SAMPLE_RATE)] * (1 if work.device.type == "cpu" else 16))
    work.barrier.wait()
    begin = time.perf_counter()
    if work.share < spec.num_shards:
        tokenizer.make_parts(work.share, range(spec.num_parts(work.share)))
    return sum(seconds), time.perf_counter() - begin


def main(options: Options) -> None:
    """Run the ways in turn and print the medians and their ratios as JSON."""
    devices = choose_devices(options.device, options.processes)
    clips = options.clips or (8 if devices[0].type == "cpu" else 128) * len(devices)
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Manager() as manager:
        codec, dataset = options.audio_tokenizer, options.dataset
        if codec is None:
            codec = f"{folder}/codec"
            make_mimi().save_pretrained(codec)
        if dataset is None:
            dataset, lengths = f"{folder}/clips", random.Random(0)
            waveforms = (harness.speech(0, lengths.uniform(3, 20)) for _ in range(clips))
            harness.write_audio_table(Path(dataset, "clips.parquet"), {"audio": waveforms}, harness.SPEECH_RATE)

        def speed(way: Any, used: list[torch.device]) -> float:
            """Seconds of audio a second, of one process for each of the devices."""
            barrier = manager.Barrier(len(used))
            work = Work(dataset, codec, f"{folder}/shards", clips, used[0], 0, len(used), barrier)
            shares = [(replace(work, device=device, share=share),) for share, device in enumerate(used)]
            found = harness.in_processes(way, *shares)
            return sum(seconds for seconds, _ in found) / max(took for _, took in found)

        ways = {"plain": partial(speed, plain, devices[:1]), "ours": partial(speed, ours, devices[:1])}
        if len(devices) > 1:
            ways[f"ours, {len(devices)} processes"] = partial(speed, ours, devices)
        turns = harness.in_turns(ways, options.turns, lambda speed: f"{speed:.1f} s of audio a second")
    speeds = harness.medians(turns)
    figures = {"audio_seconds_per_second": speeds, "ratio": harness.over(speeds, "plain"), "clips": clips}
    harness.report(figures, options, devices[0])


if __name__ == "__main__":
    harness.run(main, Options, __doc__)

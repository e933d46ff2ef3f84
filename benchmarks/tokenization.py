"""Speech to ids here, side by side with the plain way: ``uv run python benchmarks/tokenization.py``.

Plain: one clip at a time through transformers' MimiModel.encode, the codes as strings ``<code_quantizer>``, joined and
given to the extended tokenizer. Ours: the worker of scripts/tokenize_dataset.py, with ids by arithmetic; on a CPU
pieces of a few seconds and an allocator that keeps its memory, on a GPU batches. Both read the same files in fp32, with
one thread for the codec, into Q = 4 codes a frame. The ways run in turn, each in processes of their own; loading models
is not counted. By default the codec has kyutai/mimi's size and random weights, and the clips (3 to 20 s, 16 kHz FLAC)
are the repository's prompt, repeated.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
QUANTIZERS = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="folder of audio files or parquet files, or hub id")
    parser.add_argument("--audio_tokenizer", help="hub name or folder of a codec, instead of random weights")
    parser.add_argument("--clips", type=int, default=None, help="how many (default: 8 a CPU process, 128 a GPU)")
    parser.add_argument("--turns", type=int, default=2, help="how often the ways are run in turn")
    parser.add_argument("--processes", type=int, help="of the third way (default: one a CPU core, or one a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


def make_codec(folder: Path) -> Path:
    """A codec of kyutai/mimi's size with random weights."""
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    model = MimiModel(MimiConfig())
    for module in model.modules():
        if hasattr(module, "embed_sum"):
            module.embed_sum.normal_()  # type: ignore[operator]
    model.save_pretrained(folder)
    return folder


def make_clips(folder: Path, number: int) -> Path:
    """Files of 3 to 20 s, in total the same for each run."""
    import soundfile

    folder.mkdir()
    speech, rate = soundfile.read(ROOT / "assets" / "prompt.flac", dtype="float32")
    lengths = random.Random(0)
    for i in range(number):
        samples = round(lengths.uniform(3, 20) * rate)
        repeated = torch.from_numpy(speech).repeat(samples // len(speech) + 1)[:samples].numpy()
        soundfile.write(folder / f"clip-{i:05d}.flac", repeated, rate)
    return folder


def find_rows(dataset: str, number: int) -> Any:
    """The data set, and the first rows of it as it is read."""
    from torchtitan.datasets.hf_dataset import Source
    from torchtitan.datasets.readers import AudioDataset, index_files
    from torchtitan.datasets.sources import find_files

    source = Source(name=dataset, path=dataset)
    index = index_files(source, find_files(source))
    return source, index, range(min(number, len(AudioDataset(source, index))))


def plain(options: argparse.Namespace, device: torch.device, share: int, barrier: Any) -> tuple[float, float]:
    """(seconds of audio, seconds it took) of the plain way."""
    from transformers import AutoTokenizer, MimiModel

    from torchtitan.audio.token_stream import extend_tokenizer
    from torchtitan.audio.waveform import SAMPLE_RATE, load_audio
    from torchtitan.datasets.readers import AudioDataset

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "llama-small")
    extend_tokenizer(tokenizer, QUANTIZERS)
    model = MimiModel.from_pretrained(options.audio_tokenizer, dtype=torch.float32).eval().to(device)
    source, index, numbers = find_rows(options.dataset, options.clips)

    @torch.no_grad()
    def ids_of(waveform: torch.Tensor) -> list[int]:
        encoded: Any = model.encode(waveform[None, None].to(device), num_quantizers=QUANTIZERS)
        frames = encoded.audio_codes[0].T.cpu().tolist()
        text = "".join(f"<{code}_{q}>" for frame in frames for q, code in enumerate(frame))
        return tokenizer(f"<audio>{text}</audio>")["input_ids"]

    ids_of(torch.zeros(5 * SAMPLE_RATE))
    barrier.wait()
    begin, seconds = time.perf_counter(), 0.0
    for _, row in AudioDataset(source, index).read(numbers):
        waveform = load_audio(row.audio)  # type: ignore[arg-type]
        ids_of(waveform)
        seconds += waveform.numel() / SAMPLE_RATE
    return seconds, time.perf_counter() - begin


def ours(options: argparse.Namespace, device: torch.device, share: int, barrier: Any) -> tuple[float, float]:
    """(seconds of audio, seconds it took) of one process of ours, which does its share of the rows."""
    from torchtitan.audio.token_stream import TokenStream
    from torchtitan.audio.waveform import SAMPLE_RATE
    from torchtitan.tokenization import worker
    from torchtitan.tokenization.plan import PART_ROWS, Plan
    from torchtitan.tokenization.processes import decoding_threads, settle

    settle(device)
    source, index, numbers = find_rows(options.dataset, options.clips)
    each = -(-len(numbers) // options.shares)
    plan = Plan(
        source=source,
        index=index,
        output=Path(options.output),
        audio_tokenizer=options.audio_tokenizer,
        num_quantizers=QUANTIZERS,
        padding="exact",
        window="codec",
        max_seconds=None,
        rows_per_shard=each,
        max_bad_share=1.0,
        num_rows=len(numbers),
        header={"resampler": "torchaudio"},
        rows_per_part=PART_ROWS,
    )
    done = []
    threads = decoding_threads(device, options.shares)
    tokenizer = worker.ShardTokenizer(plan, device, threads, lambda kind, counts: done.append(counts))
    stream = TokenStream(128_256, QUANTIZERS, 128_000)

    def to_ids(path: Path, recordings: list, header: dict) -> None:
        """In place of writing a part, what training does with it: the plain way writes nothing either."""
        for recording in recordings:
            stream.encode(torch.from_numpy(recording.codes.astype("int64")).T)

    worker.write_part = to_ids
    tokenizer.codec.encode([torch.zeros(5 * SAMPLE_RATE)] * (1 if device.type == "cpu" else 16))
    barrier.wait()
    begin = time.perf_counter()
    if share < plan.num_shards:
        tokenizer.make_parts(share, range(plan.num_parts(share)))
    return sum(counts.seconds for counts in done) / 2, time.perf_counter() - begin  # told by rows, then by parts


WAYS = {"plain": plain, "ours": ours}


def measure(way: str, options: argparse.Namespace, device: str, share: int, barrier: Any, results: Any) -> None:
    results.put(WAYS[way](options, torch.device(device), share, barrier))


def run(way: str, options: argparse.Namespace, devices: list[str]) -> float:
    """Seconds of audio a second, of one process for each of the devices."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(devices)), context.Queue()
    options = argparse.Namespace(**{**vars(options), "shares": len(devices)})
    processes = [
        context.Process(target=measure, args=(way, options, device, share, barrier, results))
        for share, device in enumerate(devices)
    ]
    for process in processes:
        process.start()
    figures = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(seconds for seconds, _ in figures) / max(took for _, took in figures)


def main() -> None:
    options = parse()
    from torchtitan.tokenization.run import choose_devices

    many = [str(device) for device in choose_devices(options.device, options.processes)]
    options.clips = options.clips or (8 if many[0] == "cpu" else 128) * len(many)
    ways = {"plain": ("plain", many[:1]), "ours": ("ours", many[:1]), f"ours, {len(many)} processes": ("ours", many)}
    figures: dict[str, list[float]] = {name: [] for name in ways if len(many) > 1 or "processes" not in name}
    with tempfile.TemporaryDirectory() as folder:
        options.output = folder
        options.audio_tokenizer = options.audio_tokenizer or str(make_codec(Path(folder) / "codec"))
        options.dataset = options.dataset or str(make_clips(Path(folder) / "clips", options.clips))
        for _ in range(options.turns):
            for name, measured in figures.items():
                measured.append(run(ways[name][0], options, ways[name][1]))
                print(f"{name}: {measured[-1]:.1f} s of audio a second", flush=True)
    speed = {name: statistics.median(measured) for name, measured in figures.items()}
    report = {
        "audio_seconds_per_second": speed,
        "ratio": {name: speed[name] / speed["plain"] for name in speed if name != "plain"},
        "device": torch.cuda.get_device_name() if many[0].startswith("cuda") else "cpu",
        "clips": options.clips,
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

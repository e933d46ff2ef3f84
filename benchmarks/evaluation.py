"""Pairs of clips a second here, side by side with the plain way: ``uv run python benchmarks/evaluation.py``.

Plain: one clip at a time through transformers' MimiModel.encode and LlamaForCausalLM, whole logits, log-softmax and
gather. Ours: eval/salmon.py's score_task, with no codes kept before, and again with the codes of the first time. All
read the same parquet file in fp32 on a CPU, in bf16 (the codec in fp32) on a GPU, and how far their scores are apart is
printed. The codec has kyutai/mimi's size, the language model that of --size, both with random weights. The pairs are
those of --dataset, or 2 to 12 s of the repository's prompt, repeated. The two run in turn in processes of their own,
and the best time of each counts; loading and a first pair are not counted.
"""

import io
import json
import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import command
import torch
from models import QUANTIZERS, make_model

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    """What is measured."""

    size: Literal["small", "mid", "1.3B"] = "small"
    """Of the language model."""
    vocabulary: int = 136_450
    """Its ids; the last 8,194 are those of audio."""
    pairs: int = 12
    """Pairs of clips."""
    shared: float = 0.0
    """The part of the shorter clip of a pair that the other begins with, too."""
    dataset: str | None = None
    """A task's folder in SALMon's layout, whose first pairs are taken instead."""
    batch_size: int = 16
    """Ours: clips in one forward pass."""
    turns: int = 2
    """How often the ways are run in turn."""


def make_task(folder: Path, pairs: int, shared: float) -> Path:
    """A task of SALMon's layout; both clips of a pair begin with a part, ``shared``, of the shorter one."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import soundfile

    speech, rate = soundfile.read(ROOT / "assets" / "prompt.flac", dtype="float32")
    lengths = random.Random(0)

    def part(start: int, samples: int) -> torch.Tensor:
        return torch.from_numpy(speech).repeat((start + samples) // len(speech) + 1)[start : start + samples]

    columns: dict[str, list[Any]] = {"positive_audio": [], "negative_audio": []}
    for number in range(pairs):
        samples = [round(lengths.uniform(2, 12) * rate) for _ in columns]
        begin = part(1000 * number, round(shared * min(samples)))
        for i, (name, length) in enumerate(zip(columns, samples, strict=True)):
            own = part(1000 * number + 500 * (i + 1), length - len(begin))
            file = io.BytesIO()
            soundfile.write(file, torch.cat((begin, own)).numpy(), rate, format="FLAC")
            columns[name].append({"bytes": file.getvalue(), "path": None})
    folder.mkdir()
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({k: pa.array(v, audio) for k, v in columns.items()}), folder / "train.parquet")
    return folder


@torch.no_grad()
def plain(lm: Any, task: Any, pairs: int) -> list[torch.Tensor]:
    """The NLLs of each clip of the first pairs, one clip at a time."""
    from torchtitan.audio.waveform import load_audio

    found = []
    for row in task.pairs(pairs):
        for column in task.columns:
            waveform = load_audio(row[column]["bytes"])
            encoded: Any = lm.codec.model.encode(waveform[None, None].to(lm.device), num_quantizers=QUANTIZERS)
            ids = lm.stream.sample(encoded.audio_codes[0].cpu()).to(lm.device)
            logits = lm.model(input_ids=ids[None]).logits[0].float()
            nll = -torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None])[:, 0]
            found.append(nll.cpu())
    return found


def measure(way: str, options: Options, folder: str, results: Any) -> None:
    """Time one way in a process of its own: puts the seconds by name, and the NLLs of each clip."""
    from torchtitan.checkpoint.speech_lm import choose_device
    from torchtitan.eval.benchmark import score_task
    from torchtitan.eval.data import open_tasks
    from torchtitan.eval.store import ArrayStore
    from torchtitan.eval.suites import SALMON
    from torchtitan.tools.memory import tune_malloc

    if way == "ours":
        tune_malloc()  # as eval/*.py do
    device = choose_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = make_model(options.size, options.vocabulary, dtype, device)
    (task,), _ = open_tasks(folder, SALMON.tasks, SALMON.columns, True)
    seconds: dict[str, tuple[float, float]] = {}
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for warm in (False, True):
            cache, pairs = ArrayStore(Path(temporary) / str(warm)), options.pairs if warm else 1
            for name in ("plain",) if way == "plain" else ("ours", "ours, codes kept"):
                begin, processor = time.perf_counter(), time.process_time()
                if way == "plain":
                    nlls = plain(lm, task, pairs)
                else:
                    clips = score_task(SALMON, task, lm, options.batch_size, limit=pairs, cache=cache)
                    nlls = [clip.nll for clip in clips if clip.nll is not None]
                # Of the second time; what the processors were busy for hardly depends on what else they do.
                seconds[name] = (time.perf_counter() - begin, time.process_time() - processor)
                found[name] = [nll.numpy() for nll in nlls]
    results.put((seconds, found))


def main(options: Options) -> None:
    """Run the ways in turn and print the best speeds and their ratios as JSON."""
    from torchtitan.eval.suites import SALMON

    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[tuple[float, float]]] = {}
    scores: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / SALMON.tasks[0]
        folder = options.dataset or make_task(made, options.pairs, options.shared)
        for _ in range(options.turns):
            for way in ("plain", "ours"):
                results = context.Queue()
                process = context.Process(target=measure, args=(way, options, str(folder), results))
                process.start()
                times, found = results.get()
                process.join()
                scores |= found
                for name, took in times.items():
                    seconds.setdefault(name, []).append(took)
                    print(
                        f"{name}: {options.pairs / took[0]:.2f} pairs/s, {took[1]:.1f} s of processors",
                        file=sys.stderr,
                        flush=True,
                    )
    speed = {name: options.pairs / min(took for took, _ in times) for name, times in seconds.items()}
    busy = {name: min(took for _, took in times) for name, times in seconds.items()}
    others = [name for name in speed if name != "plain"]
    report = {
        "pairs_per_second": speed,
        "ratios": {name: speed[name] / speed["plain"] for name in others},
        "processor_seconds": busy,
        "processor_ratios": {name: busy["plain"] / busy[name] for name in others},
        "furthest_scores": max(
            float(abs(one - other).max())
            for name in others
            for one, other in zip(scores["plain"], scores[name], strict=True)
        ),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "options": vars(options),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    command.run(main, Options, __doc__)
